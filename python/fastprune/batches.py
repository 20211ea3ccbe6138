"""Reading loaders: every form of batch as one type, and the loss as sums over samples."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

LossFunction = Callable[[Any, Any], Tensor]
OutputTransform = Callable[[Any], Any]


class Batch(NamedTuple):
    """One batch: what the model is called with, and what its output is compared with."""

    args: tuple
    kwargs: dict[str, Any]
    targets: Any
    size: int

    def call(self, model: Callable[..., Any]) -> Any:
        """Call the model with the inputs of the batch."""
        return model(*self.args, **self.kwargs)

    def signature(self) -> tuple:
        """Return what control flow on arguments can tell apart: which are given, and their types."""
        keywords = tuple(sorted((key, type(value)) for key, value in self.kwargs.items()))
        return (tuple(type(value) for value in self.args), keywords)

    def samples(self, begin: int, end: int) -> Batch:
        """Return samples [begin, end): those of every tensor that has one entry for each sample."""

        def cut(tensor: Tensor) -> Tensor:
            has_samples = tensor.dim() > 0 and tensor.shape[0] == self.size
            return tensor[begin:end] if has_samples else tensor

        args, kwargs, targets = tree_map_only(Tensor, cut, (self.args, self.kwargs, self.targets))
        return Batch(args, kwargs, targets, end - begin)

    def head(self, size: int) -> Batch:
        """Return the first ``size`` samples."""
        return self if size >= self.size else self.samples(0, size)

    def split(self, size: int, equal: bool = False) -> list[Batch]:
        """Return the batch in parts of at most ``size`` samples: of nearly the same size, or all but the
        last of just that size.
        """  # noqa: D205
        count = -(-self.size // size)
        if count <= 1:
            return [self]
        bounds = [
            min(self.size, size * part) if equal else self.size * part // count for part in range(count + 1)
        ]
        return [self.samples(*pair) for pair in itertools.pairwise(bounds)]

    def fresh(self) -> Batch:
        """Return the batch with copies of its inputs, for a model that may write into them."""
        args, kwargs = tree_map_only(Tensor, torch.clone, (self.args, self.kwargs))
        return self._replace(args=args, kwargs=kwargs)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        args, kwargs, targets = tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs, self.targets)
        )
        return Batch(args, kwargs, targets, self.size)


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with the keys {sorted(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of length {len(batch)}"
    return f"a {type(batch).__name__}"


def read_batch(batch: Any) -> Batch:
    """Return a loader's batch as a :class:`Batch`.

    Raises:
        TypeError: it is neither ``(inputs, targets)`` nor a dict with ``labels``.

    """
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs: Any = {key: value for key, value in batch.items() if key != "labels"}
        targets = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
    else:
        raise TypeError(
            f"`loader` must yield (inputs, targets) or dicts with a 'labels' key, got {_describe(batch)}"
        )
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    else:
        args = (inputs,)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise TypeError("`loader` must yield inputs that hold a tensor with a batch dimension, got none")
    return Batch(args, kwargs, targets, tensors[0].shape[0])


def iterate_batches(
    loader: Iterable[Any], device: torch.device, max_samples: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of a loader on a device, the last cut at ``max_samples``.

    Raises:
        TypeError: ``loader`` is no iterable, or yields something else than batches.
        ValueError: it yields nothing, or ``max_samples`` is below 1.

    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"`loader` must be an iterable of batches, got {type(loader).__name__}")
    if isinstance(loader, Tensor):
        raise TypeError("`loader` must be an iterable of batches, got a tensor")
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise ValueError(f"`max_samples` must be an integer of at least 1, got {max_samples!r}")
    seen = 0
    for raw in loader:
        batch = read_batch(raw)
        if batch.size == 0:
            continue
        if max_samples is not None:
            batch = batch.head(max_samples - seen)
        seen += batch.size
        yield batch.to(device)
        if max_samples is not None and seen >= max_samples:
            return
    if seen == 0:
        raise ValueError("`loader` must yield at least one sample, got none")


def check_reiterable(loader: object, name: str) -> None:
    """Raise TypeError for an iterator, which would be empty the second time.

    Args:
        loader: what is iterated several times.
        name: the argument it came in.

    """
    if isinstance(loader, Iterator):
        raise TypeError(
            f"`{name}` is iterated several times, so it must be a DataLoader, a list or the like, "
            f"got the iterator {type(loader).__name__}"
        )


def count_batches(loader: Iterable[Any]) -> int | None:
    """Return how many batches a loader says it has, or None where it does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # also a DataLoader over an IterableDataset, which has a __len__ that raises
        return None


@contextlib.contextmanager
def keep_generators() -> Iterator[None]:
    """Give the caller's random generators, which loaders draw from, back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, the CPU where there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def read_logits(output: Any, output_transform: OutputTransform | None) -> Any:
    """Return what the loss takes out of a model's output: a tensor, or the ``logits`` of a structure.

    Raises:
        TypeError: the output is neither, and there is no ``output_transform``.

    """
    if output_transform is not None:
        return output_transform(output)
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"the model returned a {type(output).__name__} without `logits`; "
        "pass `output_transform` to pick the logits out of it"
    )


class Accuracy:
    """The share of targets that the largest logit names, or the sign of a single one; NaN for no classes.

    Targets are no classes if those of any batch are none: by chance a few numbers may look like classes.
    """

    def __init__(self) -> None:
        self.correct = self.counted = 0
        self.classes = True

    def add(self, logits: Any, targets: Any, loss: Loss) -> None:
        """Count a batch."""
        hits = _hits(logits, targets, loss)
        if hits is None:
            self.classes = False
        else:
            self.correct += int(hits.sum())
            self.counted += hits.numel()

    def value(self) -> float:
        """Return the share so far."""
        return self.correct / self.counted if self.classes and self.counted else float("nan")


def _hits(logits: Any, targets: Any, loss: Loss) -> Tensor | None:
    """Return which targets are named, of those that count, or None where they are no classes."""
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or logits.dim() < 1:
        return None
    if logits.shape == targets.shape and loss.is_cross_entropy and logits.dim() > 1:  # probabilities
        return logits.argmax(1) == targets.argmax(1)
    single = logits.squeeze(1) if logits.dim() > 1 and logits.shape[1] == 1 else logits
    if logits.shape == targets.shape or single.shape == targets.shape:
        binary = bool(((targets == 0) | (targets == 1)).all())
        return (
            ((single if single.shape == targets.shape else logits) > 0) == (targets > 0.5) if binary else None
        )
    if targets.is_floating_point() or logits.dim() < 2:
        return None
    # A loss of one's own may take classes from the last dimension; where both fit, nothing says which.
    dims = [d for d in (1, -1) if logits.shape[:d] + logits.shape[d:][1:] == targets.shape]
    if not dims or (len(dims) == 2 and logits.dim() > 2 and not loss.is_cross_entropy):
        return None
    kept = targets != loss.ignore_index
    return (logits.argmax(dims[0]) == targets)[kept]


class Loss:
    """A loss function as values per sample and the weight they are divided by.

    The mean loss of a data set is the sum of all values over the sum of all weights, so it does not
    depend on how the samples were cut into batches.
    """

    def __init__(self, loss_fn: LossFunction | None = None) -> None:
        if loss_fn is not None and (isinstance(loss_fn, type) or not callable(loss_fn)):
            raise TypeError(f"`loss_fn` must be callable as loss_fn(outputs, targets), got {loss_fn!r}")
        if getattr(loss_fn, "reduction", "mean") == "sum":
            raise ValueError("`loss_fn` must return a mean or one value per sample, got reduction='sum'")
        self.loss_fn = None if loss_fn is F.cross_entropy else loss_fn

    @property
    def is_cross_entropy(self) -> bool:
        """Whether this is torch's cross-entropy; a subclass may compute anything."""
        return self.loss_fn is None or type(self.loss_fn) is nn.CrossEntropyLoss

    @property
    def is_plain_cross_entropy(self) -> bool:
        """Whether this is cross-entropy without label smoothing or class weights."""
        if isinstance(self.loss_fn, nn.CrossEntropyLoss) and self.is_cross_entropy:
            return self.loss_fn.label_smoothing == 0.0 and self.loss_fn.weight is None
        return self.loss_fn is None

    @property
    def ignore_index(self) -> int:
        """The target that cross-entropy leaves out."""
        return getattr(self.loss_fn, "ignore_index", -100)

    def __call__(self, logits: Any, targets: Any, size: int) -> tuple[Tensor, float]:
        """Return values in float64 and the weight of the batch.

        The values are one per sample or element, or a single one: the batch's sum.

        Raises:
            TypeError: the loss is no tensor.
            ValueError: the loss is neither a scalar nor one value per sample.

        """
        if self.loss_fn is None or self.is_cross_entropy:
            return self._cross_entropy(logits, targets)
        values = self.loss_fn(logits, targets)
        if not isinstance(values, Tensor):
            raise TypeError(f"`loss_fn` must return a tensor, got {type(values).__name__}")
        if values.dim() == 0:
            return values.double() * size, float(size)
        if values.shape != (size,):
            raise ValueError(
                f"`loss_fn` must return a mean or one value for each of {size} samples, "
                f"got shape {list(values.shape)}"
            )
        return values.double(), float(size)

    def weight(self, targets: Any, size: int) -> float:
        """Return the weight of a batch: its samples, or what cross-entropy's mean is divided by."""
        if not self.is_cross_entropy or not isinstance(targets, Tensor):
            return float(size)
        if targets.is_floating_point():  # probabilities [samples, classes, *]
            return float(targets.numel() // targets.shape[1]) if targets.dim() > 1 else 1.0
        kept = targets != self.ignore_index
        class_weight: Tensor | None = getattr(self.loss_fn, "weight", None)
        if class_weight is None:
            return float(kept.sum())
        return float(class_weight[targets[kept].long()].sum(dtype=torch.float64))

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
            kind = type(targets if isinstance(logits, Tensor) else logits).__name__
            raise TypeError(f"cross-entropy needs tensors as logits and as targets of `loader`, got a {kind}")
        if targets.dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
            targets = targets.long()
        class_weight: Tensor | None = getattr(self.loss_fn, "weight", None)
        # In float64 a well-classified sample's loss keeps its digits.
        values = F.cross_entropy(
            logits.double(),
            targets.double() if targets.is_floating_point() else targets,
            weight=None if class_weight is None else class_weight.double(),
            ignore_index=self.ignore_index,
            label_smoothing=getattr(self.loss_fn, "label_smoothing", 0.0),
            reduction="none",
        )
        return values.flatten(), self.weight(targets, 1)
