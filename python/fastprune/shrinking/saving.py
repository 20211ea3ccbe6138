"""What a file says of layers that were cut, and fresh models that are brought to their sizes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..modules import swap_modules
from ..modules.swapping import mark_cut, sizes_before_cut
from .cutting import sizes_of
from .skipping import describe_skipped, skipped_from

PARTS = ("cut", "skipped")


def shrunk_structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by name the sizes of the layers that were cut, and what stands for those that were masked whole.

    Example:
        >>> shrunk_structure(small)["cut"]["0"]["to"]
        {'in_features': 64, 'out_features': 32, 'bias': True}

    """
    cut, skipped = {}, {}
    for name, module in model.named_modules():
        before, stand_in = sizes_before_cut(module), describe_skipped(module)
        if stand_in is not None:
            skipped[name] = stand_in
        elif before is not None:
            cut[name] = {"from": before, "to": sizes_of(module)}
    return {"cut": cut, "skipped": skipped}


@contextlib.contextmanager
def shaped_like_saved(fresh: nn.Module, manifest: Mapping[str, Any]) -> Iterator[None]:
    """Bring the layers of a fresh model to the sizes of a saved one; take that back if the block raises.

    Raises:
        ValueError: the file is damaged, or the fresh model is another.

    """
    undo: list[Callable[[], Any]] = []
    try:
        stands = {}
        for name, entry in manifest["skipped"].items():
            old = dict(fresh.named_modules()).get(name) if name else None
            if old is None:
                raise ValueError(f"`fresh_model` does not fit: it has no layer '{name}' to leave out")
            stands[name] = skipped_from(entry).train(old.training)
        undo.append(swap_modules(fresh, stands))
        modules = dict(fresh.named_modules())
        for name, entry in manifest["cut"].items():
            before, after = _sizes(name, entry)
            module = modules.get(name)
            own = None if module is None else sizes_before_cut(module) or sizes_of(module)
            if module is None or own != before:
                raise ValueError(
                    f"`fresh_model` does not fit: layer '{name}' must have {before} before the cut, got {own}"
                )
            undo.append(_restore(module))
            mark_cut(module, before)
            if sizes_of(module) != after:
                _resize(name, module, after)
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _sizes(name: str, entry: Any) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """The sizes of a layer before and after it was cut, as a file has them.

    Raises:
        ValueError: they are no such sizes.

    """
    before, after = (entry.get("from"), entry.get("to")) if isinstance(entry, dict) else (None, None)
    if isinstance(before, dict) and isinstance(after, dict) and before and before.keys() == after.keys():
        sizes = [(before[key], after[key]) for key in before if key != "bias"]
        whole = all(type(old) is int and type(new) is int and 1 <= new <= old for old, new in sizes)
        biases = before.get("bias", True), after.get("bias", True)
        grows = all(type(bias) is bool for bias in biases) and biases[0] <= biases[1]
        if whole and grows and ("groups" not in after or _groups_fit(before, after)):
            return before, after
    raise ValueError(f"the saved sizes of layer '{name}' are damaged: {entry!r}")


def _groups_fit(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    inputs, outputs, groups = (after.get(key, 0) for key in ("in_channels", "out_channels", "groups"))
    if groups != before["groups"]:
        return inputs == outputs == groups
    return groups >= 1 and inputs % groups == 0 == outputs % groups


def _restore(module: nn.Module) -> Callable[[], None]:
    """Return the way back to the module as it is."""
    contents = dict(vars(module))
    parts = {key: dict(contents[key]) for key in ("_parameters", "_buffers")}

    def restore() -> None:
        vars(module).clear()
        vars(module).update(contents)
        for key, part in parts.items():
            vars(module)[key].clear()
            vars(module)[key].update(part)

    return restore


def _resize(name: str, module: Any, sizes: Mapping[str, int | bool]) -> None:
    """Give a layer other sizes, and parameters of these sizes without values."""
    if parametrize.is_parametrized(module):
        raise ValueError(f"`fresh_model` does not fit: layer '{name}' must have no parametrization")
    for attribute, value in sizes.items():
        if attribute != "bias":
            setattr(module, attribute, value)
    if "bias" not in sizes and not isinstance(module, _BatchNorm):
        return  # an attention, which counts its heads
    weight = module.weight
    if isinstance(module, _BatchNorm):
        shape: tuple[int, ...] = (module.num_features,)
        tensors: list[dict[str, Any]] = [module._parameters, module._buffers]
    elif isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
        tensors = [module._parameters]
    else:
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        tensors = [module._parameters]
    empty = functools.partial(_empty, shape)
    for parts in tensors:
        for key, tensor in list(parts.items()):
            if tensor is not None and tensor.dim():
                parts[key] = empty(tensor, whole=key == "weight")
    if sizes.get("bias") and module.bias is None:
        module.bias = nn.Parameter(weight.detach().new_empty(shape[0]), weight.requires_grad)


def _empty(shape: tuple[int, ...], tensor: Any, whole: bool) -> Any:
    empty = tensor.detach().new_empty(shape if whole else shape[:1])
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
