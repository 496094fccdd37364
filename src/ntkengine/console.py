"""What commands say, and the exit codes they say it with."""

from __future__ import annotations

import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from signal import SIGINT
from typing import Any

import typer

from ntkengine.cluster.launch import launcher_rank
from ntkengine.errors import CheckFailed, InputError, NonFinite, NotConverged, RankFailed, Stopped
from ntkengine.textfile import json_text

NOTHING_KEPT = "nothing was kept, the same command starts anew"


def answered(command: Callable[..., None], *, how: str = "") -> Callable[..., None]:
    """Turn what a command raises into one line and an exit code; other exceptions are bugs and keep their traceback.

    Args:
        command: what may raise.
        how: what to say of going on where it was interrupted and nothing is known of checkpoints.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (InputError, NotImplementedError) as error:
            raise typer.Exit(say(error, 2)) from error
        except RankFailed as error:
            logging.getLogger(__name__).info("on rank %d:\n%s", error.rank, error.traceback)
            raise typer.Exit(say(error, 1)) from error
        except (CheckFailed, NonFinite, NotConverged) as error:
            raise typer.Exit(say(error, 1)) from error
        except BrokenPipeError as error:  # the reader had enough, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise typer.Exit(say(f"{error.filename}: {error.strerror}", 2)) from error
        except OSError as error:
            raise typer.Exit(say(error, 1)) from error
        except MemoryError as error:
            raise typer.Exit(say(f"out of memory: {error}", 1)) from error
        except Stopped as error:
            by_hand = error.signal == SIGINT
            raise typer.Exit(interrupted(error.how) if by_hand else say(error, 128 + error.signal)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(interrupted(how)) from error

    return run


def open_streams() -> None:
    """Let what is printed go somewhere: nowhere, where a stream is closed; with ? for what its encoding lacks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or a file opened next would have the number, and what is printed in it
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def speaks() -> bool:
    """Return whether this process prints: alone, or the first of those that a launcher started."""
    return launcher_rank() in (None, 0)


def show(table: Any) -> None:
    """Print a table."""
    from ntkengine.report.text import make_console, print_table

    if speaks():
        print_table(table, make_console())


def remark(lines: Iterable[str], mark: str = "- ") -> None:
    """Print sentences below a table, each after the mark, folded between words on a terminal."""
    from ntkengine.report.text import make_console

    console = make_console()
    for line in lines:
        console.print(f"{mark}{line}", markup=False)


@contextmanager
def showing_progress(unit: str = "GFLOP") -> Iterator[Callable[[float, float, str], None] | None]:
    """Give a command's `progress=`, on standard error: a bar, or lines in a log; None in processes that do not speak.

    Args:
        unit: as `show_progress`.
    """
    from ntkengine.report.progress import show_progress

    with show_progress(unit=unit) if speaks() else nullcontext() as progress:
        yield progress


def print_json(value: Any) -> None:
    """Print plain values as one line of JSON."""
    if speaks():
        print(json_text(value))


def say(error: object, code: int, mark: str = "error: ") -> int:
    """Print one line on standard error, one process of a job for all, and return the exit code."""
    if speaks():
        print(mark + " ".join(str(error).split()), file=sys.stderr)
    return code


def interrupted(how: str = "") -> int:
    """Say that a command was interrupted, which is no error, and how to go on; return the exit code."""
    return say("interrupted" + (f": {how}" if how else ""), 128 + SIGINT, mark="")
