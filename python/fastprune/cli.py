"""The command line: ``fastprune info`` and ``fastprune demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ._library import build_info


def _info(_: argparse.Namespace) -> int:
    for name, value in build_info().items():
        print(f"{name + ':':<34} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run  # needs the extra `demo`, which `info` does without

    return run(arguments.data, arguments.data_dir, arguments.json, progress=not arguments.quiet)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastprune", description="Prune PyTorch models, run them faster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="print versions, instruction sets, threads and CUDA kernels")
    info.set_defaults(run=_info)
    demo = commands.add_parser("demo", help="train, compress and time a network on real data")
    demo.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="the data set")
    demo.add_argument("--data-dir", type=Path, help="folder of the IDX files, for fashion-mnist")
    demo.add_argument("--json", type=Path, help="write every figure to this file")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for wrong arguments or missing data."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"fastprune: {error}", file=sys.stderr)
        return 2
