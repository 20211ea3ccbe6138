"""What each command does; each returns the exit code and prints its data to standard output."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._library import build_info
from ..batches import iterate_batches, model_device
from ..compress import compress
from ..files import finite
from ..importance import ImportanceScores, score
from ..layers import check_model
from ..metrics import compare, count_parameters
from ..report import report
from ..serialization import load, save
from ..shrinking import shrink
from .options import read_option, read_options
from .values import UsageError

FINE, FAILED, USAGE = 0, 1, 2

SCORE = (
    "model", "loader", "criterion", "granularity", "include", "exclude", "loss_fn", "output_transform",
    "max_samples", "memory_budget", "output", "seed", "progress",
)  # fmt: skip
COMPRESS = (
    "model", "train_loader", "val_loader", "sparsity", "budget", "target", "tolerance", "rounds", "epochs",
    "granularity", "structure", "round_to", "criterion", "include", "exclude", "scope", "floor", "teacher",
    "temperature", "hard_label_weight", "loss_fn", "output_transform", "optimizer", "distillation",
    "example_inputs", "fold_batch_norm", "max_samples", "max_accuracy_drop", "output", "checkpoint_dir",
    "seed", "progress",
)  # fmt: skip
SELECT = ("sparsity", "threshold", "budget", "scope", "floor", "round_to")
SHRINK = ("model", "scores", "masked", *SELECT, "example_inputs", "output", "seed")
COMPARE = (
    "dense", "compressed", "loader", "example_inputs", "loss_fn", "output_transform", "max_accuracy_drop",
    "min_speedup", "seed",
)  # fmt: skip


def _print_json(figures: Any) -> None:
    print(json.dumps(finite(figures), indent=1, allow_nan=False))


def _complain(message: str) -> None:
    print(f"fastprune: {message}", file=sys.stderr)


def _check_file(target: Path) -> Path:
    """Return the path of a file to write, or raise before the work that it is for."""
    if target.is_dir():
        raise UsageError(f"`--output` must name a file, got the folder '{target}'")
    if not target.parent.is_dir():
        raise UsageError(f"`--output` must be in a folder that exists, got '{target}'")
    return target


def info(arguments: argparse.Namespace) -> int:
    """Print versions, instruction sets, threads and CUDA kernels."""
    if arguments.json:
        _print_json(build_info())
        return FINE
    for name, value in build_info().items():
        print(f"{name + ':':<34} {', '.join(value) if isinstance(value, list) else value}")
    return FINE


def demo(arguments: argparse.Namespace) -> int:
    """Train, compress and time a network."""
    from ..demo import run  # needs the extra `demo`, which the others do without

    return run(arguments.data, arguments.data_dir, arguments.json, progress=not arguments.quiet)


def score_command(arguments: argparse.Namespace) -> int:
    """Write the scores of a model to a file, and print what they are like."""
    options = read_options(arguments, required=("model", "output"))
    target = _check_file(options.pop("output"))
    options.pop("seed", None)
    scores = score(options.pop("model"), options.pop("loader", None), **options)
    scores.save(target)
    layers = {name: _summary(layer) for name, layer in scores.items()}
    if arguments.json:
        _print_json(
            {
                "criterion": scores.criterion,
                "granularity": repr(scores.granularity),
                "num_samples": scores.num_samples,
                "loss": scores.loss,
                "layers": layers,
                "output": str(target),
            }
        )
        return FINE
    print(f"{'layer':<32} {'pieces':>14} {'lowest':>11} {'median':>11} {'highest':>11}")
    for name, layer in layers.items():
        values = "".join(f" {layer[key]:>11.3e}" for key in ("lowest", "median", "highest"))
        shape = "x".join(map(str, layer["shape"])) or "1"
        print(f"{name:<32} {shape:>14}{values}")
    print(f"{scores.criterion} of {scores.granularity}, {scores.num_samples} samples, written to {target}")
    return FINE


def _summary(layer: Tensor) -> dict[str, Any]:
    ordered = layer.flatten().sort().values
    if not len(ordered):
        return {"shape": list(layer.shape), "lowest": 0.0, "median": 0.0, "highest": 0.0}
    return {
        "shape": list(layer.shape),
        "lowest": float(ordered[0]),
        "median": float(ordered[(len(ordered) - 1) // 2]),
        "highest": float(ordered[-1]),
    }


def compress_command(arguments: argparse.Namespace) -> int:
    """Write a compressed model, its history and its report into a folder; go on with a run that is there."""
    options = read_options(arguments, required=("model", "train_loader", "val_loader", "output"))
    folder = options.pop("output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`--output` must be a folder, or not exist yet, got '{folder}'") from error
    options.setdefault("checkpoint_dir", folder / "checkpoints")
    loaders = (options.pop("train_loader"), options.pop("val_loader"))
    result = compress(options.pop("model"), *loaders, **options)
    save(result.model, folder / "model.safetensors")
    result.save_history(folder / "history.json")
    result.report(folder / "report.html")
    if arguments.json:
        _print_json(result.to_dict())
    else:
        print(result)
        print(f"model.safetensors, history.json and report.html written to {folder}")
    rounds = result.settings["rounds"]
    if len(result.history) < rounds:
        _complain(
            f"`--max-accuracy-drop` {options['max_accuracy_drop']:g} let {len(result.history)} of {rounds} "
            "rounds count"
        )
        return FAILED
    return FINE


def shrink_command(arguments: argparse.Namespace) -> int:
    """Cut masked units, heads and layers out of a model, and write what is left of it to a file."""
    options = read_options(arguments, required=("model", "example_inputs", "output"))
    target = _check_file(options["output"])
    model, source = check_model(options["model"]), options.get("masked")
    select = {name: options[name] for name in SELECT if name in options}
    if (source is None) == ("scores" not in options):
        raise UsageError("`--scores` or `--masked` must be given, and not both")
    if source is not None and select:
        raise UsageError(f"`--{next(iter(select)).replace('_', '-')}` selects from --scores, got --masked")
    before = count_parameters(model)
    masks = None if source is not None else ImportanceScores.load(options["scores"]).select(**select)
    if source is not None:
        model = load(source, model)
    small = shrink(model, masks, options["example_inputs"])
    save(small, target)
    after = count_parameters(small)
    if arguments.json:
        _print_json({"parameters": {"before": before, "after": after}, "output": str(target)})
    else:
        print(f"{after:,} of {before:,} parameters are left, written to {target}")
    return FINE


def compare_command(arguments: argparse.Namespace) -> int:
    """Print two models side by side, and fail where the second is not accurate or fast enough."""
    options = read_options(arguments, required=("dense", "compressed", "loader"))
    dense, drop, least = (
        check_model(options["dense"], "dense"),
        options.get("max_accuracy_drop"),
        options.get("min_speedup"),
    )
    example = options.get("example_inputs")
    if example is None:
        batch = next(iterate_batches(options["loader"], model_device(dense)))
        example = batch.kwargs or batch.args
    comparison = compare(
        dense,
        _compressed(options["compressed"], dense),
        options["loader"],
        example_inputs=example,
        loss_fn=options.get("loss_fn"),
        output_transform=options.get("output_transform"),
    )
    if arguments.json:
        _print_json(comparison.to_dict())
    else:
        print(comparison)
    lost = comparison.dense.accuracy - comparison.compressed.accuracy
    code = FINE
    if drop is not None and not lost <= drop:
        _complain(f"`--max-accuracy-drop` {drop:g} is not met: the accuracy fell by {lost:.4f}")
        code = FAILED
    if least is not None and not comparison.speedup >= least:
        _complain(f"`--min-speedup` {least:g} is not met: the speed-up is {comparison.speedup:.2f}")
        code = FAILED
    return code


def _compressed(given: str, dense: nn.Module) -> nn.Module:
    if Path(given).is_file():
        return load(given, copy.deepcopy(dense))
    if ":" not in given:
        raise UsageError(f"`--compressed` must be a file, or package.module:factory, got {given!r}")
    return read_option("model", given, " of --compressed")


def report_command(arguments: argparse.Namespace) -> int:
    """Write the page of a compression from what it left in a folder."""
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UsageError(f"`folder` must be one that compress wrote, got '{folder}'")
    target = _check_file(arguments.output or folder / "report.html")
    report(folder, target, checkpoint_dir=arguments.checkpoint_dir, title=arguments.title)
    print(f"written to {target}")
    return FINE
