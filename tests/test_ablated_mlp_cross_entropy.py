"""ablated_mlp_cross_entropy: the fused loss deltas through one hidden layer, against the twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablation_cases import assert_exact, block_pieces, column_pieces, in_double
from fastprune import ops, reference

# samples, in_features, hidden, classes
CASES = [(1, 1, 1, 2), (15, 17, 15, 10), (17, 129, 17, 3), (129, 15, 151, 33), (193, 33, 129, 10)]
ACTIVATIONS = [None, *reference.ACTIVATIONS]


def make_problem(
    samples: int,
    in_features: int,
    hidden: int,
    classes: int,
    activation: str | None = "relu",
    *,
    scale: float = 1.0,
    first_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Logits, input, pre-activation, both weights and targets."""
    input = torch.randn(samples, in_features)
    first = torch.randn(hidden, in_features) * in_features**-0.5 * first_scale
    second = torch.randn(classes, hidden) * hidden**-0.5 * scale
    before = input @ first.T + torch.randn(hidden)
    units = before if activation is None else reference.ACTIVATIONS[activation](before)
    logits = units @ second.T + torch.randn(classes)
    return logits, input, before, first, second, torch.randint(0, classes, (samples,))


def assert_matches(problem: tuple[Tensor, ...], pieces: Tensor, *rest: str | Tensor | None) -> None:
    deltas = ops.ablated_mlp_cross_entropy(*problem, pieces, *rest)
    wanted = reference.ablated_mlp_cross_entropy(*problem, pieces, *rest)
    assert_exact(deltas, wanted, problem[0], problem[-1])


@pytest.mark.parametrize(("samples", "in_features", "hidden", "classes"), CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference(
    isa: str, samples: int, in_features: int, hidden: int, classes: int, activation: str | None
) -> None:
    problem = make_problem(samples, in_features, hidden, classes, activation)
    pieces = torch.cat(
        [
            block_pieces(hidden, in_features, 16, 16),
            block_pieces(hidden, in_features, 13, 7),
            block_pieces(hidden, in_features, 1, 5)[:50],
            column_pieces(hidden, in_features),
            torch.tensor([[0, hidden, 0, in_features], [1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.int32),
        ]
    )
    logits, targets = problem[0], problem[-1]
    for labels in (targets, logits.argmax(1)):
        assert_matches((*problem[:-1], labels), pieces, activation)


def test_deltas_are_those_of_masked_forwards(isa: str) -> None:
    logits, input, before, first, second, targets = in_double(make_problem(60, 20, 24, 7))
    pieces = block_pieces(24, 20, 16, 16)
    deltas = ops.ablated_mlp_cross_entropy(logits, input, before, first, second, targets, pieces, "relu")
    bias = logits - before.relu() @ second.T
    for piece, delta in zip(pieces.tolist(), deltas, strict=True):
        masked = first.clone()
        masked[piece[0] : piece[1], piece[2] : piece[3]] = 0
        units = (before - input @ (first - masked).T).relu()
        losses = [
            torch.nn.functional.cross_entropy(output, targets, reduction="sum")
            for output in (units @ second.T + bias, logits)
        ]
        torch.testing.assert_close(delta, losses[0] - losses[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("first_scale", [1e-6, 1e-3, 0.1, 10.0])
def test_small_steps_beside_large_units_keep_their_digits(
    isa: str, activation: str | None, first_scale: float
) -> None:
    # All pieces move the units the same way, so that no sum over samples hides the steps' errors.
    problem = list(make_problem(150, 31, 24, 10, activation, first_scale=first_scale))
    problem[1], problem[3] = problem[1].abs(), problem[3].abs()
    pieces = block_pieces(24, 31, 8, 16)
    deltas = ops.ablated_mlp_cross_entropy(*problem, pieces, activation)
    wanted = reference.ablated_mlp_cross_entropy(*problem, pieces, activation)
    torch.testing.assert_close(deltas, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_small_and_huge_logits_keep_their_digits(isa: str, scale: float) -> None:
    problem = make_problem(200, 31, 18, 10, scale=scale)
    logits = problem[0]
    for labels in (problem[-1], logits.argmax(1), logits.argmin(1)):
        assert_matches((*problem[:-1], labels), block_pieces(18, 31, 6, 8), "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_inputs_are_computed_in_double(isa: str, activation: str | None) -> None:
    problem = in_double(make_problem(90, 21, 18, 8, activation))
    pieces = torch.cat([block_pieces(18, 21, 16, 16), column_pieces(18, 21), block_pieces(18, 21, 1, 1)])
    torch.testing.assert_close(
        ops.ablated_mlp_cross_entropy(*problem, pieces, activation),
        reference.ablated_mlp_cross_entropy(*problem, pieces, activation),
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("poisoned", ["logits", "input", "pre_activation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(isa: str, poisoned: str, activation: str | None) -> None:
    problem = make_problem(40, 6, 5, 4, activation)
    problem[["logits", "input", "pre_activation"].index(poisoned)][11, 2] = torch.nan
    for pieces in (block_pieces(5, 6, 5, 6), torch.tensor([[2, 3, 2, 3]], dtype=torch.int32)):
        assert bool(ops.ablated_mlp_cross_entropy(*problem, pieces, activation).isnan().all())


def test_sample_weights_scale_and_leave_out(isa: str) -> None:
    logits, input, before, first, second, targets = make_problem(100, 12, 9, 7)
    sample_weight = torch.rand(100)
    sample_weight[::3] = 0
    input[0], logits[3], before[6] = torch.inf, torch.nan, torch.nan  # left out: must not reach the sum
    pieces = block_pieces(9, 12, 4, 5)
    deltas = ops.ablated_mlp_cross_entropy(
        logits, input, before, first, second, targets, pieces, "relu", sample_weight
    )
    kept = sample_weight != 0
    layers = (logits[kept], input[kept], before[kept], first, second, targets[kept])
    wanted = reference.ablated_mlp_cross_entropy(*layers, pieces, "relu", sample_weight[kept])
    assert_exact(deltas, wanted, logits[kept], targets[kept])


def test_sliced_inputs_give_the_same() -> None:
    logits, input, before, first, second, targets = make_problem(50, 20, 18, 6)
    pieces = block_pieces(18, 20, 7, 16)
    plain = ops.ablated_mlp_cross_entropy(logits, input, before, first, second, targets, pieces, "relu")
    sliced = ops.ablated_mlp_cross_entropy(
        torch.stack([logits, logits], dim=1).flatten(0, 1)[::2],
        torch.cat([input, input], dim=1)[:, :20],
        before.T.contiguous().T,
        first.T.contiguous().T,
        torch.cat([second, second], dim=1)[:, :18],
        targets,
        pieces,
        "relu",
    )
    assert torch.equal(sliced, plain)


def test_bits_do_not_depend_on_threads() -> None:
    problem = make_problem(1000, 64, 40, 10)
    pieces = torch.cat([block_pieces(40, 64, 16, 16), column_pieces(40, 64)])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ops.ablated_mlp_cross_entropy(*problem, pieces, "gelu"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_more_pieces_than_the_grid_of_spans_holds() -> None:
    # 3 chunks of samples times these pieces pass 2^20 sums: chunks are joined to spans.
    problem = make_problem(400, 3, 2, 2)
    pieces = block_pieces(2, 3, 1, 2).repeat(100_000, 1)
    deltas = ops.ablated_mlp_cross_entropy(*problem, pieces, "relu")
    few = ops.ablated_mlp_cross_entropy(*problem, pieces[:4], "relu")
    torch.testing.assert_close(deltas.view(-1, 4), few.expand(100_000, 4), rtol=1e-12, atol=1e-12)


def test_no_pieces_and_no_samples() -> None:
    problem = make_problem(5, 4, 3, 3)
    none = torch.zeros(0, 4, dtype=torch.int32)
    assert ops.ablated_mlp_cross_entropy(*problem, none, "relu").shape == (0,)
    logits, input, before, first, second, targets = problem
    empty = ops.ablated_mlp_cross_entropy(
        logits[:0], input[:0], before[:0], first, second, targets[:0], block_pieces(3, 4, 3, 1), "relu"
    )
    assert torch.equal(empty, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_opcheck_and_gradients(activation: str) -> None:
    *tensors, targets = in_double(make_problem(6, 5, 3, 4, None if activation == "none" else activation))
    pieces = block_pieces(3, 5, 2, 2)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(
        torch.ops.fastprune.ablated_mlp_cross_entropy.default, (*leaves, targets, pieces, activation, None)
    )
    name = None if activation == "none" else activation
    assert torch.autograd.gradcheck(
        lambda *inputs: ops.ablated_mlp_cross_entropy(*inputs, targets, pieces, name), leaves
    )


def test_autocast_keeps_float32() -> None:
    problem = make_problem(20, 6, 5, 4)
    pieces = block_pieces(5, 6, 2, 3)
    plain = ops.ablated_mlp_cross_entropy(*problem, pieces, "relu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.ablated_mlp_cross_entropy(*problem, pieces, "relu"), plain)


def _change(**changes):
    names = ("logits", "input", "pre_activation", "first_weight", "second_weight", "targets")
    arguments = dict(zip(names, make_problem(3, 4, 6, 5), strict=True))
    pieces = {"pieces": block_pieces(6, 4, 2, 2), "activation": "relu", "sample_weight": None}
    return {**arguments, **pieces, **changes}


BAD_ARGUMENTS = {
    "logits of one dimension": ("logits", _change(logits=torch.randn(5))),
    "half logits": ("logits", _change(logits=torch.randn(3, 5).half())),
    "input of other samples": ("input", _change(input=torch.randn(2, 4))),
    "pre_activation of other samples": ("pre_activation", _change(pre_activation=torch.randn(2, 6))),
    "pre_activation in double": ("pre_activation", _change(pre_activation=torch.randn(3, 6).double())),
    "first_weight of other units": ("first_weight", _change(first_weight=torch.randn(5, 4))),
    "first_weight of other features": ("first_weight", _change(first_weight=torch.randn(6, 3))),
    "second_weight of other classes": ("second_weight", _change(second_weight=torch.randn(4, 6))),
    "second_weight of other units": ("second_weight", _change(second_weight=torch.randn(5, 4))),
    "int32 targets": ("targets", _change(targets=torch.zeros(3, dtype=torch.int32))),
    "target out of range": ("targets", _change(targets=torch.tensor([0, 5, 1]))),
    "int64 pieces": ("pieces", _change(pieces=torch.zeros(1, 4, dtype=torch.int64))),
    "rows out of range": ("pieces", _change(pieces=torch.tensor([[0, 7, 0, 1]], dtype=torch.int32))),
    "columns out of range": ("pieces", _change(pieces=torch.tensor([[0, 5, 0, 5]], dtype=torch.int32))),
    "unknown activation": ("activation", _change(activation="tanh")),
    "sample_weight of another size": ("sample_weight", _change(sample_weight=torch.ones(4))),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        ops.ablated_mlp_cross_entropy(**arguments)
