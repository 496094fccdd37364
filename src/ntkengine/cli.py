"""The command line: `ntkengine plan | gram | info | verify | merge | spectrum | ridge | forecast | report | …`.

Exit codes: 0; 1 a computation failed or a file is damaged; 2 bad input; 130 stopped by SIGINT, 143 by SIGTERM, as a
shell says it of a process that such a signal ended. An error is one line on standard error. Heavy libraries are
imported by the command that needs them.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ntkengine import __version__
from ntkengine.comparecommand import compare
from ntkengine.console import answered, interrupted, open_streams, print_json, remark, say, show, showing_progress
from ntkengine.filecommands import Json, info, merge, verify
from ntkengine.finetunecommand import finetune
from ntkengine.gramcommand import gram, plan
from ntkengine.helpexamples import epilog
from ntkengine.readcommands import forecast, report, ridge, spectrum
from ntkengine.selectcommand import select

# Warn, when another library imports them, of kernels that nothing here uses.
_TALKATIVE = ("torchao", "torch.utils._pytree")

app = typer.Typer(
    help="Exact empirical neural tangent kernels of language models, and what they forecast of fine-tuning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: default `sys.argv[1:]`.
    """
    open_streams()
    try:
        code = app(args=arguments, prog_name="ntkengine", standalone_mode=False)
    except typer.Abort:
        code = interrupted()
    except Exception as error:
        # Usage errors come from typer's own or from an installed click; both look like this.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "ntkengine")
        code = say(f"{message()} (see {where} --help)", 2) if message() else 2
    sys.exit(code if isinstance(code, int) else 0)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is chosen and why.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Configure logging: the only place that does."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.INFO if verbose else logging.WARNING)  # whatever --log-dir keeps in files
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[shown])
    logging.getLogger("ntkengine").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)


for command in (plan, gram, info, verify, merge, compare, finetune, select, spectrum, ridge, forecast, report):
    app.command(epilog=epilog(command.__name__))(command)


@app.command(epilog=epilog("doctor"))
@answered
def doctor(
    model: Annotated[str | None, typer.Option(help="Measure how far this model depends on batch and padding.")] = None,
    as_json: Json = False,
) -> None:
    """Say what will run where on this machine; with --model, how far that model depends on batch and padding.

    Exit code 1 if something is broken that the engine cannot do without.
    """
    from ntkengine.doctor import broken, examine
    from ntkengine.report.tables import Table, invariance_table

    if model is not None:
        from ntkengine.inputs.models import load_model
        from ntkengine.invariance import advice, batch_invariance

        measured = batch_invariance(load_model(model))
        if as_json:
            print_json({"invariance": [row.to_dict() for row in measured], "advice": advice(measured)})
            return
        show(invariance_table(measured, advice(measured)))
        return
    items = examine()
    if as_json:
        print_json({item.name: item.to_dict() for item in items})
    else:
        show(
            Table(
                "Doctor", ("what", "state", "found", "note"), [(i.name, i.state, i.found or "-", i.note) for i in items]
            )
        )
        for item in items:
            if item.fix:
                print(f"{item.name}: try {item.fix}")
    if broken(items):
        raise typer.Exit(1)


@app.command(epilog=epilog("demo"))
@answered
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two Gram files and the report.")] = Path("runs/demo"),
    train: Annotated[int, typer.Option(help="Training examples.")] = 256,
    evaluate: Annotated[int, typer.Option("--eval", help="Held-out examples.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the drawn examples.")] = 0,
) -> None:
    """Run the whole job on a real model and real text: MiniLM on movie review snippets (downloads 86 MB once)."""
    from ntkengine.demo import run_demo

    with showing_progress() as progress:
        result = run_demo(out, train, evaluate, seed, progress)
    for table in result.tables:
        show(table)
    remark(result.summary, mark="")
