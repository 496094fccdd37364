"""`python -m bench list | run NAME… [-- ARGUMENTS] | compare A B | plot`.

Under an MPI launcher (`mpirun -n 4 python -m mpi4py -m bench run ranks`) a case that needs MPI runs on all ranks, any
other on rank 0 alone; rank 0 writes the lines.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module

from bench.cases import CASES, Case
from ntkengine.cluster.launch import launcher_rank


def main(given: list[str]) -> int:
    """Do what the command line says; return the exit status: 1 failed or regressed, 2 bad input."""
    given, arguments = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the cases")
    run = commands.add_parser("run", help="run cases; ARGUMENTS are the one case's")
    run.add_argument("names", nargs="+", metavar="NAME")
    compare = commands.add_parser("compare", help="regressions from A to B: exit 1")
    compare.add_argument("a", metavar="A", help="a file of lines, a folder of them, or a commit")
    compare.add_argument("b", metavar="B")
    compare.add_argument("--tolerance", type=float, default=0.05, help="share beyond the spread (default 0.05)")
    commands.add_parser("plot", help="redraw the figures from the lines")
    said = parser.parse_args(given)
    if arguments and said.command != "run":
        return _refused("arguments after `--` belong to `run NAME`")
    if said.command == "list":
        return listed()
    if said.command == "run":
        return ran(said.names, arguments)
    if said.command == "compare":
        from bench.compare import main as compared

        return compared(said.a, said.b, said.tolerance)
    from bench.plot import main as plotted

    return plotted()


def listed() -> int:
    """Print the cases."""
    for case in CASES.values():
        lacking = "".join(f"; needs {need}, not here" for need in case.missing())
        print(f"{case.name:20}{case.purpose} (about {case.minutes:g} min{lacking}) {case.arguments}".rstrip())
    return 0


def ran(names: list[str], arguments: list[str]) -> int:
    """Run cases; several each in a process of its own, so that none loses the others."""
    for name in names:
        if name not in CASES:
            return _refused(f"no case {name!r}: one of {', '.join(CASES)}")
        if lacking := CASES[name].missing():
            return _refused(f"{name} needs {', '.join(lacking)}, which is not here")
        if arguments and not CASES[name].arguments:
            return _refused(f"{name} takes no arguments, got {' '.join(arguments)}")
    if len(names) == 1:
        return _case(CASES[names[0]], arguments)
    if arguments or launcher_rank() is not None:
        return _refused("name one case at a time with arguments or under an MPI launcher")
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "bench", "run", name], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _case(case: Case, arguments: list[str]) -> int:
    if launcher_rank() and "mpi" not in case.needs:
        return 0
    # Imported only now: kernels are, or are not, run in the interpreter from then on.
    from bench.fresh import FailedError
    from bench.timing import WrongError

    run = import_module(f"bench.{case.module}").main
    try:
        return run(arguments) if case.arguments else run()
    except FailedError as error:
        print(error.output, f"{case.name}: {error}", sep="\n", file=sys.stderr)
    except WrongError as error:
        print(f"{case.name}: {error}", file=sys.stderr)
    return 1


def _refused(what: str) -> int:
    print(f"python -m bench: {what}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
