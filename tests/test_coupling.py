"""Units that can only be removed together: which layers a sum ties, and their joint scores and masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.batches import Batch
from fastprune.coupling import coupled_layers
from fastprune.graph import TracedModel
from helpers import Snapshot, assert_exact, brute_force, classification_batches
from networks import MobileBlock, SmallResNet, TextClassifier, spoil_norm

pytestmark = pytest.mark.usefixtures("one_thread")


class TiedNet(nn.Module):
    """A residual stream with a depthwise convolution, a gate for each channel, and a sum of three."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), spoil_norm(nn.BatchNorm2d(6))
        self.squeeze, self.gate = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.inside, self.outside = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.depthwise(self.stem(x))))
        x = x * torch.sigmoid(self.gate(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = x + self.outside(torch.relu(self.inside(x)))
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return self.head(torch.relu(self.left(x)) + torch.tanh(self.right(x)))


class GuardedNet(TiedNet):
    """The same behind control flow that torch.fx cannot follow."""

    def forward(self, x):
        if x.shape[0] > 1000:
            raise ValueError("too many")
        return super().forward(x)


class ReadsItsData(TiedNet):
    """The same behind control flow that no trace can follow."""

    def forward(self, x):
        return super().forward(x if float(x.sum()) < 1e9 else -x)


TIED = (("stem", "depthwise", "gate", "outside"), ("left", "right"))


def images(sizes=(6, 4, 1)):
    return classification_batches(sizes, (3, 7, 5))


def groups_of(model, batch):
    model.eval()
    traced = TracedModel.trace(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    with torch.no_grad():
        return coupled_layers(traced, traced.run(Batch((batch,), {}, None, len(batch))), layers)


def test_sums_gates_and_depthwise_convolutions_tie_layers():
    assert groups_of(TiedNet(), torch.randn(3, 3, 7, 5)) == TIED
    assert groups_of(SmallResNet(), torch.randn(3, 3, 7, 5)) == (("conv2", "shortcut"),)


def test_channels_that_mix_or_multiply_tie_nothing():
    assert groups_of(MobileBlock(), torch.randn(3, 3, 9, 9)) == ()  # two outputs for each depthwise input
    assert groups_of(nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7)), torch.randn(3, 7)) == ()


@pytest.mark.parametrize("kind", [TiedNet, GuardedNet, ReadsItsData], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.filterwarnings("ignore:fastprune")
def test_joint_deltas_are_those_of_masking_all_layers(kind, group_size):
    torch.manual_seed(0)
    model, loader = kind(), images()
    before = Snapshot(model)
    granularity = fp.Unit(group_size, coupled=True)
    scores = fp.score(model, loader, granularity=granularity, progress=False)
    before.assert_unchanged()
    if kind is ReadsItsData:
        assert scores.coupled == ()
        return
    assert scores.coupled == TIED
    norms = {"depthwise": "norm"}
    assert scores.norms == norms
    for group in (*TIED, ("squeeze",), ("inside",), ("head",)):
        first, *others = group
        also = [*others, *(norms[name] for name in group if name in norms)]
        expected, loss = brute_force(model, loader, first, granularity, also=also)
        assert_exact(scores[first], expected, loss)
        assert all(torch.equal(scores[name], scores[first]) for name in others)


def test_a_layer_with_a_hook_is_scored_by_masked_forwards_of_the_group():
    torch.manual_seed(0)
    model, loader = TiedNet(), images()
    model.outside.register_forward_hook(lambda module, inputs, output: output * 2)
    scores = fp.score(model, loader, granularity=fp.Unit(coupled=True), progress=False)
    assert scores.coupled == TIED
    also = ["depthwise", "norm", "gate", "outside"]
    expected, loss = brute_force(model, loader, "stem", fp.Unit(), also=also)
    assert_exact(scores["stem"], expected, loss)


def test_an_untraceable_model_is_scored_layer_by_layer_with_a_warning():
    torch.manual_seed(0)
    model, loader = ReadsItsData(), images()
    with pytest.warns(UserWarning, match="no sums are found"):
        scores = fp.score(model, loader, granularity=fp.Unit(coupled=True), progress=False)
    alone = fp.score(model, loader, granularity=fp.Unit(norm=False), progress=False)
    assert all(torch.equal(scores[name], alone[name]) for name in alone)


def test_post_norm_transformers_couple_nothing_and_score_as_ever():
    torch.manual_seed(0)
    model = TextClassifier()
    loader = [(torch.randint(0, 11, (4, 6)), torch.randint(0, 5, (4,)))]
    scores = fp.score(model, loader, granularity=fp.Unit(coupled=True), progress=False)
    alone = fp.score(model, loader, granularity=fp.Unit(), progress=False)
    assert scores.coupled == ()
    assert all(torch.equal(scores[name], alone[name]) for name in alone)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_coupled_layers_keep_the_same_units_and_cost_what_all_of_them_cost(sparsity):
    torch.manual_seed(1)
    model = TiedNet()
    scores = fp.score(model, images(), granularity=fp.Unit(coupled=True), progress=False)
    masks = scores.select(sparsity=sparsity)
    assert list(masks) == list(scores)
    groups = [*TIED, ("squeeze",), ("inside",), ("head",)]
    costs = {name: model.get_submodule(name).weight[0].numel() for name in scores}
    pieces = [
        (float(score), sum(costs[name] for name in group), group, index)
        for group in groups
        for index, score in enumerate(scores[group[0]])
    ]
    allowed = sparsity * sum(cost for _, cost, _, _ in pieces)
    expected = {name: torch.ones(len(scores[name]), dtype=torch.bool) for name in scores}
    for _, cost, group, index in sorted(pieces, key=lambda piece: piece[0]):
        allowed -= cost
        if allowed < 0:
            break
        for name in group:
            expected[name][index] = False
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def test_every_group_is_pruned_by_the_same_share_with_scope_layer():
    scores = fp.score(TiedNet(), images(), granularity=fp.Unit(coupled=True), progress=False)
    masks = scores.select(sparsity=0.5, scope="layer")
    assert [int(masks[name].sum()) for group in TIED for name in group] == [3] * 4 + [2] * 2


def test_pruned_joint_units_stay_pruned():
    model, loader = TiedNet(), images()
    masks = fp.score(model, loader, granularity=fp.Unit(coupled=True), progress=False).select(sparsity=0.4)
    fp.apply_masks_(model, masks)
    again = fp.score(model, loader, granularity=fp.Unit(coupled=True), progress=False)
    more = again.select(sparsity=0.6)
    for name, mask in masks.items():
        assert not bool(more[name][~mask].any()), name
        assert bool((again[name][~mask] == 0).all()), name


def test_scores_of_shards_merge_and_come_back_from_a_file(tmp_path):
    torch.manual_seed(2)
    model, loader = TiedNet(), images()
    options = {"granularity": fp.Unit(coupled=True), "progress": False}
    whole = fp.score(model, loader, **options)
    merged = fp.score(model, loader[:1], **options).merge(fp.score(model, loader[1:], **options))
    merged.save(tmp_path / "scores.safetensors")
    loaded = fp.ImportanceScores.load(tmp_path / "scores.safetensors")
    assert loaded.coupled == whole.coupled == TIED
    for name, layer in whole.items():
        torch.testing.assert_close(loaded[name], layer, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="same granularities"):
        merged.merge(fp.score(model, loader[:1], granularity=fp.Unit(), progress=False))


JOINED = {
    "magnitude": lambda parts: parts.square().sum(0).sqrt(),
    fp.criteria.Magnitude(p=1): lambda parts: parts.sum(0),
    "gradient": lambda parts: parts.square().sum(0).sqrt(),
    "fisher": lambda parts: parts.sum(0),
    "wanda": lambda parts: parts.sum(0),
    fp.criteria.Activation("max"): lambda parts: parts.amax(0),
    "activation": lambda parts: parts.mean(0),
    "random": lambda parts: parts[0],
    fp.criteria.Taylor(per_sample=True): lambda parts: parts.sum(0),
}


@pytest.mark.parametrize("criterion", JOINED, ids=str)
def test_other_criteria_join_what_they_find_in_each_layer(criterion):
    torch.manual_seed(3)
    model, loader = TiedNet(), images()
    options = {"criterion": criterion, "progress": False}
    joint = fp.score(model, loader, granularity=fp.Unit(coupled=True), **options)
    alone = fp.score(model, loader, granularity=fp.Unit(), **options)
    assert joint.coupled == TIED
    for group in TIED:
        expected = JOINED[criterion](torch.stack([alone[name] for name in group]))
        for name in group:
            torch.testing.assert_close(joint[name], expected)
    for name in ("squeeze", "inside", "head"):
        assert torch.equal(joint[name], alone[name])


def test_a_joint_taylor_score_is_the_sum_of_signed_estimates():
    torch.manual_seed(4)
    model, loader = TiedNet(), images((6,))
    joint = fp.score(model, loader, criterion="taylor", granularity=fp.Unit(coupled=True), progress=False)
    model.eval()
    nn.functional.cross_entropy(model(loader[0][0]), loader[0][1]).backward()
    expected = torch.zeros(4, dtype=torch.float64)
    for layer in (model.left, model.right):
        expected += (layer.weight * layer.weight.grad).sum(1).double()
        expected += (layer.bias * layer.bias.grad).double()
    torch.testing.assert_close(joint["left"], expected.abs(), rtol=1e-4, atol=1e-7)


def test_the_change_of_the_gradient_is_that_of_the_joint_mask():
    torch.manual_seed(5)
    model, loader = TiedNet().double().eval(), [tuple(batch) for batch in images((6,))]
    loader = [(inputs.double(), targets) for inputs, targets in loader]
    joint = fp.score(
        model, loader, criterion="gradient_change", granularity=fp.Unit(coupled=True), progress=False
    )

    def gradient():
        model.zero_grad()
        nn.functional.cross_entropy(model(loader[0][0]), loader[0][1]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    before = gradient()
    masks = {name: torch.arange(4) != 2 for name in ("left", "right")}
    shapes = {name: model.get_submodule(name).weight.shape for name in masks}
    fp.apply_masks_(model, fp.Masks(masks, fp.Unit(), shapes))
    fp_gradient = []
    model.zero_grad()
    nn.functional.cross_entropy(model(loader[0][0]), loader[0][1]).backward()
    for name, _ in TiedNet().named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        own = name.rpartition(".")[2]
        masked = hasattr(owner, "parametrizations") and own in owner.parametrizations
        parameter = owner.parametrizations[own].original if masked else getattr(owner, own)
        fp_gradient.append(parameter.grad.flatten())
    expected = (torch.cat(fp_gradient) - before).norm()
    torch.testing.assert_close(joint["right"][2], expected)


def test_without_data_there_are_no_sums_to_find():
    with pytest.raises(TypeError, match="`loader` must be an iterable of batches for fp"):
        fp.score(TiedNet(), None, criterion="magnitude", granularity=fp.Unit(coupled=True))


def test_a_model_compressed_by_joint_units_prunes_them_in_all_layers():
    torch.manual_seed(6)
    model, loader = TiedNet(), images((16, 16))
    result = fp.compress(
        model, loader, loader, sparsity=0.3, rounds=2, epochs=1, granularity=fp.Unit(coupled=True),
        example_inputs=loader[0][0], progress=False,
    )  # fmt: skip
    weights = {name: result.model.get_submodule(name).weight.flatten(1) for group in TIED for name in group}
    gone = {name: (weight == 0).all(1).nonzero().flatten().tolist() for name, weight in weights.items()}
    assert any(gone.values())
    for group in TIED:
        assert all(gone[name] == gone[group[0]] for name in group)
