"""Networks, data and losses whose loss deltas must be exact, and what is special about scoring each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastprune as fp
from helpers import (
    classification_batches,
    cross_entropy_sums,
    masked_mlp,
    mean_sums,
    mlp,
)
from networks import (
    DataDependent,
    Encoder,
    KeepsWhatItComputes,
    LSTMClassifier,
    MobileBlock,
    NormOverSteps,
    OptionalInput,
    Output,
    PartOfEncoder,
    ResidualInPlace,
    SharedLayer,
    SharedNorm,
    SigmoidLinear,
    SmallConvNet,
    SmallResNet,
    TextClassifier,
    TiedAutoencoder,
    TwoInputs,
    WritesIntoInput,
    spoil_norm,
)

GRANULARITIES = (fp.Block(4, 3), fp.Unit(), fp.Element())


@dataclasses.dataclass
class Case:
    """A network, its data, and what is special about scoring it."""

    model: Callable[[], nn.Module]
    loader: Callable[[], list] = classification_batches
    loss_fn: Any = None
    sums: Callable | None = None
    norms: dict[str, str] = dataclasses.field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    traced: bool = True
    granularities: tuple = GRANULARITIES
    pick: Callable = lambda output: output


def _images():
    return classification_batches((6, 4, 1), (3, 7, 5))


def _steps():
    batches = [(torch.randn(size, 6, 7), torch.randint(0, 5, (size, 6))) for size in (5, 3, 1)]
    batches[0][1][:, 4:] = -1
    batches[1][1][1:] = -1  # most of a batch is left out: its mean would count too much
    return batches


def _pairs(form):
    return [
        (form(left, torch.randn(len(left), 4)), targets) for left, targets in classification_batches((15, 1))
    ]


def _hooked():
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    model[1].register_forward_hook(lambda module, inputs, output: output - output.mean(1, keepdim=True))
    return model


def _hooked_norm():
    model = nn.Sequential(nn.Linear(7, 9), spoil_norm(nn.BatchNorm1d(9)), nn.ReLU(), nn.Linear(9, 5))
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    return model


def _partly_masked():
    model, _ = masked_mlp(0.4, block=(2, 3), sizes=(7, 9, 5))
    return model


def _unit_masked():
    model = nn.Sequential(nn.Linear(7, 9), spoil_norm(nn.BatchNorm1d(9)), nn.Sigmoid(), nn.Linear(9, 5))
    masks = fp.Masks(
        {"0": torch.arange(9) % 3 > 0}, fp.Unit(), {"0": model[0].weight.shape}, norms={"0": "1"}
    )
    return fp.apply_masks_(model, masks)


CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0])


def _per_sample(output, targets):
    return F.cross_entropy(output, targets, reduction="none") ** 2


def _focal(output, targets):
    losses = F.cross_entropy(output, targets, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


class FocalLoss(nn.CrossEntropyLoss):
    """Inherits from cross-entropy and computes something else."""

    def forward(self, output, targets):
        return _focal(output, targets)


def _multi_label():
    return [(inputs, torch.rand(len(inputs), 5).round()) for inputs, _ in classification_batches()]


def tokens():
    return [(torch.randint(0, 11, (size, 6)), torch.randint(0, 5, (size,))) for size in (9, 4, 1)]


def _masked_tokens():
    return [
        {"tokens": tokens, "mask": torch.rand(tokens.shape) < 0.8, "labels": labels}
        for tokens, labels in tokens()
    ]


LIGHT = (fp.Block(4, 3), fp.Unit())
CASES = {
    "relu": Case(mlp),
    "gelu": Case(lambda: mlp(activation=nn.GELU)),
    "sigmoid, which is not 0 at 0": Case(lambda: mlp(activation=nn.Sigmoid)),
    "softplus, widths 1 and 151": Case(
        lambda: mlp(1, 151, 3, nn.Softplus),
        lambda: classification_batches(shape=(1,), classes=3),
        granularities=LIGHT,
    ),
    "dropout in a model in train mode": Case(
        lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 5)).train()
    ),
    "three layers without bias": Case(
        lambda: nn.Sequential(
            nn.Linear(7, 15, bias=False), nn.Tanh(), nn.Linear(15, 9), nn.SiLU(), nn.Linear(9, 5, bias=False)
        )
    ),
    "softmax, which is not elementwise": Case(
        lambda: nn.Sequential(nn.Linear(7, 9), nn.Softmax(1), nn.Linear(9, 5))
    ),
    "a single layer": Case(lambda: nn.Sequential(nn.Linear(7, 5))),
    "batch norm between layer and activation": Case(
        lambda: nn.Sequential(nn.Linear(7, 9), spoil_norm(nn.BatchNorm1d(9)), nn.Sigmoid(), nn.Linear(9, 5)),
        norms={"0": "1"},
    ),
    "batch norm without channels": Case(
        lambda: nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9, affine=False), nn.ReLU(), nn.Linear(9, 5))
    ),
    "batch norm after the activation": Case(
        lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), spoil_norm(nn.BatchNorm1d(9)), nn.Linear(9, 5))
    ),
    "batch norm that two layers share": Case(SharedNorm),
    "batch norm over steps": Case(NormOverSteps, granularities=LIGHT),
    "batch norm with a hook": Case(_hooked_norm, norms={"0": "1"}),
    "residual, relu module in place": Case(lambda: ResidualInPlace("module")),
    "residual, functional relu in place": Case(lambda: ResidualInPlace("functional")),
    "residual, relu_": Case(lambda: ResidualInPlace("method")),
    "residual, += on an alias": Case(lambda: ResidualInPlace("iadd")),
    "residual, in place and read again": Case(lambda: ResidualInPlace("aliased")),
    "input written in place": Case(WritesIntoInput),
    "convolutions": Case(
        SmallConvNet,
        _images,
        norms={"conv1": "norm1", "conv2": "norm2"},
        granularities=(fp.Block(4, 2), fp.Unit()),
    ),
    "convolutions, by other pieces": Case(
        SmallConvNet,
        _images,
        norms={"conv1": "norm1", "conv2": "norm2"},
        granularities=(fp.Unit(group_size=4), fp.InputUnit()),
    ),
    "units without the batch norm after them": Case(
        SmallConvNet, _images, granularities=(fp.Unit(norm=False),)
    ),
    "residual network": Case(
        SmallResNet,
        lambda: classification_batches((6, 4, 1), (3, 9, 8)),
        norms={"stem": "stem_norm", "conv1": "norm1", "conv2": "norm2", "shortcut": "shortcut_norm"},
        granularities=(fp.Block(4, 2), fp.Unit(), fp.Unit(group_size=4), fp.InputUnit()),
    ),
    "depthwise and grouped convolutions": Case(
        MobileBlock,
        lambda: classification_batches((6, 4, 1), (3, 9, 8)),
        norms={"expand": "norm"},
        granularities=(fp.Block(4, 2), fp.Unit(group_size=3), fp.InputUnit()),
    ),
    "input units and groups of units": Case(mlp, granularities=(fp.InputUnit(), fp.Unit(group_size=4))),
    "attention over embeddings": Case(
        TextClassifier, tokens, granularities=(fp.Block(4, 3), fp.Head(), fp.Unit(group_size=5))
    ),
    "attention over embeddings, dicts with a mask": Case(
        TextClassifier, _masked_tokens, granularities=(fp.Head(), fp.InputUnit())
    ),
    "convolutions in channels-last, by element": Case(
        lambda: SmallConvNet().to(memory_format=torch.channels_last),
        _images,
        layers=("conv2", "depthwise"),
        granularities=(fp.Element(),),
    ),
    "encoder layer, attention, steps with ignore_index": Case(
        Encoder,
        _steps,
        nn.CrossEntropyLoss(ignore_index=-1),
        cross_entropy_sums(ignore_index=-1),
        granularities=LIGHT,
    ),
    "layer used twice": Case(SharedLayer),
    "weight also read as a tensor": Case(TiedAutoencoder),
    "layer also used within an encoder": Case(PartOfEncoder, layers=("encoder.linear1",)),
    "layer with a forward of its own": Case(
        lambda: nn.Sequential(SigmoidLinear(7, 9), nn.ReLU(), SigmoidLinear(9, 5))
    ),
    "forward hooks": Case(_hooked),
    "data-dependent control flow": Case(DataDependent, traced=False),
    "spectral norm": Case(lambda: mlp_with(spectral_norm), granularities=LIGHT),
    "spectral norm, untraced": Case(lambda: DataDependent(spectral_norm), traced=False),
    "weight norm, untraced": Case(lambda: DataDependent(weight_norm), traced=False),
    "masked by blocks": Case(_partly_masked),
    "masked by units": Case(_unit_masked, norms={"0": "1"}),
    "keyword inputs, dict output": Case(
        TwoInputs, lambda: _pairs(lambda a, b: {"left": a, "right": b}), pick=lambda output: output["logits"]
    ),
    "positional inputs, output with logits": Case(
        lambda: TwoInputs(Output),
        lambda: _pairs(lambda a, b: (a, b)),
        pick=lambda output: output.logits,
        traced=False,
    ),
    "a tensor made in the forward": Case(KeepsWhatItComputes),
    "LSTM": Case(LSTMClassifier, lambda: classification_batches((5, 3, 1), (4, 7))),
    "convolutions that pad in a circle": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        ),
        lambda: classification_batches((4, 1), (3, 5, 4)),
        granularities=LIGHT,
    ),
    "an input that only some batches have": Case(OptionalInput, lambda: _sometimes_paired()),
    "an output that is transformed": Case(mlp, pick=lambda output: 2 * output.flip(1)),
    "batches that are dicts": Case(
        TwoInputs,
        lambda: [
            {"left": x, "right": torch.randn(len(x), 4), "labels": y} for x, y in classification_batches()
        ],
        pick=lambda output: output["logits"],
    ),
    "ignore_index": Case(
        mlp, lambda: _with_ignored(), nn.CrossEntropyLoss(ignore_index=3), cross_entropy_sums(ignore_index=3)
    ),
    "class weights": Case(
        mlp, loss_fn=nn.CrossEntropyLoss(weight=CLASS_WEIGHT), sums=cross_entropy_sums(weight=CLASS_WEIGHT)
    ),
    "label smoothing with weights and ignore_index": Case(
        mlp,
        loss_fn=nn.CrossEntropyLoss(weight=CLASS_WEIGHT, label_smoothing=0.2, ignore_index=2),
        sums=cross_entropy_sums(weight=CLASS_WEIGHT, label_smoothing=0.2, ignore_index=2),
    ),
    "functional cross-entropy": Case(mlp, loss_fn=F.cross_entropy),
    "probabilities as targets": Case(
        mlp,
        lambda: [(x, torch.rand(len(x), 5).softmax(1)) for x, _ in classification_batches()],
        sums=lambda output, targets: (F.cross_entropy(output, targets, reduction="sum"), len(targets)),
    ),
    "binary cross-entropy": Case(
        mlp, _multi_label, nn.BCEWithLogitsLoss(), mean_sums(F.binary_cross_entropy_with_logits)
    ),
    "a value per sample": Case(mlp, loss_fn=_per_sample, sums=mean_sums(_per_sample)),
    "a subclass of cross-entropy": Case(mlp, loss_fn=FocalLoss(), sums=mean_sums(_focal)),
    "a model in double": Case(
        lambda: mlp(activation=nn.Sigmoid).double(),
        lambda: [(x.double(), y) for x, y in classification_batches()],
    ),
}


def _sometimes_paired():
    batches = classification_batches((8, 4, 3))
    return [((x, x) if index != 1 else x, y) for index, (x, y) in enumerate(batches)]


def mlp_with(wrap):
    model = mlp()
    wrap(model[0])
    return model


def _with_ignored():
    batches = classification_batches()
    batches[0][1][2:] = 3
    batches[-1][1][:] = 3  # the whole last batch
    return batches
