"""Capturing what layers put out, by forward hooks that are gone afterwards whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .layers import check_model


@contextlib.contextmanager
def capture_outputs(
    model: nn.Module, names: Iterable[str], argument: str = "names"
) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of layers in a dict, as long as the context lasts.

    Each forward of the model empties the dict and fills it again. Of a layer that is called several times
    the last output is kept, of a tuple, list or dict its first tensor. An output is copied, since the next
    layer may write over it in place; gradients flow through it.

    Example:
        >>> with fp.capture_outputs(model, ["layer1", "layer2"]) as features:
        ...     model(x)
        >>> features["layer2"].shape
        torch.Size([32, 128, 28, 28])

    Args:
        model: in any mode; its hooks are as before at the end, also after an error.
        names: of its modules, as ``named_modules`` has them.
        argument: what errors call the names.

    Yields:
        Layer name to output.

    Raises:
        TypeError: ``model`` is no module, or a layer puts out no tensor.
        ValueError: the model has no layer of that name.

    """
    modules = dict(check_model(model).named_modules())
    outputs: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(lambda module, inputs: outputs.clear()).remove)
        for name in [names] if isinstance(names, str) else names:
            if name not in modules:
                raise ValueError(f"`{argument}` must name layers of {type(model).__name__}, got {name!r}")

            def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                outputs[name] = _first_tensor(output, name).clone()

            # Behind hooks of the model's own, which may replace the output.
            hooks.callback(modules[name].register_forward_hook(keep).remove)
        yield outputs


def _first_tensor(output: Any, name: str) -> Tensor:
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Tensor):
        return values
    if isinstance(output, (Mapping, tuple, list)):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(f"layer '{name}' must put out a tensor to be captured, got {type(output).__name__}")
