"""Losses between a student and its teacher: on softened outputs, on logits, and on hidden features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SoftLoss = Callable[[Tensor, Tensor], Tensor]
FeaturePairs = Mapping[str, str] | Iterable[tuple[str, str]]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a float64 tensor as it is, others in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`teacher` must give outputs of the student's shape {list(student_logits.shape)}, "
            f"got {list(teacher_logits.shape)}"
        )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is above 0."""
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the mean KL divergence of the softened outputs, times the temperature squared.

    ``T^2 * mean over samples of sum_c p_c (log p_c - log q_c)``, with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``; computed in float32, of float64 logits in float64.

    Example:
        >>> with torch.no_grad():
        ...     teacher_logits = teacher(x)
        >>> logits = model(x)
        >>> loss = 0.5 * F.cross_entropy(logits, y) + 0.5 * fp.distillation_loss(logits, teacher_logits, 4.0)

    Args:
        student_logits: ``[samples, classes, *]``, any floating-point dtype.
        teacher_logits: the same shape; ``[samples]`` or one class: the log-odds of two.
        temperature: above 0.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2; the square
    keeps the size of the gradients when the temperature changes.

    """
    check_temperature(temperature)
    _check_same_shape(student_logits, teacher_logits)
    if student_logits.dim() == 1 or student_logits.shape[1] == 1:
        student_logits, teacher_logits = (
            torch.stack([logits, torch.zeros_like(logits)], 1) for logits in (student_logits, teacher_logits)
        )
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
    return divergence.mean() * temperature**2


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the mean squared difference of the logits, over all samples and classes.

    Computed in float32, of float64 logits in float64. Unlike :func:`distillation_loss` it also asks for
    the teacher's constant in each sample's logits, which a softmax does not see.

    Example:
        >>> loss = fp.logit_mse_loss(model(x), teacher_logits)

    Args:
        student_logits: any shape and floating-point dtype.
        teacher_logits: the same shape.

    Raises:
        ValueError: the shapes differ.

    Source: Ba and Caruana 2014, "Do deep nets really need to be deep?", section 2.1.

    """
    _check_same_shape(student_logits, teacher_logits)
    return F.mse_loss(at_least_float32(student_logits), at_least_float32(teacher_logits))


def check_pairs(features: FeaturePairs) -> list[tuple[str, str]]:
    """Return the pairs of layer names, or raise for anything else.

    Raises:
        TypeError: ``features`` is neither a mapping nor pairs of names.
        ValueError: it is empty, or names a pair twice.

    """
    pairs: list[Any] = []
    if isinstance(features, Mapping):
        pairs = list(features.items())
    elif isinstance(features, Iterable) and not isinstance(features, (str, nn.Module)):
        pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in features]
    else:
        raise TypeError(
            "`features` must map names of student layers to names of teacher layers, "
            f"got {type(features).__name__}"
        )
    for pair in pairs:
        names = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        if not names:
            raise TypeError(f"`features` must hold pairs (student layer, teacher layer), got {pair!r}")
    if not pairs:
        raise ValueError("`features` must name at least one pair of layers, got none")
    if len(set(pairs)) < len(pairs):
        raise ValueError("`features` must name each pair of layers once")
    return pairs


def channel_dimension(student_shape: torch.Size, teacher_shape: torch.Size) -> int | None:
    """Return the one dimension, behind that of the samples, in which two shapes differ; None for none.

    Raises:
        ValueError: they differ in more, or in the number of samples or dimensions.

    """
    if student_shape == teacher_shape:
        return None
    differing: list[int] = []
    if len(student_shape) == len(teacher_shape):
        differing = [d for d in range(len(student_shape)) if student_shape[d] != teacher_shape[d]]
    if len(differing) != 1 or differing[0] == 0:
        raise ValueError(
            "a projection needs features that differ in one dimension behind the samples, got shapes "
            f"{list(student_shape)} of the student and {list(teacher_shape)} of the teacher"
        )
    return differing[0]


class ChannelProjection(nn.Module):
    """A learned linear map of the channels: a Linear on the last dimension, a 1x1 convolution on others.

    Example:
        >>> fp.distillation_losses.ChannelProjection(32, 64, dim=1)(torch.randn(8, 32, 7, 7)).shape
        torch.Size([8, 64, 7, 7])

    Args:
        in_channels: width of the student's features.
        out_channels: width of the teacher's.
        dim: the dimension of the channels, above 0.

    Source: Romero et al. 2015, "FitNets: hints for thin deep nets", section 2.2, whose regressor it is.

    """

    def __init__(self, in_channels: int, out_channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.dim = dim

    def forward(self, features: Tensor) -> Tensor:
        """Return the features with ``out_channels`` in place of ``in_channels``."""
        features = features.to(self.linear.weight.dtype)
        if self.dim == 1 and features.dim() == 4:
            return F.conv2d(features, self.linear.weight[:, :, None, None], self.linear.bias)
        return self.linear(features.movedim(self.dim, -1)).movedim(-1, self.dim)


class FeatureLoss(nn.Module):
    """The mean squared error between hidden features of a student and of its teacher, summed over pairs.

    ``sum over pairs of mean((r(student features) - teacher features)^2)``, where r is the identity for equal
    shapes, and else a learned :class:`ChannelProjection`, which is made when the widths are first seen:
    after the first call (or :meth:`make_projections`) ``parameters()`` holds what an optimizer must train.

    Example:
        >>> feature_loss = fp.FeatureLoss({"2": "4"})          # student's layer "2" learns teacher's "4"
        >>> with fp.capture_outputs(student, ["2"]) as mine, fp.capture_outputs(teacher, ["4"]) as theirs:
        ...     logits = student(x)
        ...     with torch.no_grad():
        ...         teacher(x)
        >>> loss = F.cross_entropy(logits, y) + feature_loss(mine, theirs)

    Args:
        features: names of student layers to names of teacher layers, or pairs of them.
        loss_fn: of the projected and the teacher's features; None for the mean squared error in float32
            (float64 where the features have it).
        projections: student layer to a module of your own in place of r.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``features`` is empty, or ``projections`` names a layer that ``features`` does not.

    Source: Romero et al. 2015, "FitNets: hints for thin deep nets", equation 3, without its factor 1/2 and
    as a mean over elements instead of a sum.

    """

    def __init__(
        self,
        features: FeaturePairs,
        *,
        loss_fn: SoftLoss | None = None,
        projections: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.pairs = check_pairs(features)
        if loss_fn is not None and (isinstance(loss_fn, type) or not callable(loss_fn)):
            raise TypeError(f"`loss_fn` must be callable as loss_fn(student, teacher), got {loss_fn!r}")
        self.loss_fn = loss_fn
        self.projections = nn.ModuleDict()
        students = [student for student, _ in self.pairs]
        for name, module in (projections or {}).items():
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"`projections` must hold torch.nn.Modules, got {type(module).__name__} for '{name}'"
                )
            if students.count(name) != 1:
                raise ValueError(f"`projections` must name student layers of one pair, got '{name}'")
            self.projections[str(students.index(name))] = module

    @property
    def student_layers(self) -> list[str]:
        """The names of the student's layers, each once."""
        return list(dict.fromkeys(student for student, _ in self.pairs))

    @property
    def teacher_layers(self) -> list[str]:
        """The names of the teacher's layers, each once."""
        return list(dict.fromkeys(teacher for _, teacher in self.pairs))

    def make_projections(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> list[nn.Parameter]:
        """Make the projections that are missing, and return their parameters.

        Args:
            student_features: layer name to features ``[samples, *]``.
            teacher_features: likewise.

        Raises:
            ValueError: features are missing, or differ in more than their width.

        """
        made: list[nn.Parameter] = []
        for index, (student, teacher) in enumerate(self.pairs):
            ours = _feature_of(student_features, student, "student")
            theirs = _feature_of(teacher_features, teacher, "teacher")
            if str(index) in self.projections:
                continue
            try:
                dim = channel_dimension(ours.shape, theirs.shape)
            except ValueError as error:
                raise ValueError(f"`features` pair '{student}' with '{teacher}': {error}") from None
            if dim is not None:
                projection = ChannelProjection(ours.shape[dim], theirs.shape[dim], dim)
                dtype = torch.float64 if ours.dtype == torch.float64 else torch.float32
                self.projections[str(index)] = projection.to(ours.device, dtype)
                made += projection.parameters()
        return made

    def forward(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student_features: layer name to features ``[samples, *]``; gradients flow to them.
            teacher_features: layer name to features; none flow there.

        """
        self.make_projections(student_features, teacher_features)
        losses = []
        for index, (student, teacher) in enumerate(self.pairs):
            ours, theirs = student_features[student], teacher_features[teacher].detach()
            if str(index) in self.projections:
                ours = self.projections[str(index)](ours)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"`features` pair '{student}' with '{teacher}': the projection gives shape "
                    f"{list(ours.shape)}, expected {list(theirs.shape)}"
                )
            if self.loss_fn is not None:
                losses.append(self.loss_fn(ours, theirs))
            else:
                losses.append(F.mse_loss(at_least_float32(ours), at_least_float32(theirs)))
        return torch.stack(losses).sum()


def _feature_of(features: Mapping[str, Tensor], name: str, model: str) -> Tensor:
    if name not in features:
        raise ValueError(f"`features` names the {model}'s layer '{name}', which its forward did not call")
    return features[name]
