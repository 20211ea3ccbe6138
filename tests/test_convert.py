"""sparsify_ and explain: masked layers become block-sparse ones that are really called, or say why not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.modules import clear_layer_seconds, formats, linear, swap_modules
from helpers import Snapshot, masked_mlp, mlp
from networks import SharedLayer, SigmoidLinear, SmallConvNet, TwoInputs, WritesIntoInput

pytestmark = pytest.mark.usefixtures("one_thread")


def mask(model, sparsity=0.5, granularity=fp.Block(4, 4), **options):  # noqa: B008
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, **options)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))


def always(model, example_inputs, **options):
    options = {"blocksize": (4, 4), "policy": "always", **options}
    return fp.sparsify_(model, example_inputs=example_inputs, **options)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The shapes of the inputs that reach the block-sparse kernel."""
    calls = []
    kernel = linear.ops.block_sparse_linear

    def counted(input, *args, **kwargs):
        calls.append(tuple(input.shape))
        return kernel(input, *args, **kwargs)

    monkeypatch.setattr(linear.ops, "block_sparse_linear", counted)
    return calls


@pytest.fixture
def timings(fake_medians):
    """Times that the tests choose: of a dense and a sparse layer, and of the whole model either way."""
    chosen = {"layer": [2.0, 1.0], "model": [1.0, 1.0]}
    alternating = []

    def fake(functions, **options):
        for function in functions:
            function()
        if len(functions) == 2:
            return chosen["layer"]
        alternating.append(1)
        return [chosen["model"][(len(alternating) - 1) % 2]]

    fake_medians(fake)
    return chosen


def test_every_masked_linear_is_swapped_and_the_model_gives_the_same(kernel_calls):
    model, x = masked_mlp(0.5)
    expected = model(x)
    assert always(model, x) is model
    assert [type(module) for module in model] == [fp.BlockSparseLinear, nn.ReLU, fp.BlockSparseLinear]
    kernel_calls.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert kernel_calls == [(6, 17), (6, 33)]
    assert model[0].density == pytest.approx(0.5, abs=0.1)


def test_a_layer_is_swapped_only_where_sparse_is_measured_faster(timings):
    model, x = masked_mlp(0.5)
    expected = model(x)
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    fp.sparsify_(fast, example_inputs=x, blocksize=(4, 4))
    assert isinstance(fast[0], fp.BlockSparseLinear)
    assert "measured faster" in fp.explain(fast)
    assert "2.00x" in fp.explain(fast)
    clear_layer_seconds()
    timings["layer"] = [1.0, 1.0]
    fp.sparsify_(slow, example_inputs=x, blocksize=(4, 4))
    assert type(slow[0]) is type(slow[2]) is nn.Linear
    assert "dense: dense is faster" in fp.explain(slow)
    for model in (fast, slow):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_conversion_is_taken_back_where_the_whole_model_became_slower(timings):
    model, x = masked_mlp(0.5)
    expected = model(x)
    timings["model"] = [1.0, 1.0 + 2 * (formats.TOLERATED_SLOWDOWN - 1)]
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)
    assert fp.explain(model).count("the whole model is slower") == 2


def test_layers_that_stay_dense_keep_plain_zeros(timings):
    timings["layer"] = [1.0, 2.0]
    model, x = masked_mlp(0.5)
    zeros = [model[0].weight == 0, model[2].weight == 0]
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4))
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight == 0, zeros[0])
    assert torch.equal(model[2].weight == 0, zeros[1])


class _Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


PADDING = torch.arange(6)[None] >= torch.tensor([6, 3, 1])[:, None]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", ["encoder.layers.*", "encoder.layers.1.linear2"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_a_converted_encoder_calls_the_sparse_layers_in_eval_mode(kernel_calls, layers, padding, norm_first):
    model = _Encoder(norm_first=norm_first).eval()
    mask(model, include=layers, exclude="*out_proj")
    x = torch.randn(3, 6, 16)
    kept = slice(None) if padding is None else ~padding
    with torch.no_grad():
        expected = model(x, padding)
        always(model, (x, padding))
        converted = [name for name, m in model.named_modules() if isinstance(m, fp.BlockSparseLinear)]
        assert len(converted) == (4 if layers.endswith("*") else 1)
        kernel_calls.clear()
        output = model(x, padding)
        assert len(kernel_calls) == len(converted)
    torch.testing.assert_close(output[kept], expected[kept], rtol=1e-4, atol=1e-5)
    kernel_calls.clear()
    model.train()(x, padding)
    assert len(kernel_calls) == len(converted)


def test_an_encoder_keeps_its_fast_path_where_nothing_was_swapped(timings):
    timings["layer"] = [1.0, 2.0]
    model = mask(_Encoder().eval(), exclude="*out_proj")
    flags = [layer.activation_relu_or_gelu for layer in model.encoder.layers]
    fp.sparsify_(model, example_inputs=torch.randn(2, 3, 16), blocksize=(4, 4))
    assert [layer.activation_relu_or_gelu for layer in model.encoder.layers] == flags
    assert model.encoder.use_nested_tensor


def test_attention_stays_dense_and_says_why():
    model = mask(_Encoder().eval())
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = model(x)
        always(model, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    out_proj = model.encoder.layers[0].self_attn.out_proj
    assert isinstance(out_proj, nn.Linear)
    assert int((out_proj.weight == 0).sum()) > 0
    line = next(line for line in fp.explain(model).splitlines() if "0.self_attn.out_proj" in line)
    assert "dense: torch's attention never calls the layer" in line


def test_norms_are_no_layers():
    model = SmallConvNet().eval()
    x = torch.randn(2, 3, 7, 5)
    scores = fp.score(model, [(x, torch.tensor([0, 1]))], granularity=fp.Unit(), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=0.4))
    expected = model(x)
    always(model, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    report = fp.explain(model)
    assert "conv1" in report
    assert "norm1" not in report
    assert not hasattr(model.norm1, "parametrizations")


WHY_DENSE = {
    "SigmoidLinear may have a forward of its own": lambda: (
        mask(nn.Sequential(SigmoidLinear(16, 32), nn.ReLU(), SigmoidLinear(32, 8))),
        torch.randn(2, 16),
    ),
    "it is the model itself": lambda: (mask(nn.Linear(16, 32)), torch.randn(2, 16)),
}


@pytest.mark.parametrize("reason", WHY_DENSE)
def test_layers_that_cannot_be_swapped_stay_dense_and_say_why(reason):
    model, x = WHY_DENSE[reason]()
    expected = model(x)
    assert fp.sparsify_(model, example_inputs=x, policy="always") is model
    assert torch.equal(model(x), expected)
    assert f"dense: {reason}" in fp.explain(model)


def test_a_layer_that_the_example_never_reaches_is_not_measured(timings):
    model = mask(TwoInputs())
    fp.sparsify_(model, example_inputs=torch.randn(4, 7), blocksize=(4, 4))
    assert type(model.right) is nn.Linear
    assert "the example inputs never reach it" in fp.explain(model)
    assert isinstance(model.left, fp.BlockSparseLinear)


def test_a_shared_layer_is_swapped_everywhere(kernel_calls):
    model = mask(SharedLayer())
    x = torch.randn(3, 7)
    expected = model(x)
    always(model, x)
    assert model.layer is model.again
    kernel_calls.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(kernel_calls) == 4


def test_example_inputs_may_be_a_tensor_a_tuple_a_dict_or_a_list_of_these(timings, kernel_calls):
    left, right = torch.randn(4, 7), torch.randn(4, 4)
    forms = [left, (left, right), {"left": left, "right": right}, [left, (left[:1], right[:1])]]
    for form in forms:
        model = mask(TwoInputs())
        fp.sparsify_(model, example_inputs=form, blocksize=(4, 4))
        assert isinstance(model.left, fp.BlockSparseLinear)
        kernel_calls.clear()
        model(left, right)
        assert len(kernel_calls) == (2 if form is left else 3)


def test_a_layer_called_with_a_keyword_is_measured(timings):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            return self.layer(input=x)

    model = mask(Keyword())
    fp.sparsify_(model, example_inputs=torch.randn(2, 16), blocksize=(4, 4))
    assert isinstance(model.layer, fp.BlockSparseLinear)


def test_flags_frozen_parameters_and_gradients_survive():
    model, x = masked_mlp(0.5)
    model.train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    always(model, x)
    assert [module.training for module in model] == [True, True, False]
    assert model[0].packed_values.requires_grad
    assert not model[0].bias.requires_grad
    model(x).sum().backward()
    assert model[0].packed_values.grad is not None


def test_masks_of_elements_keep_every_block_in_which_anything_is_left():
    model = nn.Sequential(nn.Linear(9, 7))
    keep = torch.zeros(7, 9, dtype=torch.bool)
    keep[0, 0] = keep[6, 8] = keep[2, 5] = True
    fp.apply_masks_(model, fp.Masks({"0": keep}, fp.Element(), {"0": keep.shape}))
    x = torch.randn(2, 9)
    expected = model(x)
    always(model, x)
    assert model[0].packed_values.shape[0] == 3
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_kept_block_that_is_zero_stays_trainable():
    model, x = masked_mlp(0.5)
    with torch.no_grad():
        model[0].parametrizations.weight.original.zero_()
    kept = model[0].parametrizations.weight[0].mask.sum() / 16
    always(model, x)
    assert model[0].packed_values.shape[0] >= int(kept)


def test_a_model_without_masks_is_told_so():
    model = mlp()
    snapshot = Snapshot(model)
    with pytest.warns(UserWarning, match="found no masked layer"):
        fp.sparsify_(model, example_inputs=torch.randn(2, 7))
    snapshot.assert_unchanged()
    assert fp.explain(model) == "no pruned layers"


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("example_inputs", None, TypeError),
        ("example_inputs", 3, TypeError),
        ("example_inputs", [torch.randn(2, 17), None], TypeError),
        ("example_inputs", [], ValueError),
        ("blocksize", (0, 4), ValueError),
        ("blocksize", 16, ValueError),
        ("policy", "never", ValueError),
        ("policy", None, ValueError),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_is_unchanged(argument, value, error):
    model, x = masked_mlp(0.5)
    snapshot = Snapshot(model)
    with pytest.raises(error, match=f"`{argument}`"):
        fp.sparsify_(model, **{"example_inputs": x, argument: value})
    snapshot.assert_unchanged()


@pytest.mark.parametrize("call", [fp.explain, lambda model: fp.sparsify_(model, example_inputs=None)])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match="`model`"):
        call("model")


def test_example_inputs_are_not_written_into(timings):
    model, x = mask(WritesIntoInput()), torch.randn(4, 7)
    before = x.clone()
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4))
    assert torch.equal(x, before)


def test_inputs_that_the_model_refuses_leave_it_as_it_was():
    model, _ = masked_mlp(0.5)
    model[2].eval()
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError):
        fp.sparsify_(model, example_inputs=torch.randn(2, 18), policy="always")
    snapshot.assert_unchanged()


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 7])
def test_an_interrupt_while_measuring_leaves_the_model_as_it_was(fake_medians, fails_at):
    calls = []

    def interrupted(functions, **options):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return [2.0, 1.0][: len(functions)]

    fake_medians(interrupted)
    model = mask(_Encoder(), include=["*.0.linear1", "*.1.linear1"]).eval()
    snapshot = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        fp.sparsify_(model, example_inputs=torch.randn(2, 3, 16), blocksize=(4, 4))
    assert len(calls) == fails_at
    snapshot.assert_unchanged()


def test_swapped_modules_go_back():
    model = SharedLayer()
    snapshot = Snapshot(model)
    revert = swap_modules(model, {"layer": nn.Identity()})
    assert isinstance(model.again, nn.Identity)
    revert()
    snapshot.assert_unchanged()


def test_explain_lists_layers_that_were_built_by_hand():
    model = nn.Sequential(fp.BlockSparseLinear.from_dense(nn.Linear(32, 16)), nn.ReLU())
    report = fp.explain(model)
    assert "16x32" in report
    assert "sparse: not measured here" in report


def test_the_real_measurement_runs_and_reports_both_times():
    model, x = masked_mlp(0.5, block=(16, 16), sizes=(64, 64, 64))
    expected = model(x[:1].expand(8, -1))
    fp.sparsify_(model, example_inputs=x)
    torch.testing.assert_close(model(x[:1].expand(8, -1)), expected, rtol=1e-4, atol=1e-5)
    for name in ("0", "2"):
        choice = model.get_submodule(name)._fastprune_choice
        assert choice.dense_seconds > 0
        assert choice.sparse_seconds > 0
