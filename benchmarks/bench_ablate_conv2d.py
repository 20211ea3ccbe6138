"""What changes make of a convolution's output, against what torch offers for it: `make bench`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune import ops
from harness import THREADS, measure, threads

# Images, channels and height of the 3x3 convolutions of a ResNet-18 for images of 32x32.
LAYERS = [(32, 64, 32), (32, 128, 16), (32, 256, 8), (32, 512, 4)]
PADDING = (1, 1, 1, 1)


def make_layer(images: int, channels: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input and weight, all channels-last."""
    torch.manual_seed(0)
    input = torch.randn(images, channels, height, height).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).mul_((9 * channels) ** -0.5)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(input, weight, padding=1), input, weight


def assert_close(ours: Tensor, baseline: Tensor) -> None:
    """Raise unless two results are the same up to rounding."""
    torch.testing.assert_close(ours, baseline, rtol=1e-3, atol=1e-3)


def input_channels(channels: int) -> Tensor:
    """Some of the channels, each in all taps."""
    return torch.tensor([(c, c + 1, 0, 9) for c in range(0, channels, channels // 8)], dtype=torch.int32)


def blocks(channels: int) -> Tensor:
    """Some blocks of 16 channels of one tap."""
    return torch.tensor([(0, 16, tap, tap + 1) for tap in range(9)], dtype=torch.int32)


def by_convolutions(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    """One convolution for each piece; of one tap, one of 1x1."""
    padded = F.pad(input, PADDING)
    height, width = output.shape[2:]
    masked = []
    for first, last, tap, last_tap in pieces.tolist():
        part = weight[:, first:last]
        if last_tap - tap == 9:
            masked.append(output - F.conv2d(input[:, first:last], part, padding=1))
        else:
            top, left = divmod(tap, 3)
            seen = padded[:, first:last, top : top + height, left : left + width]
            masked.append(output - F.conv2d(seen, part[:, :, top, left, None, None]))
    return torch.stack(masked)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kind", ["input channels", "blocks"])
def bench_ablate_conv2d(benchmark, kind: str, layer: tuple[int, int, int], thread_count: int) -> None:
    output, input, weight = make_layer(*layer)
    pieces = input_channels(layer[1])
    if kind == "blocks":
        output, weight, pieces = output[:, :16], weight[:16], blocks(layer[1])
    with threads(thread_count), torch.no_grad():
        measure(
            benchmark,
            lambda: ops.ablate_conv2d(output, input, weight, pieces, padding=PADDING),
            lambda: by_convolutions(output, input, weight, pieces),
            check=assert_close,
            group=f"ablate_conv2d: {kind}, {layer}, {thread_count} threads",
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("changed", ["one channel", "all channels"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def bench_chain(
    benchmark, residual: bool, changed: str, layer: tuple[int, int, int], thread_count: int
) -> None:
    """A convolution, a batch norm, a sum and an activation after a change, as a suffix has them."""
    output, input, weight = make_layer(*layer)
    channels = layer[1]
    mean, variance = output.mean((0, 2, 3)), output.var((0, 2, 3))
    addend, new_addend = torch.randn_like(output), torch.randn_like(output)
    known = F.batch_norm(output, mean, variance) + addend
    scaled = weight * (variance + 1e-5).rsqrt()[:, None, None, None]
    new_input = torch.randn_like(input)
    new_channel, transformed = new_input[:, 5:6], ops.winograd_weight(scaled)
    piece = torch.tensor([(0, 1, 0, 9)], dtype=torch.int32)

    def after(convolved: Tensor) -> Tensor:
        normed = F.batch_norm(convolved, mean, variance)
        return F.relu(normed + (new_addend if residual else addend))

    def ours() -> Tensor:
        if changed == "all channels":
            addends = (addend, new_addend) if residual else ()
            return ops.updated_conv2d(
                known, input, new_input, transformed, *addends, padding=PADDING, activation="relu"
            )
        change = input[:, 5:6] - new_channel
        options = {"padding": PADDING, "activation": "relu"}
        return ops.ablate_conv2d(known, change, scaled[:, 5:6], piece, **options)[0]

    def by_torch() -> Tensor:
        if changed == "all channels":
            return after(F.conv2d(new_input, weight, padding=1))
        return after(output + F.conv2d(new_channel - input[:, 5:6], weight[:, 5:6], padding=1))

    if changed == "one channel" and residual:
        pytest.skip("where few channels of the input change, the other summand does not")
    with threads(thread_count), torch.no_grad():
        measure(
            benchmark,
            ours,
            by_torch,
            check=assert_close,
            group=f"a chain after a change of {changed}, {layer}, {thread_count} threads"
            + (", with a changed summand" if residual else ""),
            flops=2.0 * 9 * channels * output.numel() if changed == "all channels" else None,
        )
