"""The command line: ``fastprune`` score, compress, shrink, compare, report, info and demo."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import commands
from .commands import FAILED, USAGE
from .options import add_options
from .values import UsageError

# As shells report a program that Ctrl-C ended.
_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastprune",
        description="Prune PyTorch models, run them faster.",
        epilog="Exit codes: 0 fine, 1 the work failed, 2 wrong usage or input, 130 interrupted.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str, names: Sequence[str] = ()) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=run.__doc__, allow_abbrev=False)
        if names:
            add_options(command, names)
        command.add_argument("--debug", action="store_true", help="print the traceback of an error")
        command.set_defaults(run=run)
        return command

    def add_json(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", action="store_true", help="print JSON")

    add_json(add("score", commands.score_command, "score the pieces of a model", commands.SCORE))
    add_json(
        add("compress", commands.compress_command, "score, prune and distil in rounds", commands.COMPRESS)
    )
    add_json(add("shrink", commands.shrink_command, "cut masked units out of a model", commands.SHRINK))
    add_json(add("compare", commands.compare_command, "measure two models side by side", commands.COMPARE))
    report = add("report", commands.report_command, "write the page of a compression")
    report.add_argument("folder", type=Path, help="that compress wrote, or its checkpoints")
    report.add_argument("--output", type=Path, metavar="FILE", help="FOLDER/report.html without it")
    report.add_argument("--checkpoint-dir", type=Path, metavar="FOLDER", help="if it is elsewhere")
    report.add_argument("--title", help="of the page")
    add_json(add("info", commands.info, "print versions, instruction sets, threads and CUDA kernels"))
    demo = add("demo", commands.demo, "train, compress and time a network on real data")
    demo.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="the data set")
    demo.add_argument("--data-dir", type=Path, help="folder of the IDX files, for fashion-mnist")
    demo.add_argument("--json", type=Path, help="write every figure to this file")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _is_input_error(error: Exception) -> bool:
    """Tell whether fastprune itself refused what it was given: what a model or loader raises is a failure."""
    if isinstance(error, UsageError):
        return True
    if not isinstance(error, (ValueError, TypeError, FileNotFoundError, ImportError)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is fine; 1: the work failed, or a limit on accuracy or speed is not met; 2: wrong usage or input, with
    one line on standard error that names the argument; 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    path, current = list(sys.path), os.getcwd()
    if current not in sys.path:
        sys.path.insert(0, current)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print(
            "fastprune: interrupted; the same compress command goes on from its checkpoints", file=sys.stderr
        )
        return _INTERRUPTED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        usage = _is_input_error(error)
        kind = "" if usage or message.startswith("`") else f"{type(error).__name__}: "
        print(f"fastprune: {kind}{message}", file=sys.stderr)
        return USAGE if usage else FAILED
    finally:
        sys.path[:] = path


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line, without the place in the code that gave it."""
    print(f"fastprune: {str(message).removeprefix('fastprune: ')}", file=sys.stderr)
