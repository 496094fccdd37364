"""Freed memory goes back to the system near a limit, and stays for the next tensor below it."""

from __future__ import annotations

import sys

import pytest
import torch

from ntkengine.inputs import heap
from ntkengine.inputs.heap import Heap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux")
MIB = 1 << 20


@pytest.fixture
def bounded():
    found = Heap()
    if found._libc is None:
        pytest.skip("glibc is not the allocator here")
    yield found
    found.begin()


def fragments():
    """Return tensors with free memory of twice their size between them."""
    every = [torch.ones(MIB // 4) for _ in range(96)]
    return every[::3]


def test_freed_memory_goes_back_near_the_limit_only(bounded):
    bounded.begin(limit=1 << 40)
    kept = fragments()
    before = heap._held()
    bounded.relieve()
    assert heap._held() > before - 16 * MIB
    bounded.limit = 0.0
    bounded.relieve()
    assert heap._held() < before - 40 * MIB
    assert all(float(t.sum()) == MIB // 4 for t in kept)


def test_a_job_without_a_limit_is_never_asked(bounded, monkeypatch):
    bounded.begin()
    monkeypatch.setattr(heap, "_held", lambda: pytest.fail("looked"))
    bounded.relieve()


def test_a_system_that_tells_nothing_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(heap, "_STATM", tmp_path / "missing")
    assert heap._held() == 0
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("none")))
    other = Heap()
    other.begin(limit=1.0)
    other.relieve()
