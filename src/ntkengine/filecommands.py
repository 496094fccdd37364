"""`ntkengine info | verify | merge`: what can be done with a Gram file as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ntkengine.console import answered, print_json, say, show

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
GramFile = Annotated[Path, typer.Argument(help="Gram file.", metavar="K.H5", show_default=False)]


@answered
def info(path: GramFile, as_json: Json = False) -> None:
    """Show everything a Gram file says about itself; of one that is not complete yet, how far the job is."""
    from ntkengine.report.findings import module_table
    from ntkengine.report.tables import gram_table, progress_table
    from ntkengine.store import open_gram, read_progress

    progress = None if path.exists() else read_progress(path)
    if progress is not None:
        if as_json:
            print_json({"path": str(path), "complete": False, **progress})
        else:
            show(progress_table(progress))
        return
    gram = open_gram(path)
    traces = gram.meta.get("module_trace") or {}
    if as_json:
        print_json(described(gram))
        return
    show(gram_table(gram))
    total = sum(traces.values())
    if total > 0:
        show(module_table({name: value / total for name, value in traces.items()}, total))


@answered
def verify(
    path: GramFile,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Mend damaged tiles by their mirror image. With others left, the file becomes its job's unfinished "
            "run, .K.H5.parts beside it, until the next run of the same job has computed them.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a Gram file's checksums and that every number is finite; exit 1 if not."""
    from ntkengine.store import parts_of, repair_gram, verify_gram

    if repair:
        repaired, opened = repair_gram(path)
        if as_json:
            print_json({"path": str(path), "sound": not opened, "repaired": repaired, "open": opened})
        elif not opened:
            mended = f"{repaired} damaged tiles repaired, now sound" if repaired else "sound"
            print(f"{path}: {mended}")
        if opened:
            msg = (
                f"{path}: damaged tiles repaired: {repaired}, still to be computed: {opened}; the file is now the "
                f"unfinished run {parts_of(path)}: run the same job again, it computes only those, and the file is back"
            )
            raise typer.Exit(1 if as_json else say(msg, 1))
        return
    problems = verify_gram(path)
    if as_json:
        print_json({"path": str(path), "sound": not problems, "problems": problems})
    elif not problems:
        print(f"{path}: sound")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise typer.Exit(1 if as_json else say(f"{path}: {problems[0]}{more}", 1))


@answered
def merge(
    path: GramFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.", show_default=False)],
    compress: Annotated[bool, typer.Option("--compress", help="Pack it by gzip.")] = False,
) -> None:
    """Copy a Gram file, sharded or not, into one file, checking every tile."""
    from ntkengine.gram.stopping import stopping
    from ntkengine.store import merge_gram

    with stopping():  # or a signal would leave the half-written copy
        merge_gram(path, out, compress=compress)
    print(out)


def described(gram: Any) -> dict[str, Any]:
    """Return what `--json` says of a Gram."""
    arrays = {name: getattr(gram, name) for name in ("values", "outputs", "targets", "cross")}
    arrays |= {name: getattr(gram, name) for name in ("eval_outputs", "eval_targets")} | dict(gram.extras)
    shapes = {name: None if array is None else list(array.shape) for name, array in arrays.items()}
    own = {"path": str(gram.path), "contraction": gram.contraction, "transform": gram.transform, "noise": gram.noise}
    return own | {"shapes": shapes, "modules": list(gram.modules), "meta": gram.meta}
