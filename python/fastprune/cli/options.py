"""The options of the commands: names and meanings of the API's arguments, from the line or from a file."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import values
from .values import UsageError, UserCodeError


@dataclasses.dataclass(frozen=True)
class Option:
    """One argument: how its value is read, and what ``--help`` says.

    Attributes:
        several: whether it may be given more than once.

    """

    read: Callable[[Any], Any]
    help: str
    several: bool = False


_FUNCTION = "package.module:function"
OPTIONS = {
    "model": Option(values.made, "package.module:factory of the trained model"),
    "dense": Option(values.made, "package.module:factory of the model before"),
    "compressed": Option(values.text, "a file that fastprune saved of that model, or package.module:factory"),
    "loader": Option(values.made, "package.module:factory of the batches"),
    "train_loader": Option(values.made, "package.module:factory of the batches for scores and distillation"),
    "val_loader": Option(values.made, "package.module:factory of the batches for accuracy"),
    "example_inputs": Option(values.made, "package.module:factory of the inputs that are timed"),
    "output": Option(values.path, "what is written"),
    "sparsity": Option(values.number, "share of the weights to prune, in [0, 1)"),
    "budget": Option(values.budget, "what may remain: flops=0.4; params, bytes, latency"),
    "threshold": Option(values.number, "scores below it are pruned"),
    "target": Option(values.text, "auto: the largest sparsity within --max-accuracy-drop"),
    "tolerance": Option(values.number, "of the sparsity that auto finds"),
    "rounds": Option(values.integer, "how many"),
    "epochs": Option(values.integer, "of distillation in each round"),
    "granularity": Option(values.granularity, '16x16, "Block(16, 16)", "Unit()", ..., or auto'),
    "structure": Option(values.text, "what goes: blocks, units (and heads), or both"),
    "round_to": Option(values.integer, "what remains of a layer's units is a multiple"),
    "scores": Option(values.path, "a file of scores, from which masks are selected"),
    "masked": Option(values.path, "a file that fastprune saved of the masked model, in the place of scores"),
    "criterion": Option(values.criterion, f"loss_delta, taylor, ..., or {_FUNCTION}"),
    "include": Option(values.layers, "layers: a glob of names", several=True),
    "exclude": Option(values.layers, "layers to leave out", several=True),
    "scope": Option(values.scope, "global, layer, or a list of groups"),
    "floor": Option(values.floor, "what stays of each layer: max_sparsity=0.98; units, blocks_per_row"),
    "teacher": Option(values.text, "original or previous"),
    "temperature": Option(values.number, "of the distillation"),
    "hard_label_weight": Option(values.number, "of the labels in the distillation, in [0, 1]"),
    "loss_fn": Option(values.reference, f"{_FUNCTION} of outputs and targets"),
    "output_transform": Option(values.reference, f"{_FUNCTION} that picks out the logits"),
    "optimizer": Option(values.reference, f"{_FUNCTION} from parameters to an optimizer"),
    "distillation": Option(values.distillation, "more options of distill: max_grad_norm=1.0", several=True),
    "fold_batch_norm": Option(values.flag, "fold batch norms into the layers before them"),
    "max_samples": Option(values.integer, "how many samples a scoring reads"),
    "memory_budget": Option(values.integer, "bytes that a scoring may take"),
    "max_accuracy_drop": Option(values.number, "0.01 is one percentage point"),
    "min_speedup": Option(values.number, "how many times as fast the compressed model must be"),
    "checkpoint_dir": Option(values.path, "where checkpoints are; OUTPUT/checkpoints without it"),
    "seed": Option(values.integer, "of all random generators, also when factories are called"),
    "progress": Option(values.flag, "progress bars, on standard error"),
    "title": Option(values.text, "of the page"),
}


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Give a command its options, with dashes for underscores, and ``--config``."""
    for name in names:
        option = OPTIONS[name]
        spelling = f"--{name.replace('_', '-')}"
        if option.read is values.flag:
            parser.add_argument(
                spelling, action=argparse.BooleanOptionalAction, default=None, help=option.help
            )
        else:
            action = "append" if option.several else "store"
            parser.add_argument(spelling, action=action, metavar="VALUE", help=option.help)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of such arguments")
    parser.set_defaults(names=tuple(names))


def read_options(arguments: argparse.Namespace, required: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of a command that are given, each as the API takes it; the line beats the file.

    The generators are seeded before factories draw from them, so that the same command makes the same model.

    Raises:
        UsageError: one is missing, unknown or of the wrong form.
        UserCodeError: a factory, or the module that it is in, raised an error.

    """
    file = arguments.config
    given = {} if file is None else _read_config(file)
    unknown = sorted(set(given) - set(arguments.names))
    if unknown:
        raise UsageError(f"`--config` {file} has unknown keys: {', '.join(unknown)}")
    sources = dict.fromkeys(given, f" in {file}")
    for name in arguments.names:
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
            sources[name] = ""
    for name in required:
        if name not in given:
            raise UsageError(
                f"`--{name.replace('_', '-')}` must be given, on the command line or in --config"
            )
    if "seed" in arguments.names:
        _seed(read_option("seed", given["seed"], sources["seed"]) if "seed" in given else 0)
    found = {}
    for name in arguments.names:
        if name in given:
            found[name] = read_option(name, given[name], sources[name])
    return found


def read_option(name: str, value: Any, source: str = "") -> Any:
    """Return one argument as the API takes it."""
    argument = f"`--{name.replace('_', '-')}`" if not source else f"`{name}`{source}"
    try:
        return OPTIONS[name].read(value)
    except UserCodeError as error:
        raise UserCodeError(f"{argument}: {error}") from error
    except (ValueError, TypeError) as error:
        colon = "" if str(error).startswith("must ") else ":"
        raise UsageError(f"{argument}{colon} {error}") from error


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _read_config(path: Path) -> dict[str, Any]:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        toml = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError("`--config` needs Python 3.11, or tomli: pip install 'fastprune[toml]'") from error
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`--config` must be a TOML file, got {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"`--config` must be a TOML file, got {path}: {error}") from error
