"""score: what it accepts, what it refuses, and that it leaves the model as it was, whatever happens."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastprune as fp
from helpers import FailsAtCall, Snapshot, classification_batches, mlp
from networks import DataDependent, KeepsWhatItComputes, ResidualInPlace, SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread")


def _batch(size=4):
    return torch.randn(size, 7), torch.randint(0, 5, (size,))


def _generator(batches):
    yield from batches


class _Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for inputs, targets in self.batches:
            yield from zip(inputs, targets, strict=True)


class _Batches:
    """The least that a loader must be."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


BAD_LOADERS = {
    "None": (None, TypeError),
    "an int": (3, TypeError),
    "a tensor": (torch.randn(4, 7), TypeError),
    "bare tensors": ([torch.randn(4, 7)], TypeError),
    "three parts": ([(*_batch(), torch.ones(4))], TypeError),
    "a dict without labels": ([{"inputs": torch.randn(4, 7)}], TypeError),
    "strings": (["ab", "cd"], TypeError),
    "inputs without a tensor": ([([], torch.zeros(4))], TypeError),
    "numbers as inputs": ([(torch.tensor(1.0), torch.tensor(1))], TypeError),
    "nothing": ([], ValueError),
    "an exhausted generator": (_generator([]), ValueError),
    "batches of no samples": ([(torch.randn(0, 7), torch.zeros(0, dtype=torch.long))], ValueError),
}


@pytest.mark.parametrize("kind", BAD_LOADERS)
def test_a_loader_that_yields_something_else_is_refused_by_name(kind):
    loader, error = BAD_LOADERS[kind]
    model = mlp().train()
    snapshot = Snapshot(model)
    with pytest.raises(error, match="`loader`"):
        fp.score(model, loader, progress=False)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("criterion", "l3", ValueError),
        ("criterion", None, ValueError),
        ("granularity", 16, TypeError),
        ("granularity", (16, 16), TypeError),
        ("granularity", fp.Block, TypeError),
        ("include", 5, TypeError),
        ("include", ["0", 5], TypeError),
        ("include", "encoder.*", ValueError),
        ("exclude", [5], TypeError),
        ("exclude", nn.Linear, ValueError),
        ("loss_fn", "cross_entropy", TypeError),
        ("loss_fn", lambda output, targets: 1.0, TypeError),
        ("loss_fn", lambda output, targets: output, ValueError),
        ("loss_fn", lambda output, targets: output[:, :1], ValueError),
        ("max_samples", 0, ValueError),
        ("max_samples", -3, ValueError),
        ("max_samples", 1.5, ValueError),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_is_unchanged(argument, value, error):
    model = mlp().train()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=f"`{argument}`"):
        fp.score(model, [_batch()], progress=False, **{argument: value})
    snapshot.assert_unchanged()


@pytest.mark.parametrize("model", [None, "model", torch.randn(3), lambda x: x])
def test_a_model_that_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match="`model`"):
        fp.score(model, [_batch()], progress=False)


def test_a_model_without_linear_or_conv_layers_is_refused():
    with pytest.raises(ValueError, match="`model` has no Linear or Conv2d"):
        fp.score(nn.Sequential(nn.ReLU()), [_batch()], progress=False)


def test_an_output_without_logits_asks_for_output_transform():
    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 5)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(TypeError, match="`output_transform`"):
        fp.score(Tuple(), [_batch()], progress=False)
    picked = fp.score(Tuple(), [_batch()], output_transform=lambda output: output[0], progress=False)
    assert bool((picked["layer"] != 0).any())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [mlp, DataDependent], ids=["traced", "untraced"])
@pytest.mark.filterwarnings("ignore:fastprune")
def test_nan_and_inf_weights_are_reported_with_the_layer(make, value):
    model = make()
    name, layer = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight[3, 2] = value
    for options in ({"criterion": "loss_delta"}, {"criterion": "magnitude"}):
        with pytest.raises(ValueError, match=f"layer '{name}'"):
            fp.score(model, [_batch()], progress=False, **options)
        assert model.training


def test_the_first_layer_with_infinite_outputs_is_named():
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 5))
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    with pytest.raises(ValueError, match="layer '2' is the first"):
        fp.score(model, [_batch()], progress=False)


def test_targets_that_are_all_ignored_are_reported():
    batch = (torch.randn(4, 7), torch.full((4,), -100))
    with pytest.raises(ValueError, match="ignore_index"):
        fp.score(mlp(), [batch], progress=False)


def _interrupting(batches, error):
    yield batches[0]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
@pytest.mark.parametrize(
    "make",
    [mlp, DataDependent, SmallConvNet, lambda: ResidualInPlace("module"), lambda: DataDependent(_masked)],
    ids=["traced", "untraced", "conv", "in-place", "untraced and masked"],
)
@pytest.mark.filterwarnings("ignore:fastprune")
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(make, error):
    model = make()
    for module in list(model.modules())[::2]:
        module.train(not module.training)
    shape = (3, 5, 5) if isinstance(model, SmallConvNet) else (7,)
    batches = classification_batches((4, 2), shape)
    snapshot = Snapshot(model)
    kind = error if isinstance(error, type) else type(error)
    for granularity in (fp.Unit(), fp.Block(3, 2)):
        with pytest.raises(kind):
            fp.score(model, _interrupting(batches, error), granularity=granularity, progress=False)
        snapshot.assert_unchanged()
        for calls in (1, 2, 3, 7):
            loss_fn = FailsAtCall(calls, error)
            with pytest.raises(kind):
                fp.score(model, batches, granularity=granularity, loss_fn=loss_fn, progress=False)
            snapshot.assert_unchanged()


def _masked(layer):
    wrapped = nn.Sequential(layer)
    scores = fp.score(wrapped, None, criterion="magnitude", granularity=fp.Block(3, 2))
    return fp.apply_masks_(wrapped, scores.select(sparsity=0.5))[0]


@pytest.mark.filterwarnings("ignore:fastprune")
def test_a_model_that_fails_in_the_middle_is_left_as_it_was():
    class Fails(DataDependent):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if self.calls == 9:
                raise RuntimeError("broken forward")
            return super().forward(x)

    model = Fails().train()
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match="broken forward"):
        fp.score(model, [_batch()], granularity=fp.Unit(), progress=False)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("criterion", ["loss_delta", "magnitude"])
@pytest.mark.parametrize("granularity", [fp.Block(3, 2), fp.Unit(), fp.Element()])
def test_flags_hooks_buffers_and_generators_are_left_alone(criterion, granularity):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 5))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x):
            self.calls += 1
            out = self.body(x)
            self.mean = out.detach().mean(0)  # a new tensor in each forward
            return out

    model = Counts().train()
    model.body[1].eval()
    calls = []
    model.body[0].register_forward_hook(lambda *args: calls.append(1))
    snapshot = Snapshot(model)
    loader = DataLoader(TensorDataset(torch.randn(9, 7), torch.randint(0, 5, (9,))), 4, shuffle=True)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fp.score(model, loader, criterion=criterion, granularity=granularity, progress=False)
    assert calls
    snapshot.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("granularity", [fp.Block(3, 2), fp.Unit()])
@pytest.mark.parametrize("criterion", ["loss_delta", "magnitude"])
@pytest.mark.parametrize("with_loader", [True, False])
def test_nothing_that_a_forward_keeps_is_left_on_the_model(criterion, granularity, with_loader):
    model = KeepsWhatItComputes()
    snapshot = Snapshot(model)
    loader = [_batch()] if with_loader or criterion == "loss_delta" else None
    fp.score(model, loader, criterion=criterion, granularity=granularity, progress=False)
    snapshot.assert_unchanged()
    assert model.features is None
    assert model.calls == 0
    copy.deepcopy(model)


def test_every_kind_of_loader_gives_the_same_scores():
    batches = classification_batches((4, 4, 1))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = mlp()
    expected = fp.score(model, batches, granularity=fp.Unit(), progress=False)
    assert expected.num_samples == 9
    loaders = {
        "lists of two": [[x, y] for x, y in batches],
        "a generator": _generator(batches),
        "an iterable": _Batches(batches),
        "tuples of inputs": [((x,), y) for x, y in batches],
        "keyword inputs": [({"input": x}, y) for x, y in batches],
        "dicts with labels": [{"input": x, "labels": y} for x, y in batches],
        "a DataLoader": DataLoader(TensorDataset(inputs, targets), 4),
        "a DataLoader without length": DataLoader(_Stream(batches), 4),
        "batches of no samples in between": [batches[0], (inputs[:0], targets[:0]), *batches[1:]],
    }
    for kind, loader in loaders.items():
        scores = fp.score(model, loader, granularity=fp.Unit(), progress=True)
        assert scores.num_samples == 9, kind
        assert scores.loss == expected.loss, kind
        for layer in expected:
            assert torch.equal(scores[layer], expected[layer]), kind


@pytest.mark.parametrize("max_samples", [1, 4, 6, 9, 100])
def test_max_samples_cuts_the_last_batch(max_samples):
    batches = classification_batches((4, 4, 1))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = mlp()
    cut = fp.score(model, batches, max_samples=max_samples, granularity=fp.Unit(), progress=False)
    whole = fp.score(
        model, [(inputs[:max_samples], targets[:max_samples])], granularity=fp.Unit(), progress=False
    )
    assert cut.num_samples == min(max_samples, 9)
    for layer in whole:
        torch.testing.assert_close(cut[layer], whole[layer], rtol=1e-5, atol=1e-7)


def test_max_samples_reads_no_more_batches_than_it_needs():
    read = []

    def loader():
        for batch in classification_batches((4, 4, 4)):
            read.append(1)
            yield batch

    fp.score(mlp(), loader(), max_samples=8, granularity=fp.Unit(), progress=False)
    assert len(read) == 2


def test_an_untraceable_model_is_reported_once_however_many_batches_there_are():
    with pytest.warns(UserWarning, match="masked forwards") as caught:
        fp.score(DataDependent(), classification_batches((3, 3, 1)), granularity=fp.Unit(), progress=False)
    assert len([w for w in caught if "fastprune" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:fastprune. the model is scored by masked forwards")
def test_an_untraceable_model_with_a_batch_norm_is_told_that_units_come_without_it():
    class Net(DataDependent):
        def __init__(self):
            super().__init__(lambda layer: nn.Sequential(layer, nn.BatchNorm1d(9)))

    with pytest.warns(UserWarning, match="without the batch norm"):
        scores = fp.score(Net(), [_batch()], granularity=fp.Unit(), progress=False)
    assert scores.norms == {}


def test_tied_weights_and_weights_made_by_hooks_are_left_out_with_a_warning():
    tied = nn.Sequential(nn.Embedding(5, 7), nn.Linear(7, 7), nn.Linear(7, 5, bias=False))
    tied[2].weight = tied[0].weight
    loader = [(torch.randint(0, 5, (6,)), torch.randint(0, 5, (6,)))]
    with pytest.warns(UserWarning, match=r"layer '2' is left out: its weight is tied to \['0'\]"):
        scores = fp.score(tied, loader, progress=False)
    assert list(scores) == ["1"]

    pruned = mlp()
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.warns(UserWarning, match="layer '0' is left out: its weight is no parameter"):
        scores = fp.score(pruned, [_batch()], progress=False)
    assert list(scores) == ["2"]


def test_the_progress_bar_can_be_silenced(capsys):
    fp.score(mlp(), [_batch()], progress=False)
    assert capsys.readouterr().err == ""
    fp.score(mlp(), [_batch()], progress=True)
    assert "loss deltas" in capsys.readouterr().err


def test_a_loss_that_is_nan_names_the_batch_and_the_layer():
    model, loader = mlp(), classification_batches((5, 6, 4))
    loader[1][0][2, 3] = torch.nan
    with pytest.raises(ValueError, match="in batch 2 of `loader`: layer '0' is the first"):
        fp.score(model, loader, progress=False)
    loader[1][0][2, 3] = 1e30
    model[2].weight.data[:, 4] = 3e38
    with pytest.raises(ValueError, match="in batch 2 of `loader`"):
        fp.score(model, loader, progress=False)


@pytest.mark.parametrize("granularity", [fp.InputUnit(), fp.Unit(), fp.Block(4, 3)], ids=str)
def test_models_in_half_precision_are_scored_too(granularity):
    model, loader = mlp(), classification_batches((40,))
    full = fp.score(model, loader, granularity=granularity, progress=False)
    half = [(x.bfloat16(), y) for x, y in loader]
    scores = fp.score(model.bfloat16(), half, granularity=granularity, progress=False)
    for name in full:
        torch.testing.assert_close(scores[name], full[name], rtol=0, atol=0.05)
        assert float(scores[name].abs().max()) > 0.01
