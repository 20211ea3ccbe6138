"""The demo: train an MLP on real data, compress it to 75 % and 90 %, and print what that changed."""

from __future__ import annotations

import copy
import gzip
import json
import math
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from ._library import cpu_isa
from .compress import compress
from .granularity import Block
from .metrics import Comparison, compare, converted_layers
from .modules import BlockSparseLinear, explain
from .serialization import save
from .timing import interleaved_medians

CLASSES = 10
HIDDEN_FEATURES = 1024
SPARSITIES = (0.75, 0.9)
BATCH_SIZES = (1, 256)
ROUNDS = 5
SCORED_SAMPLES = 128


class Data(NamedTuple):
    """Inputs ``[samples, features]`` in [0, 1] and int64 labels."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def load_digits_data() -> Data:
    """Return the 1,797 handwritten digits (8 x 8) that scikit-learn ships: 1,437 train, 360 test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo's digits come with scikit-learn: pip install 'fastprune[demo]'"
        ) from error
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Data(inputs[train], labels[train], inputs[test], labels[test])


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    Source: the format's description on the MNIST page: two zero bytes, a type (8: unsigned byte), the
    number of dimensions, the sizes as big-endian 32-bit integers, the data.

    Raises:
        ValueError: the file is none, or truncated.

    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path.name} is no whole gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path.name} is no IDX file of unsigned bytes")
    dimensions = data[3]
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise ValueError(f"{path.name} is truncated")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise ValueError(f"{path.name} must hold {shape} bytes after its header, got {len(data) - header}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def load_idx_data(folder: Path | None) -> Data:
    """Return a data set in MNIST's four IDX files, gzipped or not."""
    if folder is None:
        raise ValueError("`--data fashion-mnist` needs `--data-dir`, the folder of its IDX files")

    def read(stem: str, dimensions: int) -> Tensor:
        for name in (stem, f"{stem}.gz"):
            if (folder / name).is_file():
                array = read_idx(folder / name)
                if array.ndim != dimensions or not len(array):
                    raise ValueError(f"{name} must have {dimensions} dimensions, got shape {array.shape}")
                return torch.from_numpy(array.copy())
        raise FileNotFoundError(f"`--data-dir` must hold {stem} or {stem}.gz, {folder} does not")

    def part(prefix: str) -> tuple[Tensor, Tensor]:
        images, labels = read(f"{prefix}-images-idx3-ubyte", 3), read(f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels) or int(labels.max()) >= CLASSES:
            raise ValueError(f"{prefix}-labels-idx1-ubyte must hold {len(images)} labels below {CLASSES}")
        return images.flatten(1).float() / 255.0, labels.long()

    data = Data(*part("train"), *part("t10k"))
    if data.train_inputs.shape[1] != data.test_inputs.shape[1]:
        raise ValueError("`--data-dir` must hold training and test images of the same size")
    return data


def make_model(in_features: int, classes: int = CLASSES) -> nn.Sequential:
    """Return an untrained MLP with two hidden layers of 1024."""
    return nn.Sequential(
        nn.Linear(in_features, HIDDEN_FEATURES),
        nn.ReLU(),
        nn.Linear(HIDDEN_FEATURES, HIDDEN_FEATURES),
        nn.ReLU(),
        nn.Linear(HIDDEN_FEATURES, classes),
    )


def train(model: nn.Module, loader: DataLoader, epochs: int, *, progress: bool) -> None:
    """Train a classifier with AdamW and a cosine learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for epoch in tqdm(range(epochs), desc="train", unit="epoch", disable=not progress):
        del epoch
        for inputs, labels in loader:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def layer_speedup(layer: BlockSparseLinear, batch_size: int) -> float:
    """Return torch's dense Linear time over a layer's, interleaved, after checking that they agree."""
    dense = layer.to_dense()
    inputs = torch.randn(batch_size, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), dense(inputs), rtol=1e-4, atol=1e-4)
        dense_seconds, sparse_seconds = interleaved_medians(
            [lambda: dense(inputs), lambda: layer(inputs)], repeats=25, warmup=3, minimum_seconds=2e-3
        )
    return dense_seconds / sparse_seconds


def bytes_on_disk(model: nn.Module) -> int:
    """Return the size of the file that :func:`save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        return path.stat().st_size


def _measure(teacher: nn.Module, model: nn.Module, loader: DataLoader, test: Tensor) -> dict[str, Any]:
    """All figures of one compressed model beside the dense one."""
    comparisons: dict[int, Comparison] = {
        size: compare(teacher, model, loader, example_inputs=test[:size]) for size in BATCH_SIZES
    }
    return {
        "comparison": {str(size): comparison.to_dict() for size, comparison in comparisons.items()},
        "bytes_on_disk": {"dense": bytes_on_disk(teacher), "compressed": bytes_on_disk(model)},
        "layers": {
            name: {
                "shape": [layer.out_features, layer.in_features],
                "density": layer.density,
                "speedup": {str(size): layer_speedup(layer, size) for size in BATCH_SIZES},
            }
            for name, layer in converted_layers(model).items()
            if isinstance(layer, BlockSparseLinear)
        },
    }


def _table(results: dict[float, dict[str, Any]]) -> str:
    """One column for the dense model, one for each sparsity."""
    first = next(iter(results.values()))
    largest = str(BATCH_SIZES[-1])

    def row(name: str, dense: str, compressed: list[str]) -> str:
        return f"{name:<30}{dense:>16}" + "".join(f"{value:>18}" for value in compressed)

    def figures(kind: str, result: dict[str, Any], size: str = largest) -> dict[str, Any]:
        return result["comparison"][size][kind]

    def line(name: str, key: str, form: str) -> str:
        return row(
            name,
            form.format(figures("dense", first)[key]),
            [form.format(figures("compressed", result)[key]) for result in results.values()],
        )

    lines = [
        row("", "dense", [f"{sparsity:.0%} pruned" for sparsity in results]),
        line("accuracy", "accuracy", "{:.2%}"),
        row(
            "pruning rate",
            "-",
            [f"{result['comparison'][largest]['pruning_rate']:.1%}" for result in results.values()],
        ),
        line("parameters", "parameters", "{:,}"),
        row(
            "bytes on disk",
            f"{first['bytes_on_disk']['dense']:,}",
            [f"{result['bytes_on_disk']['compressed']:,}" for result in results.values()],
        ),
        line(f"FLOPs, batch {largest}", "flops", "{:,}"),
    ]
    for size in map(str, BATCH_SIZES):
        lines.append(
            row(
                f"latency, batch {size}",
                f"{figures('dense', first, size)['latency_seconds'] * 1e6:.0f} us",
                [
                    f"{figures('compressed', result, size)['latency_seconds'] * 1e6:.0f} us "
                    f"({result['comparison'][size]['speedup']:.2f}x)"
                    for result in results.values()
                ],
            )
        )
    names = {name: layer["shape"] for result in results.values() for name, layer in result["layers"].items()}
    for name, (out_features, in_features) in names.items():
        for size in map(str, BATCH_SIZES):
            speedups = [
                f"{result['layers'][name]['speedup'][size]:.2f}x" if name in result["layers"] else "dense"
                for result in results.values()
            ]
            lines.append(row(f"layer {name} {out_features}x{in_features}, batch {size}", "1.00x", speedups))
    return "\n".join(lines)


def run(data_name: str, data_dir: Path | None, json_path: Path | None, *, progress: bool) -> int:
    """Run the demo and return 0.

    Args:
        data_name: "digits" or "fashion-mnist".
        data_dir: folder of the IDX files.
        json_path: where every figure is written, or None.
        progress: whether progress bars are shown.

    """
    if json_path is not None and not json_path.parent.is_dir():
        raise FileNotFoundError(f"`--json` must be in a folder that exists, got {json_path}")
    data = load_digits_data() if data_name == "digits" else load_idx_data(data_dir)
    torch.manual_seed(0)
    train_set = TensorDataset(data.train_inputs, data.train_labels)
    train_loader = DataLoader(train_set, batch_size=64 if data_name == "digits" else 256, shuffle=True)
    test_loader = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=512)
    model = make_model(data.train_inputs.shape[1])
    train(model, train_loader, epochs=15 if data_name == "digits" else 5, progress=progress)

    example = data.test_inputs[: BATCH_SIZES[-1]]
    results: dict[float, dict[str, Any]] = {}
    for sparsity in SPARSITIES:
        result = compress(
            copy.deepcopy(model),
            train_loader,
            test_loader,
            sparsity=sparsity,
            rounds=ROUNDS,
            epochs=4 if data_name == "digits" else 1,
            granularity=Block(16, 16),
            criterion="loss_delta",
            max_samples=SCORED_SAMPLES,
            example_inputs=example,
            progress=progress,
        )
        results[sparsity] = _measure(model, result.model, test_loader, data.test_inputs)
        results[sparsity]["history"] = result.history
        print(f"\nlayers at {sparsity:.0%}, measured at batch {len(example)}:\n{explain(result.model)}")

    print(
        f"\n{data_name}: {len(data.train_labels)} training and {len(data.test_labels)} test samples; "
        f"blocks of 16x16 scored by exact loss deltas on {SCORED_SAMPLES} samples; "
        f"{torch.get_num_threads()} threads, {cpu_isa()}, torch {torch.__version__}\n"
    )
    print(_table(results))
    if json_path is not None:
        figures = {
            "data": data_name,
            "threads": torch.get_num_threads(),
            "cpu_isa": cpu_isa(),
            "torch": torch.__version__,
            "results": {str(sparsity): result for sparsity, result in results.items()},
        }
        json_path.write_text(json.dumps(figures, indent=1))
        print(f"\nfigures written to {json_path}")
    return 0
