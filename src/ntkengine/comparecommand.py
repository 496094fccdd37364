"""`ntkengine compare`: two Gram files, and what they forecast, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntkengine.console import answered, print_json, remark, show
from ntkengine.digits import above, measured, nearest
from ntkengine.errors import InputError
from ntkengine.filecommands import GramFile, Json

if TYPE_CHECKING:
    from ntkengine.spectrum import ConditionNumber

# Facts of a run, not of its kernel.
_PASSING = ("wall time", "  in passes", "  in contractions", "  taken from checkpoints", "date", "work", "device")

_LONG = 60  # characters of a list of modules that is shown whole


@answered
def compare(
    path: GramFile,
    other: Annotated[Path, typer.Argument(help="Another.", metavar="OTHER.H5", show_default=False)],
    as_json: Json = False,
) -> None:
    """Say how far two Gram files are apart, against the noise of both, and in which settings and forecasts."""
    from ntkengine.gramfiles import forecast_file
    from ntkengine.report.findings import comparison_table
    from ntkengine.report.tables import Table, gram_table
    from ntkengine.spectrum import condition_number, effective_rank
    from ntkengine.store import open_gram

    if path.resolve() == other.resolve():
        raise InputError(f"{other}: expected another file to compare it with, got the same one twice")
    grams = {str(name): open_gram(name) for name in (path, other)}
    found = _apart(grams)
    facts = [{row[0]: row[1] for row in gram_table(gram).rows} for gram in grams.values()]
    labels = [label for label in dict.fromkeys((*facts[0], *facts[1])) if label not in _PASSING]
    rows = [(label, *(one.get(label, "") for one in facts)) for label in labels]
    differing = [row for row in rows if not _equal(row[1], row[2])]
    ranks = [effective_rank(gram) for gram in grams.values()]
    if as_json:
        told = found | {"effective_rank": ranks, "effective_rank_error": [rank.error for rank in ranks]}
        print_json({"paths": list(grams), **told, "differing": {label: both for label, *both in differing}})
        return
    note = "A is the first, B the second" + ("" if differing else "; no facts or settings differ")
    show(Table("How far they are apart", (), _told(found), note))
    if differing:
        short = [(label, *map(_few, both)) for label, *both in differing]
        show(Table("Facts and settings that differ", ("", *grams), short))
    try:
        forecasts = {name: forecast_file(gram) for name, gram in grams.items()}
        side, conditions = comparison_table(forecasts), _conditions(f.condition for f in forecasts.values())
        show(replace(side, rows=[conditions if row[0] == conditions[0] else row for row in side.rows]))
    except InputError as error:
        spectral = [("effective rank", *map(str, ranks)), _conditions(map(condition_number, grams.values()))]
        show(Table("Side by side", ("", *grams), spectral))
        remark([f"not set side by side are forecasts: {error}"])
    if len({gram.meta.get("readout") for gram in grams.values()}) > 1:
        remark(["of different readouts, losses, ridges and noise cannot be compared; accuracies can"])


def _apart(grams: dict[str, Any]) -> dict[str, Any]:
    """Return what there is to say of the difference; None each where the examples are not known to be the same.

    An error E of a Gram with ‖E‖₂ <= noise has ‖E‖_F <= √n·noise, and turns it by arcsin(‖E‖_F/‖K‖_F) at most.

    Raises:
        InputError: Grams that are not square, or whose noise is not known.

    Cost: the eigenvalues of the difference, 4/3·n³ flops.
    """
    import numpy as np

    from ntkengine.spectrum import as_matrix, noise_of

    (name, a), (other, b) = grams.items()
    for where, gram in grams.items():
        if len(gram.shape) != 2 or gram.shape[0] != gram.shape[1]:
            raise InputError(f"{where}: expected a Gram of shape (n, n) to compare, got {tuple(gram.shape)}")
        if not np.isfinite(gram.noise):
            raise InputError(f"{where}: its noise is not known, so there is nothing to hold a difference against")
    same = a.shape == b.shape and _same_examples(a, b)
    names = ("relative_difference", "relative_difference_error", "spectral_difference", "noise", "within_noise")
    found: dict[str, Any] = {"same_examples": same, **dict.fromkeys((*names, "alignment", "alignment_error", "scale"))}
    A, B, off = as_matrix(a), as_matrix(b), np.array([noise_of(a), noise_of(b)])
    sizes = np.array([np.linalg.norm(A), np.linalg.norm(B)])
    if not sizes.all():
        raise InputError(f"{other if sizes[0] else name}: expected a Gram to compare that is not all zeros")
    if not same:
        return found
    apart = float(np.linalg.norm(A - B))
    turned = np.sqrt(len(A)) * off  # in the Frobenius norm
    left = sizes[0] - turned[0]
    spectral = float(np.abs(np.linalg.eigvalsh(A - B)).max())
    return found | {
        "relative_difference": apart / sizes[0],
        "relative_difference_error": (turned.sum() + apart / sizes[0] * turned[0]) / left if left > 0 else np.inf,
        "spectral_difference": spectral,
        "noise": float(off.sum()),
        "within_noise": bool(spectral <= off.sum()),
        "alignment": float((A * B).sum() / sizes.prod()),
        "alignment_error": float(np.arcsin(np.minimum(turned / sizes, 1.0)).sum()),
        "scale": float(sizes[1] / sizes[0]),
    }


def _same_examples(a: Any, b: Any) -> bool:
    """Return whether two Grams are known to be of the same examples: the same tokens, or the same rows of one file."""
    tokens, rows = ([gram.meta["job"]["data"][0] for gram in (a, b)], [gram.meta.get("example_id") for gram in (a, b)])
    files = [((gram.meta.get("settings") or {}).get("sources") or {}).get("data.train") for gram in (a, b)]
    return tokens[0] == tokens[1] or (None not in (*rows, *files) and rows[0] == rows[1] and files[0] == files[1])


def _equal(a: str, b: str) -> bool:
    """Return whether two cells are the same, as text or as numbers."""
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False


def _few(cell: str) -> str:
    """Return a cell; of a long list of dotted names how many there are, and the end of the first."""
    from ntkengine.report.tables import shortened

    names = cell.split(", ")
    if len(cell) <= _LONG or len(names) < 3 or not all("." in name and " " not in name for name in names):
        return cell
    return f"{len(names)} modules: {shortened(names)[0]}, …"


def _conditions(found: Iterable[ConditionNumber]) -> tuple[str, ...]:
    """Return the row of condition numbers, without why one is not resolved."""
    return ("condition number", *(c.short + ("" if c.resolved else " (unresolved)") for c in found))


def _told(found: dict[str, Any]) -> list[tuple[str, str]]:
    from ntkengine.report.cells import aligned

    if not found["same_examples"]:
        return [("examples", "not known to be the same: entries are not compared")]
    place = f"{'within' if found['within_noise'] else 'beyond'} the noise of both, {above(found['noise'], 2)} gradient²"
    return [
        ("examples", "the same"),
        ("‖A − B‖_F / ‖A‖_F", measured(found["relative_difference"], found["relative_difference_error"], 4)),
        ("‖A − B‖₂", f"{nearest(found['spectral_difference'])} gradient², {place}"),
        ("alignment ⟨A, B⟩ / ‖A‖‖B‖", aligned(found["alignment"], found["alignment_error"], 6)),
        ("‖B‖_F / ‖A‖_F", nearest(found["scale"])),
    ]
