"""Gradients of each sample by itself, from one backward of the batch where layers allow it.

The gradient of a Linear's weight for one sample is the product of its output's gradient and its input, summed
over positions; a Conv2d is the same over unfolded patches. Where anything else is scored, or a layer's
samples cannot be told apart in its input, every sample gets a backward of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import Batch
from ..granularity import weight_of
from ..layers import has_forward_hooks, is_plain
from .calibration import Calibration, Part

# Elements of the per-sample gradients, or of the patches, that are held at a time: 32 MB in float64.
_CHUNK = 1 << 22
# Two ways to the same float32 gradient differ in the order of their sums alone.
_TOLERANCE = 1e-3


class _Calls:
    """What went into a layer and the gradient of what came out, for each of its calls in one forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor | None] = []

    def record(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Keep the input, and the output's gradient once there is one: a forward hook."""
        index = len(self.inputs)
        self.inputs.append(args[0].detach())
        self.gradients.append(None)
        if not output.requires_grad:
            return

        # A hook of the tensor sees the gradient of this value, also where a later module overwrites it.
        def keep(gradient: Tensor) -> None:
            self.gradients[index] = gradient.detach()

        output.register_hook(keep)

    def reached(self) -> list[tuple[Tensor, Tensor]]:
        """Return input and output gradient of the calls that the loss depends on."""
        pairs = zip(self.inputs, self.gradients, strict=True)
        return [(value, gradient) for value, gradient in pairs if gradient is not None]


class SampleGradients:
    """Gradients of each sample's loss for each part of each layer.

    Example:
        >>> engine = SampleGradients(calibration)
        >>> for batch in calibration.batches():
        ...     for name, index, gradients in engine.of(batch):     # [samples, *parameter.shape]
        ...         squares[name][index] += gradients.square().sum(0)

    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.served = {
            (id(part.module), part.parameter)
            for name in calibration.layers
            for part in calibration.parts(name)
            if _is_served(part)
        }
        self.one_by_one = any(
            (id(part.module), part.parameter) not in self.served
            for name in calibration.layers
            for part in calibration.parts(name)
        )
        self.verified = False

    def of(self, batch: Batch) -> Iterator[tuple[str, int, int, Tensor]]:
        """Yield layer, index of the part, first sample, and the gradients of some samples, in float64."""
        calls = self._calls(batch)
        if calls is None:
            yield from self._each(batch)
            return
        for name in self.calibration.layers:
            for index, part in enumerate(self.calibration.parts(name)):
                size = max(part.tensor.numel(), _patch_elements(part, calls[id(part.module)]))
                step = max(1, _CHUNK // max(1, size))
                for begin in range(0, batch.size, step):
                    end = min(begin + step, batch.size)
                    yield name, index, begin, _gradients(part, calls[id(part.module)], begin, end)

    def squares(self, batch: Batch) -> Iterator[tuple[str, int, Tensor]]:
        """Yield layer, index of the part, and sums of squared gradients over some samples, in float64."""
        calls = self._calls(batch)
        if calls is None:
            for name, index, _, gradients in self._each(batch):
                yield name, index, gradients.square_().sum(0)
            return
        for name in self.calibration.layers:
            for index, part in enumerate(self.calibration.parts(name)):
                recorded = calls[id(part.module)]
                pairs = recorded.reached()
                if _is_weight_of_linear(part) and len(pairs) == 1 and pairs[0][0].dim() == 2:
                    value, gradient = (tensor.double().square() for tensor in pairs[0])
                    yield name, index, gradient.T @ value
                    continue
                step = max(1, _CHUNK // max(1, part.tensor.numel(), _patch_elements(part, recorded)))
                for begin in range(0, batch.size, step):
                    end = min(begin + step, batch.size)
                    yield name, index, _gradients(part, recorded, begin, end).square_().sum(0)

    def _each(self, batch: Batch) -> Iterator[tuple[str, int, int, Tensor]]:
        for sample in range(batch.size):
            gradients, _ = self.calibration.gradients(batch.samples(sample, sample + 1))
            for name, layer in gradients.items():
                for index, gradient in enumerate(layer):
                    yield name, index, sample, gradient.double()[None]

    def _calls(self, batch: Batch) -> dict[int, _Calls] | None:
        """What one forward and backward of the batch show, None where samples have to run one by one."""
        if self.one_by_one or batch.size == 1:
            return None
        before = self.calibration.loss_sum, self.calibration.total_weight
        modules = {
            id(part.module): part.module
            for name in self.calibration.layers
            for part in self.calibration.parts(name)
        }
        calls = {key: _Calls(module) for key, module in modules.items()}
        with contextlib.ExitStack() as undo:
            for recorded in calls.values():
                undo.callback(recorded.module.register_forward_hook(recorded.record).remove)
            gradients, _ = self.calibration.gradients(batch)
        if self._tells_samples_apart(batch, calls, gradients):
            return calls
        self.one_by_one = True
        self.calibration.loss_sum, self.calibration.total_weight = before
        return None

    def _tells_samples_apart(
        self, batch: Batch, calls: dict[int, _Calls], gradients: dict[str, list[Tensor]]
    ) -> bool:
        """Whether the recorded calls make up the gradient of the batch, and on the first batch that of a
        sample by itself: a weight may be read outside its layer, and a sequence may come before the samples.
        """  # noqa: D205
        for recorded in calls.values():
            if any(len(tensor) != batch.size for tensor in recorded.inputs if tensor.dim()):
                return False
            if any(
                value.dim() < 2 or gradient.dim() != value.dim() for value, gradient in recorded.reached()
            ):
                return False
        alone = None
        if not self.verified:
            before = self.calibration.loss_sum, self.calibration.total_weight
            alone, _ = self.calibration.gradients(batch.samples(batch.size - 1, batch.size))
            self.calibration.loss_sum, self.calibration.total_weight = before
        for name, layer in gradients.items():
            for index, (part, gradient) in enumerate(zip(self.calibration.parts(name), layer, strict=True)):
                recorded = calls[id(part.module)]
                if not _close(_total(part, recorded), gradient, part.mask):
                    return False
                if alone is not None:
                    last = _gradients(part, recorded, batch.size - 1, batch.size)[0]
                    if not _close(last, alone[name][index], part.mask):
                        return False
        self.verified = True
        return True


def _close(found: Tensor, expected: Tensor, mask: Tensor | None) -> bool:
    if mask is not None:
        found = torch.where(mask, found, 0.0)
    expected = expected.double()
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm() + 1e-30)


def _is_served(part: Part) -> bool:
    module, parameter = part.module, part.parameter
    if parameter not in ("weight", "bias"):
        return False
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return is_plain(module)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return module.running_mean is not None and not has_forward_hooks(module)
    return False


def _is_weight_of_linear(part: Part) -> bool:
    return isinstance(part.module, nn.Linear) and part.parameter == "weight"


def _patch_elements(part: Part, calls: _Calls) -> int:
    """Elements of one sample's patches."""
    if not isinstance(part.module, nn.Conv2d) or part.parameter != "weight":
        return 0
    taps = weight_of(part.module).shape[2:].numel()
    return sum(value.shape[1] * taps * gradient.shape[2:].numel() for value, gradient in calls.reached())


def unfold(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Return what each output position of a convolution sees, ``[samples, groups, taps * in, positions]``.

    Rows of a group are in the order of the weight, ``[in / groups, kh, kw]``.

    Example:
        >>> unfold(nn.Conv2d(4, 6, 3, groups=2), torch.randn(8, 4, 5, 5)).shape
        torch.Size([8, 2, 18, 9])

    Args:
        module: the convolution, with any kind of padding.
        images: ``[samples, in, height, width]``.

    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(images, module._reversed_padding_repeated_twice, mode=mode)
    kernel = weight_of(module).shape[2:]
    patches = F.unfold(padded, kernel, dilation=module.dilation, stride=module.stride)
    return patches.unflatten(1, (module.groups, -1))


def _gradients(part: Part, calls: _Calls, begin: int, end: int) -> Tensor:
    """Gradients of a parameter for samples [begin, end), ``[samples, *parameter.shape]`` in float64."""
    shape = part.tensor.shape
    total = torch.zeros(end - begin, *shape, dtype=torch.float64, device=part.tensor.device)
    for values, output_gradients in calls.reached():
        value, gradient = values[begin:end], output_gradients[begin:end].double()
        if isinstance(part.module, nn.Linear):
            gradient = gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]
            if part.parameter == "bias":
                total += gradient.sum(1)
                continue
            value = value.flatten(1, -2) if value.dim() > 2 else value[:, None]
            total += gradient.transpose(1, 2) @ value.double()
            continue
        if isinstance(part.module, nn.Conv2d) and part.parameter == "weight":
            patches = unfold(part.module, value).double()
            gradient = gradient.flatten(2).unflatten(1, (part.module.groups, -1))
            total += (gradient @ patches.transpose(2, 3)).reshape(total.shape)
            continue
        gradient = gradient.reshape(*gradient.shape[:2], -1)
        if part.parameter == "weight":
            gradient = gradient * _normalised(part.module, value).reshape(gradient.shape)
        total += gradient.sum(2)
    return total


def _normalised(norm: nn.Module, value: Tensor) -> Tensor:
    """What a batch norm in eval mode multiplies by its weight."""
    channels = (1, -1, *[1] * (value.dim() - 2))
    mean, variance = (getattr(norm, key).double().view(channels) for key in ("running_mean", "running_var"))
    return (value.double() - mean) / (variance + norm.eps).sqrt()


def _total(part: Part, calls: _Calls) -> Tensor:
    """The gradient of a parameter over all samples."""
    samples = len(calls.inputs[0]) if calls.inputs else 0
    step = max(1, _CHUNK // max(1, part.tensor.numel(), _patch_elements(part, calls)))
    total = torch.zeros_like(part.tensor, dtype=torch.float64, requires_grad=False)
    if _is_weight_of_linear(part):
        for value, gradient in calls.reached():
            total += gradient.flatten(0, -2).double().T @ value.flatten(0, -2).double()
        return total
    for begin in range(0, samples, step):
        total += _gradients(part, calls, begin, min(begin + step, samples)).sum(0)
    return total
