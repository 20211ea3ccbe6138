"""Whether a whole model is faster dense or sparse, and in which memory format its convolutions run best."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batches import Batch
from ..masks import piece_mask_of
from ..timing import WORTHWHILE, interleaved_medians
from .conv import BlockSparseConv2d
from .swapping import copy_of, swap_modules

# A converted model may be this much slower before the conversion is taken back: the noise of an
# interleaved median of 15 on a shared machine.
TOLERATED_SLOWDOWN = 1.03
FORMATS = (torch.contiguous_format, torch.channels_last)
# A large model is measured less often than 15 times, so that all candidates together take about as long.
_SECONDS = 10.0
_FEWEST, _MOST = 5, 15


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model runs: with block-sparse layers or without, its convolutions in which format."""

    sparse: bool
    memory_format: torch.memory_format


def format_of(model: nn.Module) -> torch.memory_format:
    """Return the format a model's convolutions run in: a channels-last weight makes those behind it do so."""
    for module in model.modules():
        if isinstance(module, BlockSparseConv2d):
            if module.channels_last:
                return torch.channels_last
        elif isinstance(module, nn.Conv2d) and is_channels_last(module.weight):
            return torch.channels_last
    return torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """Tell whether a tensor is in channels-last format and in no other."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def fastest_form(
    model: nn.Module, replacements: Mapping[str, nn.Module], batches: list[Batch], device: torch.device
) -> Form:
    """Return how a model runs fastest: with plain dense layers, or with replacements for some of them.

    Where convolutions are among these, both sides run in both memory formats, and each counts with its
    better one. Dense is the answer only if sparse is slower by more than noise, and then another format
    than the present one only if it is faster by more.
    """
    present = format_of(model)
    convolutions = any(isinstance(module, BlockSparseConv2d) for module in replacements.values())
    formats = FORMATS if convolutions else (present,)
    forms = [Form(sparse, memory_format) for memory_format in formats for sparse in (False, True)]
    seconds = dict(zip(forms, _medians(model, forms, replacements, batches, device), strict=True))

    def fastest(sparse: bool) -> Form:
        return min((form for form in forms if form.sparse is sparse), key=seconds.__getitem__)

    dense, sparse, unchanged = fastest(False), fastest(True), Form(False, present)
    if seconds[sparse] <= seconds[dense] * TOLERATED_SLOWDOWN:
        return sparse
    return dense if seconds[dense] < seconds[unchanged] * WORTHWHILE else unchanged


def use_format_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Bring the convolutions of a model into a memory format."""
    for module in model.modules():
        if isinstance(module, BlockSparseConv2d):
            module.channels_last = memory_format == torch.channels_last
        elif _has_plain_weight(module):
            module.weight.data = in_format(module.weight.data, memory_format)


def in_format(tensor: Any, memory_format: torch.memory_format) -> Tensor:
    """Return images, or the weight of a convolution, in a memory format; other tensors as they are."""
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _has_plain_weight(module: nn.Module) -> bool:
    """Tell whether a module is a convolution whose weight nothing but a mask makes."""
    return isinstance(module, nn.Conv2d) and (
        not parametrize.is_parametrized(module, "weight") or piece_mask_of(module) is not None
    )


def _modules(model: nn.Module, form: Form, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What goes into a model to bring it into a form."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        new = replacements[name] if form.sparse and name in replacements else module
        if isinstance(new, BlockSparseConv2d):
            modules[name] = copy_of(new, channels_last=form.memory_format == torch.channels_last)
        elif new is not module:
            modules[name] = new
        elif _has_plain_weight(module):
            modules[name] = copy_of(module, weight=in_format(module.weight, form.memory_format))
        elif name in replacements:
            modules[name] = copy_of(module)
    return modules


def _medians(
    model: nn.Module,
    forms: list[Form],
    replacements: Mapping[str, nn.Module],
    batches: list[Batch],
    device: torch.device,
) -> list[float]:
    """Return the median seconds of a model in each form, all measured in turn."""
    candidates = [_modules(model, form, replacements) for form in forms]
    times: list[list[float]] = [[] for _ in forms]
    repeats = _MOST
    while len(times[-1]) < repeats:
        for modules, seconds in zip(candidates, times, strict=True):
            revert = swap_modules(model, modules)
            try:
                seconds += interleaved_medians(
                    [lambda: [batch.call(model) for batch in batches]], repeats=1, warmup=1, device=device
                )
            finally:
                revert()
        round_seconds = 2 * sum(seconds[0] for seconds in times)  # with the warm-up
        repeats = min(_MOST, max(_FEWEST, int(_SECONDS / round_seconds)))
    return [statistics.median(seconds) for seconds in times]
