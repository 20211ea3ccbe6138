"""sparsify_ on convolutions: which are swapped, and in which memory format the model is left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.modules.formats import format_of, is_channels_last
from helpers import Snapshot
from networks import MobileBlock, SamePadded, SmallConvNet, SmallResNet, SmallVGG, StaticallyPadded

pytestmark = pytest.mark.usefixtures("one_thread")

LAST, FIRST = torch.channels_last, torch.contiguous_format


def mask(model, sparsity=0.5, granularity=fp.Block(4, 4), **options):  # noqa: B008
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, **options)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))


def sparsify(model, x, **options):
    return fp.sparsify_(model, **{"example_inputs": x, "blocksize": (4, 4), "policy": "always", **options})


def kinds(model):
    return {
        name: type(module) for name, module in model.named_modules() if hasattr(module, "_fastprune_choice")
    }


def choice(model, name):
    line = next(line for line in fp.explain(model).splitlines() if line.startswith(f"{name} "))
    return line[line.index("dense:") if "dense:" in line else line.index("sparse:") :]


@pytest.fixture
def times(fake_medians):
    """Times that the tests choose, in the order: dense, sparse, and both again channels-last."""
    chosen = {"layer": [2.0, 1.0, 2.0, 1.0], "model": [2.0, 1.0, 2.0, 1.0], "layouts": [], "layers": 0}
    calls = []

    def fake(functions, **options):
        outputs = [function() for function in functions]
        if len(functions) > 1:
            chosen["layers"] += 1
            chosen["layer layouts"] = [is_channels_last(output[0]) for output in outputs]
            return chosen["layer"][: len(functions)]
        calls.append(1)
        chosen["layouts"].append(is_channels_last(outputs[0][0]))
        return [chosen["model"][(len(calls) - 1) % 4]]

    fake_medians(fake)
    return chosen


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", [SmallConvNet, SmallResNet, MobileBlock, SmallVGG])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_every_masked_convolution_is_swapped_and_the_model_gives_the_same(make, sparsity, channels_last):
    model = mask(make().eval(), sparsity, granularity=fp.Block(2, 3))
    x = torch.randn(3, 3, *((9, 7) if make is MobileBlock else (7, 5)))
    if channels_last:
        model, x = model.to(memory_format=LAST), x.contiguous(memory_format=LAST)
    expected = model(x)
    assert sparsify(model, x, blocksize=(2, 3)) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    dense = {
        name
        for name, kind in kinds(model).items()
        if kind not in (fp.BlockSparseConv2d, fp.BlockSparseLinear)
    }
    assert dense == {"depthwise"} & set(kinds(model))
    for name in dense:
        assert choice(model, name).startswith("dense: depthwise convolutions")
    assert format_of(model) == (LAST if channels_last else FIRST)
    # A batch of one, and of another size.
    for other in (x[:1], torch.cat([x, x])):
        assert model(other).shape == (len(other), 5)


def test_the_kernel_is_called_for_every_swapped_convolution(monkeypatch):
    model = mask(SmallResNet().eval())
    x = torch.randn(2, 3, 7, 5)
    sparsify(model, x)
    calls = []
    kernel = fp.ops.block_sparse_conv2d

    def counted(input, *args, **kwargs):
        calls.append(tuple(input.shape))
        return kernel(input, *args, **kwargs)

    monkeypatch.setattr(fp.ops, "block_sparse_conv2d", counted)
    model(x)
    assert calls == [(2, 3, 7, 5), (2, 4, 3, 2), (2, 6, 2, 1), (2, 4, 3, 2)]


def test_images_without_a_batch_are_served(times):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    mask(model)
    x = torch.randn(3, 7, 5)
    expected = model(x)
    sparsify(model, x, policy="measured")
    assert type(model[0]) is fp.BlockSparseConv2d
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_double_is_converted():
    model = mask(SmallResNet().double().eval())
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(sparsify(model, x)(x), expected)


class _Scaled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class _Unreached(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.other = conv(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.other(x)


WHY_DENSE = {
    "a block has 4 rows, which do not divide the 2 outputs of a group": lambda: nn.Conv2d(6, 6, 3, groups=3),
    "depthwise convolutions have one input channel in a group": lambda: nn.Conv2d(3, 12, 3, groups=3),
    "_Scaled has a forward of its own that does more than change the input": lambda: _Scaled(3, 4, 3),
    "no kernel for torch.bfloat16": lambda: nn.Conv2d(3, 4, 3).bfloat16(),
    "it has hooks or a forward of its own": lambda: _hooked(nn.Conv2d(3, 4, 3)),
}


def _hooked(conv):
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return conv


@pytest.mark.parametrize("reason", WHY_DENSE)
def test_convolutions_that_cannot_be_swapped_stay_dense_and_say_why(reason):
    model = nn.Sequential(WHY_DENSE[reason]())
    mask(model)
    x = torch.randn(2, model[0].in_channels, 7, 5, dtype=model[0].weight.dtype)
    expected = model(x)
    sparsify(model, x)
    assert torch.equal(model(x), expected)
    assert choice(model, "0").startswith(f"dense: {reason}")
    assert bool((model[0].weight == 0).any())


def test_a_convolution_that_is_the_model_or_is_never_reached_stays_dense(times):
    model = mask(nn.Conv2d(3, 4, 3))
    sparsify(model, torch.randn(2, 3, 7, 5))
    assert "dense: it is the model itself; use BlockSparseConv2d.from_dense" in fp.explain(model)
    model = mask(_Unreached(nn.Conv2d))
    sparsify(model, torch.randn(2, 3, 7, 5), policy="measured")
    assert choice(model, "conv") == "dense: the example inputs never reach it"
    model = mask(_Unreached(SamePadded))
    sparsify(model, torch.randn(2, 3, 7, 5))
    assert "SamePadded has a forward of its own, which the example inputs never reach" in fp.explain(model)


@pytest.mark.parametrize("kind", [SamePadded, StaticallyPadded])
def test_subclasses_keep_the_padding_of_their_own(kind):
    model = nn.Sequential(kind(3, 8, 3, stride=2), nn.ReLU(), kind(8, 4, (2, 3)))
    mask(model)
    x = torch.randn(2, 3, 15, 17)
    expected = model(x)
    sparsify(model, x)
    assert type(model[0]) is type(model[2]) is fp.BlockSparseConv2d
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_subclass_without_a_forward_of_its_own_is_a_convolution():
    class Initialised(nn.Conv2d):
        pass

    model = nn.Sequential(Initialised(3, 8, 3))
    mask(model)
    sparsify(model, torch.randn(2, 3, 7, 5))
    assert type(model[0]) is fp.BlockSparseConv2d


def test_masks_of_any_granularity_keep_every_block_in_which_anything_is_left():
    for granularity in (fp.Unit(), fp.InputUnit(), fp.Element(), fp.Block(3, 5)):
        model = mask(SmallVGG().eval(), granularity=granularity)
        x = torch.randn(2, 3, 7, 5)
        expected = model(x)
        sparsify(model, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_counts_with_the_better_of_the_two_formats_on_both_sides(times):
    x = torch.randn(2, 3, 7, 5)
    for seconds, converted in (
        ([1.0, 5.0, 9.0, 0.9], True),  # sparse is faster channels-last only, and than dense in any format
        ([9.0, 2.0, 1.0, 2.0], False),  # dense channels-last is the fastest
        ([1.0, 0.98, 1.0, 0.99], False),  # noise
    ):
        fp.modules.clear_layer_seconds()
        model = mask(nn.Sequential(nn.Conv2d(3, 4, 3)))
        times["layer"] = seconds
        sparsify(model, x, policy="measured")
        assert isinstance(model[0], fp.BlockSparseConv2d) is converted, seconds
        chosen = model[0]._fastprune_choice
        assert chosen.dense_seconds == min(seconds[0::2])
        assert chosen.sparse_seconds == min(seconds[1::2])


def test_layers_of_another_geometry_are_measured_anew(times):
    x = torch.randn(2, 3, 7, 5)
    convs = [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv2d(3, 4, 3, dilation=2),
    ]
    for count, conv in enumerate([*convs, nn.Conv2d(3, 4, 3)], start=1):
        model = nn.Sequential(conv)
        fp.apply_masks_(
            model,
            fp.Masks({"0": torch.eye(9, dtype=torch.bool)[:1]}, fp.Block(4, 4), {"0": conv.weight.shape}),
        )
        sparsify(model, x, policy="measured")
        assert times["layers"] == min(count, len(convs))


FASTEST = {
    "sparse": ([2.0, 1.0, 2.0, 1.5], True, FIRST),
    "sparse, channels-last": ([2.0, 1.5, 2.0, 1.0], True, LAST),
    "sparse, but slower than dense within the noise": ([2.0, 1.5, 1.0, 1.02], True, LAST),
    "dense": ([1.0, 2.0, 1.5, 2.0], False, FIRST),
    "dense, channels-last": ([1.5, 1.4, 1.0, 1.4], False, LAST),
    "dense, channels-last by less than the noise": ([1.0, 2.0, 0.98, 2.0], False, FIRST),
}


@pytest.mark.parametrize("kind", FASTEST)
def test_the_model_is_left_in_the_form_that_is_the_fastest(times, kind):
    times["model"], sparse, memory_format = FASTEST[kind]
    model = mask(SmallConvNet().eval(), include=["conv2", "skip"], granularity=fp.Block(4, 3))
    parameters = {id(parameter) for parameter in (model.conv1.weight, model.depthwise.weight)}
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    sparsify(model, x, policy="measured", blocksize=(4, 3))
    assert isinstance(model.conv2, fp.BlockSparseConv2d) is sparse
    assert isinstance(model.skip, fp.BlockSparseConv2d) is sparse
    assert format_of(model) == memory_format
    assert is_channels_last(model.conv1.weight) is (memory_format == LAST)
    assert ("convolutions run channels-last" in fp.explain(model)) is (memory_format == LAST)
    # All four candidates ran, each in its format; the dense layers that are left kept their parameters.
    assert {id(parameter) for parameter in (model.conv1.weight, model.depthwise.weight)} == parameters
    if sparse:
        assert model.conv2.channels_last is (memory_format == LAST)
    else:
        assert choice(model, "conv2") == "dense: the whole model is slower with sparse layers"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_each_candidate_runs_in_its_format_though_the_input_is_contiguous(times):
    model = mask(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()))
    sparsify(model, torch.randn(2, 3, 7, 6), policy="measured")
    assert times["layouts"][:4] == [False, False, True, True]
    assert times["layer layouts"] == [False, False, True, True]


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-3, 15), (0.12, 10), (60.0, 5)])
def test_a_large_model_is_measured_less_often(times, seconds, rounds):
    times["model"] = [seconds] * 4
    model = mask(nn.Sequential(nn.Conv2d(3, 4, 3)))
    sparsify(model, torch.randn(2, 3, 7, 5), policy="measured")
    assert len(times["layouts"]) == 4 * rounds


def test_a_channels_last_model_stays_so_where_its_layers_lose(times):
    times["layer"] = [1.0, 2.0, 1.0, 2.0]
    model = mask(SmallResNet().eval().to(memory_format=LAST))
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    sparsify(model, x, policy="measured")
    assert not times["layouts"]  # nothing to compare
    assert is_channels_last(model.conv1.weight)
    assert torch.equal(model(x), expected)


def test_a_model_goes_from_channels_last_to_contiguous_where_that_is_faster(times):
    times["model"] = [1.0, 1.4, 1.5, 1.4]
    model = mask(SmallResNet().eval().to(memory_format=LAST))
    sparsify(model, torch.randn(2, 3, 7, 5), policy="measured")
    assert format_of(model) == FIRST


@pytest.mark.parametrize("fails_at", [1, 2, 4, 5, 6, 9])
@pytest.mark.parametrize("fold", [False, True])
def test_an_interrupt_while_measuring_leaves_the_model_as_it_was(fake_medians, fails_at, fold):
    calls = []

    def interrupted(functions, **options):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return [2.0, 1.0, 2.0, 1.0][: len(functions)]

    fake_medians(interrupted)
    model = mask(SmallVGG(), include=["0", "3"])
    snapshot = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, torch.randn(2, 3, 7, 5), policy="measured", fold_batch_norm=fold)
    assert len(calls) == fails_at
    snapshot.assert_unchanged()


def test_the_real_measurement_runs_and_reports_both_times():
    model = mask(SmallResNet().eval(), granularity=fp.Block(4, 4))
    x = torch.randn(2, 3, 15, 17)
    expected = model(x)
    sparsify(model, x, policy="measured")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    for name in ("stem", "conv1", "conv2", "shortcut", "head"):
        measured = model.get_submodule(name)._fastprune_choice
        assert measured.dense_seconds > 0
        assert measured.sparse_seconds > 0


def test_a_converted_model_trains_and_copies():
    model = mask(SmallResNet())
    x = torch.randn(4, 3, 7, 5)
    sparsify(model, x).train()
    duplicate = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    targets = torch.randint(0, 5, (4,))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert model.conv1.packed_values.grad is not None
    assert not torch.equal(model.conv1.packed_values, duplicate.conv1.packed_values)


def test_explain_lists_convolutions_that_were_built_by_hand():
    model = nn.Sequential(fp.BlockSparseConv2d.from_dense(nn.Conv2d(8, 16, 3, groups=2), (8, 4)))
    assert "16x36" in fp.explain(model)
    assert choice(model, "0") == "sparse: not measured here, blocks of 8x4"


def test_efficientnet_is_converted_with_its_own_padding():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    mask(network, 0.8, granularity=fp.Block(8, 8))
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected = network(x)
        assert expected.abs().max() > 1e-3
        for fold in (False, True):
            model = copy.deepcopy(network)
            sparsify(model, x, blocksize=(8, 8), fold_batch_norm=fold)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
            assert convolutions
            assert all(conv.groups == conv.in_channels for conv in convolutions)
            sparse = [module for module in model.modules() if isinstance(module, fp.BlockSparseConv2d)]
            assert len(sparse) == 33
            assert all(layer.own_class.__name__ == "Conv2dStaticSamePadding" for layer in sparse)
            assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) is not fold
