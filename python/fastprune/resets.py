"""Other ends for a removed piece than zeros: new random weights, or the mean of its neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .granularity import (
    Block,
    Element,
    Granularity,
    Head,
    InputUnit,
    Unit,
    is_scorable,
    weight_as_taps,
    weight_from_taps,
)
from .masks import Masks, mask_targets

VALUES = ("zero", "random", "mean")


def check_values(values: str, name: str = "values") -> None:
    """Raise ValueError unless a removed piece can be filled with such values."""
    if values not in VALUES:
        raise ValueError(f"`{name}` must be 'zero', 'random' or 'mean', got {values!r}")


@torch.no_grad()
def reset_pieces_(
    model: nn.Module,
    masks: Masks,
    *,
    values: str = "random",
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> nn.Module:
    """Overwrite the weights of the pieces that masks drop, in place, and return the model; no mask is put on.

    The pieces go on learning from their new weights. Units take their bias and batch-norm channel along.

    Example:
        >>> weakest = scores.select(sparsity=0.1)
        >>> fp.reset_pieces_(model, weakest, values="random", optimizer=optimizer)

    Args:
        model: whose weights are changed, also under masks that it has.
        masks: False for the pieces to overwrite.
        values: "zero"; "random": weights and biases from U(-k, k), ``k = fan_in^(-1/2)``, with which torch
            initialises Linear and Conv2d, and fresh batch-norm channels (1 and 0); "mean": the mean over the
            neighbouring pieces that stay, weight by weight: the blocks above, below, left and right within a
            kernel tap, the units, inputs or heads before and after; 0 where none stays. Other parameters than
            weights of Linear and Conv2d layers and what belongs to units have no neighbours.
        optimizer: whose state for these weights, such as momentum, is set to 0.
        seed: of the random weights.

    Raises:
        TypeError: ``masks`` are no Masks.
        ValueError: the masks are of another model, ``values`` is out of range, or the pieces have no
            neighbours.

    """
    check_values(values)
    if values == "mean":
        for name in masks:
            _strides(masks.granularity_of(name))
    names = {id(module): name for name, module in model.named_modules()}
    generator = torch.Generator().manual_seed(seed)
    for module, parameter, keep in mask_targets(model, masks):
        tensor = trained_tensor(module, parameter)
        keep = keep.to(tensor.device)
        if values == "zero":
            new = torch.zeros_like(tensor)
        elif values == "random":
            new = _fresh(module, parameter, tensor, generator)
        else:
            new = _neighbours_mean(tensor, keep, masks.granularity_of(names[id(module)]))
        overwrite(tensor, ~keep, new, optimizer)
    return model


def trained_tensor(module: nn.Module, parameter: str) -> Tensor:
    """Return the tensor that an optimiser holds: the parameter, or what lies under its parametrizations.

    Raises:
        ValueError: the parameter is made of several tensors, as by weight norm.

    """
    if not parametrize.is_parametrized(module, parameter):
        return getattr(module, parameter)
    tensor = getattr(module.parametrizations[parameter], "original", None)  # type: ignore[index]
    if tensor is None:
        kind = parametrize.type_before_parametrizations(module).__name__
        raise ValueError(
            f"the {parameter} of a {kind} is made of several tensors by a parametrization: "
            "removed pieces can be zero there, but take no other values nor regrow"
        )
    return tensor


def overwrite(tensor: Tensor, where: Tensor, new: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Write new values over some entries, and zeros over what an optimiser remembers of them."""
    tensor.data[where] = new.to(tensor)[where]
    for state in () if optimizer is None else (optimizer.state.get(tensor, {}),):
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                value[where] = 0


def _fresh(module: nn.Module, parameter: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not is_scorable(module):
        return torch.ones_like(tensor) if parameter == "weight" else torch.zeros_like(tensor)
    weight = trained_tensor(module, "weight")
    bound = 1.0 / math.sqrt(max(weight[0].numel(), 1))
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (2 * bound) - bound


def _strides(granularity: Granularity) -> tuple[int | None, int | None]:
    """How many rows and columns of a weight lie between a piece and the next; None for no next."""
    if isinstance(granularity, Block):
        return granularity.rows, granularity.cols
    if isinstance(granularity, Element):
        return 1, 1
    if isinstance(granularity, Unit):
        return granularity.group_size, None
    if isinstance(granularity, InputUnit):
        return None, 1
    if isinstance(granularity, Head):
        return None, 0
    raise ValueError(f"`values` must be 'zero' or 'random' for {granularity}: no piece has neighbours")


def _neighbours_mean(tensor: Tensor, keep: Tensor, granularity: Granularity) -> Tensor:
    """The mean of the weights one piece away in each direction, of those that stay."""
    rows, cols = _strides(granularity)
    if tensor.dim() == 1:
        values, kept = tensor.view(-1, 1, 1).double(), keep.view(-1, 1, 1)
    else:
        values, kept = weight_as_taps(tensor).double(), weight_as_taps(keep)
    if isinstance(granularity, Head) and granularity.num_heads is not None:
        cols = tensor.shape[1] // granularity.num_heads
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    for dim, stride in ((0, rows), (2, cols)):
        for offset in () if stride is None else (stride, -stride):
            sums += _shifted(values * kept, offset, dim)
            counts += _shifted(kept.double(), offset, dim)
    mean = torch.where(counts > 0, sums / counts.clamp(min=1.0), 0.0)
    return mean.flatten() if tensor.dim() == 1 else weight_from_taps(mean, tensor.shape)


def _shifted(values: Tensor, offset: int, dim: int) -> Tensor:
    """Entry i is entry i - offset, 0 where there is none."""
    result = torch.zeros_like(values)
    size = values.shape[dim] - abs(offset)
    if size > 0:
        source, target = (max(-offset, 0), max(offset, 0))
        result.narrow(dim, target, size).copy_(values.narrow(dim, source, size))
    return result
