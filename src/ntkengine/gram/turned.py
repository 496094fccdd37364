"""What rounding does to a kernel of signs: an entry near zero may have its sign turned."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkengine.gram.frame import Frame

_UNSEEN = 3.0  # none among m samples still leaves 3/m for each, at 95 %


def turned_norm(
    changed: Tensor, left: Tensor, frame: Frame, samples: int, entries: int, of: int, scale: float
) -> float:
    """Return ‖E‖_F, in the mean over draws and from above, of what turned signs may do to a Gram.

    A sign of column j turned in an entry p changes K_ij by twice G_ip, by independent amounts for every p. Those of the
    drawn samples that rounding might turn count as turned, and three more of entries of mean size.

    Args:
        changed: (layers, m·w, m·w), Σ_p G_ip² over the entries p whose sign is unsure in j, between m drawn samples.
        left: (layers, m·w) Σ_p G_ip².
        frame: the job's.
        samples: m.
        entries: compared.
        of: so many selected.
        scale: of the entries that none of the samples may have shown: finer arithmetic turns fewer.
    """
    w = frame.width
    others = torch.ones_like(changed[0, ::w, ::w]) - (torch.eye(samples).to(changed) if samples > 1 else 0)
    others = others.repeat_interleave(w, 0).repeat_interleave(w, 1)
    mean = (changed * others).sum((1, 2)) / others.sum()
    outputs = frame.outputs if frame.contraction == "trace" else 1
    unseen = scale * _UNSEEN / samples * left.mean(1) / (entries * outputs)
    rows, columns = ((stop - start) * w for start, stop in (frame.rows, frame.columns))
    sides = 2 if frame.transform == "sign" else 1
    return float((4.0 * sides * rows * columns * of / entries * (mean + unseen)).max().sqrt())
