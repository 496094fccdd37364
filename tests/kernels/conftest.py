"""Every buffer that kernels are to fill starts as NaN: what they leave out is seen."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():  # where there is a GPU these are tests of it
        for item in items:
            if "kernels" in item.path.parts:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    real, real_like = torch.empty, torch.empty_like

    def poisoned(found):
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(real(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(real_like(*a, **k)))
