"""Loss deltas of whole networks against the loop of masked forwards that a user would write: `make bench`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.importance import packed_layers, piece_changes
from harness import THREADS, measure, measure_once, threads
from models import ResNet18, load_minilm

Parameters = list[tuple[Tensor, Any]]


@torch.no_grad()
def masked_forwards(model: nn.Module, inputs: Any, targets: Tensor, pieces: Iterable[Parameters]) -> Tensor:
    """Return the loss deltas of pieces, each a list of parameters and what of them is masked."""
    run = functools.partial(model, **inputs) if isinstance(inputs, dict) else functools.partial(model, inputs)
    loss = F.cross_entropy(run(), targets).item()
    deltas = []
    for piece in pieces:
        before = [(tensor, index, tensor[index].clone()) for tensor, index in piece]
        for tensor, index, _ in before:
            tensor[index] = 0
        deltas.append(F.cross_entropy(run(), targets).item() - loss)
        for tensor, index, values in before:
            tensor[index] = values
    return torch.tensor(deltas, dtype=torch.float64)


def units(
    layer: nn.Module, *norms: nn.Module, group_size: int = 1, count: int | None = None
) -> Iterator[Parameters]:
    """The units of a layer, their channels of batch norms with them."""
    weight: Any = layer.weight
    for begin in range(0, len(weight) if count is None else count * group_size, group_size):
        rows = slice(begin, begin + group_size)
        tensors: list[Any] = [weight, layer.bias]
        tensors += [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
        yield [(tensor, rows) for tensor in tensors if tensor is not None]


def assert_exact(deltas: Tensor, wanted: Tensor, loss: float) -> None:
    """Raise unless deltas are within 1e-4 of what they should be plus 1e-6 of the loss."""
    error = (deltas - wanted).abs()
    assert bool((error <= 1e-4 * wanted.abs() + 1e-6 * loss).all()), float(error.max())


def mlp(in_features: int, hidden: int, classes: int, samples: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return model, torch.randn(samples, in_features), torch.randint(0, classes, (samples,))


def score(
    model: nn.Module, inputs: Any, targets: Tensor, granularity: fp.Granularity, include: Any = None
) -> Any:
    return fp.score(model, [(inputs, targets)], granularity=granularity, include=include, progress=False)


def check_in_double(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    pieces: Callable[[Any], Iterable[Parameters]],
    loop: bool = False,
    about: int = 40,
) -> Callable[[Tensor, Any], None]:
    """A check of some of the deltas against masked forwards in float64.

    Args:
        model: what is scored.
        inputs: a tensor, or a dict of keyword inputs.
        targets: class indices.
        pieces: the pieces of a copy of the model, in the order of the deltas.
        loop: whether the baseline gives the same deltas by masked forwards in float32, whose differences of
            mean losses are good to a millionth of the loss; all are compared with those.
        about: how many are checked, evenly spaced.

    """

    def check(deltas: Tensor, baseline: Any) -> None:
        if loop:
            torch.testing.assert_close(deltas, baseline, rtol=1e-2, atol=1e-5)
        double = copy.deepcopy(model).double()
        exact = inputs if isinstance(inputs, dict) else inputs.double()
        every = max(1, deltas.numel() // about)
        wanted = masked_forwards(double, exact, targets, list(pieces(double))[::every])
        with torch.no_grad():
            output = double(**exact) if isinstance(exact, dict) else double(exact)
        assert_exact(deltas.flatten()[::every], wanted, F.cross_entropy(output, targets).item())

    return check


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize(("in_features", "hidden", "samples"), [(64, 1024, 1000), (784, 512, 10_000)])
@pytest.mark.parametrize("against", ["a plain forward", "vmap of masks", "vmap of rank-1 updates"])
def bench_units(
    benchmark, in_features: int, hidden: int, samples: int, against: str, thread_count: int
) -> None:
    model, inputs, targets = mlp(in_features, hidden, 10, samples)

    @torch.no_grad()
    def forward() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    @torch.no_grad()
    def vmap_of_masks() -> Tensor:
        features = model[1](model[0](inputs))

        def masked(mask: Tensor) -> Tensor:
            return F.cross_entropy(model[2](features * mask), targets)

        return torch.vmap(masked, chunk_size=4)(1 - torch.eye(hidden))  # 1, 16 and 64 are slower

    @torch.no_grad()
    def vmap_of_updates() -> Tensor:
        features = model[1](model[0](inputs))
        logits = model[2](features)

        def masked(column: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(logits - column[:, None] * weight, targets)

        return torch.vmap(masked, chunk_size=16)(features.T, model[2].weight.T)

    baselines = {
        "a plain forward": forward,
        "vmap of masks": vmap_of_masks,
        "vmap of rank-1 updates": vmap_of_updates,
    }
    run = measure_once if against == "vmap of masks" else measure
    with threads(thread_count):
        run(
            benchmark,
            lambda: score(model, inputs, targets, fp.Unit(), "0")["0"],
            baselines[against],
            check=check_in_double(model, inputs, targets, lambda net: units(net[0])),
            group=f"{hidden} units of {in_features}-{hidden}-10, N = {samples}, against {against}, "
            f"{thread_count} threads (the loop is {hidden} forwards)",
        )


@pytest.mark.parametrize("thread_count", THREADS)
def bench_blocks(benchmark, thread_count: int) -> None:
    model, inputs, targets = mlp(784, 512, 10, 10_000)

    def blocks(net: nn.Sequential) -> Iterator[Parameters]:
        weight: Any = net[0].weight
        for row in range(0, 512, 16):
            for col in range(0, 784, 16):
                yield [(weight, (slice(row, row + 16), slice(col, col + 16)))]

    @torch.no_grad()
    def forward() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    with threads(thread_count):
        measure(
            benchmark,
            lambda: score(model, inputs, targets, fp.Block(16, 16), "0")["0"],
            forward,
            check=check_in_double(model, inputs, targets, blocks),
            group=f"1568 blocks of 784-512-10, N = 10000, against a plain forward, {thread_count} threads "
            "(the loop is 1568 forwards)",
        )


class SomeUnits(fp.Unit):
    """One of 64 filters of each layer: the whole loop over a ResNet-18 takes hours."""

    share = 64

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        return torch.Size([-(-weight_shape[0] // self.share)])


class MoreUnits(SomeUnits):
    """One of 32: the trace and its checks, which take as long either way, count for less."""

    share = 32


def resnet18() -> nn.Module:
    """A ResNet-18 for images of 32x32, its batch norms as after some training."""
    torch.manual_seed(0)
    model = ResNet18().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("thread_count", [2])
@pytest.mark.parametrize("granularity", [MoreUnits(), fp.InputUnit(), fp.Block(32, 32)], ids=str)
def bench_resnet18_against_whole_convolutions(benchmark, granularity, thread_count: int) -> None:
    """The same engine without the ops that compute changes of convolutions.

    Input units and blocks, of which there are thousands, are those of one layer of 128 channels.
    """
    model = resnet18()
    inputs, targets = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    include = nn.Conv2d if isinstance(granularity, fp.Unit) else "blocks.2.conv2"

    def ours() -> Tensor:
        scores = score(model, inputs, targets, granularity, include)
        return torch.cat([scores[name].flatten() for name in scores])

    def without() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed_layers, "find_chains", lambda traced, constants: [])
            patch.setattr(piece_changes, "has_conv_kernel", lambda output: False)
            return ours()

    with threads(thread_count):
        measure_once(
            benchmark,
            ours,
            without,
            check=functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6),
            group=f"{granularity} of a ResNet-18, 32x32, N = 32, against the engine with whole convolutions, "
            f"{thread_count} threads",
        )


@pytest.mark.parametrize("thread_count", [2])
def bench_resnet18_filters(benchmark, thread_count: int) -> None:
    model = resnet18()
    inputs, targets = torch.randn(256, 3, 32, 32), torch.randint(0, 10, (256,))
    norms = {"stem.0": "stem.1"}
    for block in range(8):
        norms |= {f"blocks.{block}.conv{n}": f"blocks.{block}.bn{n}" for n in (1, 2)}
        norms[f"blocks.{block}.shortcut.0"] = f"blocks.{block}.shortcut.1"
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]

    def filters(net: nn.Module) -> Iterator[Parameters]:
        for name in convolutions:
            convolution: Any = net.get_submodule(name)
            count = -(-convolution.out_channels // SomeUnits.share)
            yield from units(convolution, net.get_submodule(norms[name]), count=count)

    def ours() -> Tensor:
        scores = score(model, inputs, targets, SomeUnits(), nn.Conv2d)
        return torch.cat([scores[name] for name in convolutions])

    with threads(thread_count):
        measure_once(
            benchmark,
            ours,
            lambda: masked_forwards(model, inputs, targets, filters(model)),
            check=check_in_double(model, inputs, targets, filters, loop=True, about=10),
            group=f"one of {SomeUnits.share} filters of all convolutions of a ResNet-18, 32x32, N = 256, "
            f"against the loop, {thread_count} threads",
        )


@pytest.mark.parametrize("thread_count", [2])
def bench_minilm(benchmark, thread_count: int) -> None:
    torch.manual_seed(0)
    model = load_minilm(classes=4)
    inputs = {"input_ids": torch.randint(1000, 20_000, (64, 32))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    targets = torch.randint(0, 4, (64,))

    def pieces(net: nn.Module) -> Iterator[Parameters]:
        layers = [net.get_submodule(f"bert.encoder.layer.{layer}") for layer in range(6)]
        for layer in layers:
            for begin in range(0, 384, 32):
                yield [
                    (
                        layer.get_submodule("attention.output.dense").weight,
                        (slice(None), slice(begin, begin + 32)),
                    )
                ]  # type: ignore[list-item]
        for layer in layers:
            yield from units(layer.get_submodule("intermediate.dense"), group_size=32)

    def ours() -> Tensor:
        heads = score(model, inputs, targets, fp.Head(), "*attention.output.dense")
        blocks = score(model, inputs, targets, fp.Unit(group_size=32), "*intermediate.dense")
        return torch.cat([*heads.values(), *blocks.values()])

    with threads(thread_count):
        measure_once(
            benchmark,
            ours,
            lambda: masked_forwards(model, inputs, targets, pieces(model)),
            check=check_in_double(model, inputs, targets, pieces, loop=True, about=20),
            group="72 heads and 288 blocks of 32 feed-forward units of MiniLM, 64 sentences of 32 tokens, "
            f"against the loop, {thread_count} threads",
        )


def growth_cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, a call, and the same with twice the samples or pieces, for the fused and the suffix way."""
    for hidden, samples in ((256, 2000), (512, 2000), (1024, 2000), (512, 4000), (512, 8000)):
        once = mlp(256, hidden, 10, samples)
        more_pieces, more_samples = mlp(256, 2 * hidden, 10, samples), mlp(256, hidden, 10, 2 * samples)
        calls = [
            functools.partial(score, *case, fp.Unit(), "0") for case in (once, more_pieces, more_samples)
        ]
        yield f"{hidden} units, N = {samples}, twice the pieces", calls[0], calls[1]
        yield f"{hidden} units, N = {samples}, twice the samples", calls[0], calls[2]


@pytest.mark.parametrize("case", growth_cases(), ids=lambda case: case[0])
def bench_growth(benchmark, case: tuple[str, Callable[[], Any], Callable[[], Any]]) -> None:
    name, once, twice = case
    with threads(2):
        measure(
            benchmark,
            once,
            twice,
            check=lambda ours, theirs: None,
            group=f"growth: {name} (2 threads; 2.0 is linear)",
        )
