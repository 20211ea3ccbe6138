"""Whether a shrunk model gives what the masked one gives: on the example inputs, and on others like them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..batches import Batch, keep_generators
from .dependencies import output_tensors
from .skipping import without_layers

_SAMPLES = 2  # float64 convolutions are slow, and every position of an image or text counts
# Of the largest output: rounding is far below it, and what a cut channel did is far above.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Verification:
    """The outputs of a masked model, in float64, which those of a shrunk one are compared with.

    In float64 a difference is either rounding, or what a channel did that should not have been cut.
    A model that does not run in float64 is compared in its own dtype.

    Args:
        masked: without parametrizations; it is not changed.
        skipped: names of the layers that are masked whole.
        batches: example inputs, of which a few samples are taken. The first is tried again with random values
            in its place, so that a channel that happens to be constant on it is not taken for one that is.
        layers: Linear and Conv2d layers whose constant inputs are looked for.

    Attributes:
        constants: layer name to bool and float64 tensors, ``[inputs]``: which inputs of a layer never change,
            and their values; layers that are never called are missing.

    """

    def __init__(
        self, masked: nn.Module, skipped: list[str], batches: list[Batch], layers: Iterable[str] = ()
    ) -> None:
        self.batches: list[Batch] = []
        self.expected: list[list[Tensor]] = []
        self.constants: dict[str, tuple[Tensor, Tensor]] = {}
        layers = list(layers)
        try:
            self._run(masked, skipped, batches, layers, torch.float64)
        except Exception:  # a model may insist on its dtype in any way
            self._run(masked, skipped, batches, layers, torch.float32)

    def _run(
        self,
        masked: nn.Module,
        skipped: list[str],
        batches: list[Batch],
        layers: list[str],
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.batches, self.expected = dtype, [], []
        twin = self.prepared(masked)
        batches = [_to_double(batch) if dtype == torch.float64 else batch for batch in batches]
        ranges = _watch_inputs(twin, layers)
        with without_layers(twin, skipped):
            for batch in batches:
                few = _head(batch)
                try:
                    self._add(few, self._outputs(twin, few))
                except Exception:
                    if few is batch:
                        raise
                    self._add(batch, self._outputs(twin, batch))  # its samples were no samples
            random = _random_like(self.batches[0])
            with contextlib.suppress(Exception):  # random values may be out of a model's range
                self._add(random, self._outputs(twin, random))
        self.constants = {
            name: ((high - low).abs() <= 1e-12 * low.abs().clamp(min=1.0), low)
            for name, (low, high) in ranges.items()
        }

    def _add(self, batch: Batch, outputs: list[Tensor]) -> None:
        self.batches.append(batch)
        self.expected.append(outputs)

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return a copy in eval mode whose parameters require gradients, in the dtype of the comparison."""
        twin = copy.deepcopy(model).eval().requires_grad_(True)
        return twin.double() if self.dtype == torch.float64 else twin

    def _outputs(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        # With gradients, so that torch's encoder layers call their layers.
        with keep_generators(), torch.enable_grad():
            torch.manual_seed(0)
            outputs = output_tensors(batch.fresh().call(model))
        return [output.detach() for output in outputs]

    def difference(self, twin: nn.Module) -> str | None:
        """Return what tells a :meth:`prepared` model that was cut from the masked one, or None."""
        for batch, expected in zip(self.batches, self.expected, strict=True):
            try:
                outputs = self._outputs(twin, batch)
            except Exception as error:  # shapes that no longer fit
                return f"it no longer runs ({type(error).__name__}: {error})"
            if [output.shape for output in outputs] != [tensor.shape for tensor in expected]:
                return "its outputs have other shapes"
            for output, tensor in zip(outputs, expected, strict=True):
                if not _agree(output, tensor, _TOLERANCE[self.dtype]):
                    return "its outputs differ"
        return None


def _watch_inputs(model: nn.Module, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the lowest and highest value of each input of some layers, filled as the model runs."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, channels: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = (*args, *kwargs.values())[0].detach()
        flat = inputs.movedim(channels, 0).flatten(1).double()
        low, high = flat.amin(1), flat.amax(1)
        if name in ranges:
            low, high = torch.minimum(ranges[name][0], low), torch.maximum(ranges[name][1], high)
        ranges[name] = (low, high)

    for name in layers:
        module = model.get_submodule(name)
        hook = functools.partial(record, name, -1 if isinstance(module, nn.Linear) else 1)
        module.register_forward_pre_hook(hook, with_kwargs=True)
    return ranges


def calls_of(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Return how often each module with parameters of its own is called by one forward, with gradients."""
    calls: dict[str, int] = {}
    handles = []

    def count(name: str) -> Any:
        calls[name] = 0

        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(count(name)))
    try:
        with keep_generators(), torch.enable_grad():
            batch.fresh().call(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _agree(output: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.is_floating_point():
        return torch.equal(output, expected)
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(output, expected, rtol=0.0, atol=tolerance * max(largest, 1e-3), equal_nan=True)


def _to_double(batch: Batch) -> Batch:
    def convert(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(Tensor, convert, (batch.args, batch.kwargs))
    return batch._replace(args=args, kwargs=kwargs)


def _head(batch: Batch) -> Batch:
    """The first samples of a batch of which nobody said how many there are."""
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor)]
    size = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 0)
    return batch._replace(size=size).head(_SAMPLES) if size > _SAMPLES else batch


def _random_like(batch: Batch) -> Batch:
    """A batch with normal values in the place of floats, and the integers of each tensor shuffled."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            if not bool(tensor.isfinite().all()):  # a mask that is added to scores
                return tensor
            deviation, mean = float(tensor.double().std(correction=0)) or 1.0, float(tensor.double().mean())
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return (noise * deviation + mean).to(tensor)
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].view(tensor.shape)

    args, kwargs = tree_map_only(Tensor, draw, (batch.args, batch.kwargs))
    return batch._replace(args=args, kwargs=kwargs)
