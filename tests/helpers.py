"""What several test files share: small nets, snapshots of models, and loss deltas by brute force."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

import fastprune as fp


def mlp(in_features=7, hidden=9, classes=5, activation=nn.ReLU):
    return nn.Sequential(nn.Linear(in_features, hidden), activation(), nn.Linear(hidden, classes))


def classification_batches(sizes=(15, 8, 1), shape=(7,), classes=5):
    """Ragged batches, the last of one sample."""
    return [(torch.randn(size, *shape), torch.randint(0, classes, (size,))) for size in sizes]


def masked_mlp(sparsity=0.5, block=(4, 4), sizes=(17, 33, 10)):
    """A masked MLP 17-33-10 and inputs for it."""
    model = mlp(*sizes)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(*block))
    return fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer")), torch.randn(6, sizes[0])


def make_scores(layers, granularity, *, pruned=None, weight_uses=None, element_size=4):
    """Scores from plain tensors; each layer is (scores, weight shape)."""
    return fp.ImportanceScores(
        {name: torch.as_tensor(scores, dtype=torch.float64) for name, (scores, _) in layers.items()},
        granularity=granularity,
        criterion="test",
        weight_shapes={name: torch.Size(shape) for name, (_, shape) in layers.items()},
        pruned=pruned or {},
        norms={},
        weight_uses=weight_uses,
        element_sizes=dict.fromkeys(layers, element_size),
        loss=None,
        num_samples=0,
    )


class Snapshot:
    """Everything of a model that a call must leave alone."""

    def __init__(self, model):
        self.model = model
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.facts = self._facts()

    def _facts(self):
        modules = list(self.model.named_modules(remove_duplicate=False))
        return {
            "modules": [(name, id(module), type(module), module.training) for name, module in modules],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for _, m in modules],
            "attributes": [sorted(key for key in vars(module)) for _, module in modules],
            "tensors": [
                (name, id(tensor), tensor.requires_grad, tensor.grad is None)
                for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            ],
            "inplace": [getattr(module, "inplace", None) for _, module in modules],
        }

    def assert_unchanged(self):
        assert self._facts() == self.facts
        state = self.model.state_dict()
        assert state.keys() == self.state.keys()
        for name, tensor in self.state.items():
            assert torch.equal(state[name], tensor), name


class FailsAtCall:
    """A loss that raises at its n-th call: in the middle of the masks of a layer."""

    def __init__(self, calls, error):
        self.calls, self.error = calls, error

    def __call__(self, output, targets):
        self.calls -= 1
        if self.calls == 0:
            raise self.error
        return F.cross_entropy(output, targets)


def as_double(tree):
    return tree_map_only(
        torch.Tensor, lambda t: t.to(torch.float64, copy=True) if t.is_floating_point() else t.clone(), tree
    )


def plain_double(model):
    """A float64 copy in eval mode, its parametrizations turned into plain parameters."""
    dense = copy.deepcopy(model).eval()
    for module in list(dense.modules()):
        if parametrize.is_parametrized(module):
            tensors = {name: getattr(module, name).detach() for name in module.parametrizations}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, tensor in tensors.items():
                setattr(module, name, nn.Parameter(tensor.clone()))
    return dense.double()


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def cross_entropy_sums(ignore_index=-100, weight=None, label_smoothing=0.0):
    """(sum of losses, sum of weights) of a batch, for the mean that torch's cross-entropy takes."""

    def sums(output, targets):
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        class_weight = None if weight is None else weight.double()
        total = F.cross_entropy(output, targets, weight=class_weight, reduction="sum", **options)
        kept = targets[targets != ignore_index]
        return total, kept.numel() if weight is None else float(class_weight[kept].sum())

    return sums


def mean_sums(loss_fn):
    """The same for a loss that is a mean, or one value per sample."""
    return lambda output, targets: (loss_fn(output, targets).mean() * len(targets), len(targets))


def pieces_of(granularity, shape):
    """Bool tensors of the weight's shape, True in one piece each, by plain loops."""
    if isinstance(granularity, fp.Unit):
        size = granularity.group_size
        slices = [(slice(row, row + size),) for row in range(0, shape[0], size)]
    elif isinstance(granularity, fp.InputUnit):
        rows = shape[0] // granularity.groups
        slices = [
            (slice(group * rows, (group + 1) * rows), col)
            for group in range(granularity.groups)
            for col in range(shape[1])
        ]
    elif isinstance(granularity, fp.Head):
        size = shape[1] // granularity.num_heads
        slices = [
            (slice(None), slice(head * size, (head + 1) * size)) for head in range(granularity.num_heads)
        ]
    elif isinstance(granularity, fp.Element):
        slices = list(itertools.product(*(range(size) for size in shape)))
    else:
        taps = list(itertools.product(*(range(size) for size in shape[2:])))
        slices = [
            (slice(row, row + granularity.rows), slice(col, col + granularity.cols), *tap)
            for row in range(0, shape[0], granularity.rows)
            for tap in taps
            for col in range(0, shape[1], granularity.cols)
        ]
    for index in slices:
        piece = torch.zeros(shape, dtype=torch.bool)
        piece[index] = True
        yield piece


@torch.no_grad()
def brute_force(
    model,
    loader,
    layer,
    granularity,
    sums=None,
    norm=None,
    pick=lambda output: output,
    max_pieces=40,
    also=(),
):
    """Loss deltas of one layer, and the loss, by masked forwards of a float64 copy over the whole data set.

    ``granularity`` is that of the layer: with its number of heads, or its groups. ``norm`` is the batch
    norm whose channels go with the layer's units, ``also`` are layers and norms that go with them too. Of
    more than ``max_pieces`` pieces every second, third, ... is measured; the others are NaN.
    """
    sums = cross_entropy_sums() if sums is None else sums
    dense = plain_double(model)
    batches = as_double([batch if isinstance(batch, dict) else tuple(batch) for batch in loader])

    def mean_loss():
        totals = []
        for batch in as_double(batches):  # a model may write into its inputs
            if isinstance(batch, dict):
                inputs, targets = {key: batch[key] for key in batch if key != "labels"}, batch["labels"]
            else:
                inputs, targets = batch
            totals.append(sums(pick(call(dense, inputs)), targets))
        return float(sum(total for total, _ in totals)) / float(sum(weight for _, weight in totals))

    module = dense.get_submodule(layer)
    owners = [module, *(dense.get_submodule(name) for name in (norm, *also) if name is not None)]
    loss = mean_loss()
    pieces = list(pieces_of(granularity, module.weight.shape))
    deltas = torch.full((len(pieces),), torch.nan, dtype=torch.float64)
    for index in range(0, len(pieces), -(-len(pieces) // max_pieces)):
        piece = pieces[index]
        tensors = [(module.weight, piece)]
        if isinstance(granularity, fp.Unit):
            rows = piece.flatten(1).any(1)
            whole = [owner.bias for owner in owners if owner.bias is not None]
            tensors += [(tensor, rows) for tensor in (*whole, *(owner.weight for owner in owners[1:]))]
        before = [tensor.clone() for tensor, _ in tensors]
        for tensor, where in tensors:
            tensor[where] = 0
        deltas[index] = mean_loss() - loss
        for (tensor, _), values in zip(tensors, before, strict=True):
            tensor.copy_(values)
    return deltas, loss


def assert_exact(scores, expected, loss):
    """Within 1e-4 of the delta plus 1e-6 of the loss, where a delta was measured."""
    measured = ~expected.isnan()
    scores, expected = scores.flatten()[measured], expected[measured]
    error = (scores - expected).abs()
    worst = int((error - 1e-4 * expected.abs()).argmax())
    assert bool((error <= 1e-4 * expected.abs() + 1e-6 * abs(loss)).all()), (
        f"a piece scored {float(scores[worst]):.6e}, its delta is {float(expected[worst]):.6e}"
    )
    # Scores that are all zero would pass for a layer that does not matter.
    assert float(expected.abs().max()) > 1e-4 * abs(loss)
