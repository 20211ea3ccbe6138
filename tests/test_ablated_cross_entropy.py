"""ablated_cross_entropy: the fused loss deltas against the reference twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablation_cases import assert_exact as assert_sums_exact
from ablation_cases import block_pieces, column_pieces, in_double
from fastprune import ops, reference

CASES = [(1, 1, 2), (1, 15, 3), (15, 17, 10), (17, 129, 151), (129, 15, 10), (257, 33, 5), (600, 151, 17)]
# Tables of weights in one vector, in two, and in none, for every instruction set.
CASES += [(193, 5, classes) for classes in (8, 9, 16, 31, 32, 33)]


def make_problem(
    samples: int, features: int, classes: int, *, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden = torch.randn(samples, features).relu()
    weight = torch.randn(classes, features) * scale
    logits = hidden @ weight.T + torch.randn(classes)
    return logits, hidden, weight, torch.randint(0, classes, (samples,))


def unit_pieces(features: int, classes: int) -> Tensor:
    return column_pieces(classes, features)


def assert_exact(
    deltas: Tensor, logits: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Tensor
) -> None:
    wanted = reference.ablated_cross_entropy(logits, hidden, weight, targets, *rest)
    assert_sums_exact(deltas, wanted, logits, targets)


@pytest.mark.parametrize(("samples", "features", "classes"), CASES)
@pytest.mark.parametrize("kind", ["units", "blocks", "single rows", "empty"])
def test_matches_the_reference(isa: str, samples: int, features: int, classes: int, kind: str) -> None:
    logits, hidden, weight, targets = make_problem(samples, features, classes)
    pieces = {
        "units": unit_pieces(features, classes),
        "blocks": block_pieces(classes, features, max(4, classes // 8), max(3, features // 8)),
        "single rows": block_pieces(classes, features, 1, features),
        "empty": torch.tensor([[1, 1, 0, features], [0, classes, 1, 1]], dtype=torch.int32),
    }[kind]
    for labels in (targets, logits.argmax(1)):
        deltas = ops.ablated_cross_entropy(logits, hidden, weight, labels, pieces)
        assert_exact(deltas, logits, hidden, weight, labels, pieces)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 30.0, 1000.0])
def test_small_and_huge_logits_keep_their_digits(isa: str, scale: float) -> None:
    logits, hidden, weight, targets = make_problem(200, 31, 10, scale=scale)
    for labels in (targets, logits.argmax(1), logits.argmin(1)):
        pieces = torch.cat([unit_pieces(31, 10), block_pieces(10, 31, 3, 8)])
        deltas = ops.ablated_cross_entropy(logits, hidden, weight, labels, pieces)
        assert_exact(deltas, logits, hidden, weight, labels, pieces)


def test_deltas_of_a_well_trained_network_are_not_lost_in_rounding() -> None:
    # Losses of about 1e-12: a difference of two float32 losses would be exactly 0.
    logits, hidden, weight, targets = make_problem(64, 16, 5, scale=0.01)
    logits = logits + 30.0 * torch.nn.functional.one_hot(targets, 5)
    pieces = unit_pieces(16, 5)
    deltas = ops.ablated_cross_entropy(logits, hidden, weight, targets, pieces)
    wanted = reference.ablated_cross_entropy(logits, hidden, weight, targets, pieces)
    plain = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert plain < 1e-9
    # float64's own rounding of logits of 30 is 1e-15 for each sample.
    torch.testing.assert_close(deltas, wanted, rtol=1e-3, atol=64 * 4e-15)


def test_the_small_probability_of_a_far_class_keeps_its_digits() -> None:
    # In float32 a difference of logits of 70 is rounded by up to 4e-6, and so would be its exponential.
    pieces = torch.tensor([[1, 2, 0, 1]], dtype=torch.int32)
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [0.5]])
    for logits in (torch.rand(50, 1, 2) * 10 + torch.tensor([60.0, -10.0])).unbind():
        delta = ops.ablated_cross_entropy(logits, hidden, weight, torch.zeros(1, dtype=torch.int64), pieces)
        probability = logits.double().softmax(1)[:, 1]
        # float64 has no such digits of the losses themselves: the formula, by hand.
        wanted = torch.log1p(probability * torch.expm1(torch.tensor(-0.5, dtype=torch.float64)))
        torch.testing.assert_close(delta, wanted, rtol=6e-7, atol=0.0)


def test_masked_classes_at_minus_infinity_stay_out(isa: str) -> None:
    logits, hidden, weight, _ = make_problem(20, 9, 6)
    logits[:, 5] = -torch.inf
    targets = torch.randint(0, 5, (20,))
    pieces = unit_pieces(9, 6)
    deltas = ops.ablated_cross_entropy(logits, hidden, weight, targets, pieces)
    assert_exact(deltas, logits, hidden, weight, targets, pieces)


@pytest.mark.parametrize("poisoned", ["logits", "hidden"])
def test_nan_is_not_swallowed(isa: str, poisoned: str) -> None:
    logits, hidden, weight, targets = make_problem(40, 6, 4)
    {"logits": logits, "hidden": hidden}[poisoned][11, 2] = torch.nan
    deltas = ops.ablated_cross_entropy(logits, hidden, weight, targets, unit_pieces(6, 4))
    assert bool(deltas[2].isnan())


def test_sample_weights_scale_and_leave_out(isa: str) -> None:
    logits, hidden, weight, targets = make_problem(100, 12, 7)
    sample_weight = torch.rand(100)
    sample_weight[::3] = 0
    hidden[0] = torch.inf  # left out, so it must not reach the sum
    logits[0] = torch.nan
    pieces = block_pieces(7, 12, 2, 5)
    deltas = ops.ablated_cross_entropy(logits, hidden, weight, targets, pieces, sample_weight)
    kept = slice(1, None)
    assert_exact(deltas, logits[kept], hidden[kept], weight, targets[kept], pieces, sample_weight[kept])


def test_double_inputs_are_computed_in_double(isa: str) -> None:
    problem = [
        tensor.double() if tensor.is_floating_point() else tensor for tensor in make_problem(90, 21, 8)
    ]
    pieces = torch.cat([unit_pieces(21, 8), block_pieces(8, 21, 3, 4)])
    torch.testing.assert_close(
        ops.ablated_cross_entropy(*problem, pieces),
        reference.ablated_cross_entropy(*problem, pieces),
        rtol=1e-11,
        atol=1e-11,
    )


def test_sliced_inputs_give_the_same() -> None:
    logits, hidden, weight, targets = make_problem(50, 20, 6)
    pieces = unit_pieces(20, 6)
    plain = ops.ablated_cross_entropy(logits, hidden, weight, targets, pieces)
    wide = torch.cat([hidden, hidden], dim=1)[:, :20]
    transposed = weight.T.contiguous().T
    every_second = torch.stack([logits, logits], dim=1).flatten(0, 1)[::2]
    assert torch.equal(ops.ablated_cross_entropy(every_second, wide, transposed, targets, pieces), plain)


def test_bits_do_not_depend_on_threads() -> None:
    logits, hidden, weight, targets = make_problem(1000, 64, 10)
    pieces = torch.cat([unit_pieces(64, 10), block_pieces(10, 64, 4, 16)])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ops.ablated_cross_entropy(logits, hidden, weight, targets, pieces))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_no_pieces_and_no_samples() -> None:
    logits, hidden, weight, targets = make_problem(5, 4, 3)
    none = torch.zeros(0, 4, dtype=torch.int32)
    assert ops.ablated_cross_entropy(logits, hidden, weight, targets, none).shape == (0,)
    empty = ops.ablated_cross_entropy(logits[:0], hidden[:0], weight, targets[:0], unit_pieces(4, 3))
    assert torch.equal(empty, torch.zeros(4, dtype=torch.float64))


def test_opcheck_and_gradients() -> None:
    logits, hidden, weight, targets = in_double(make_problem(6, 5, 4))
    pieces = block_pieces(4, 5, 2, 2)
    leaves = [tensor.requires_grad_() for tensor in (logits, hidden, weight)]
    torch.library.opcheck(torch.ops.fastprune.ablated_cross_entropy.default, (*leaves, targets, pieces, None))
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.ablated_cross_entropy(*tensors, targets, pieces), leaves
    )


def _change(**changes):
    logits, hidden, weight, targets = make_problem(3, 4, 5)
    arguments = {"logits": logits, "hidden": hidden, "weight": weight, "targets": targets}
    return {**arguments, "pieces": unit_pieces(4, 5), "sample_weight": None, **changes}


BAD_ARGUMENTS = {
    "logits of one dimension": ("logits", _change(logits=torch.randn(5))),
    "half logits": ("logits", _change(logits=torch.randn(3, 5).half())),
    "hidden of other samples": ("hidden", _change(hidden=torch.randn(2, 4))),
    "weight of other classes": ("weight", _change(weight=torch.randn(4, 4))),
    "weight of other features": ("weight", _change(weight=torch.randn(5, 3))),
    "int32 targets": ("targets", _change(targets=torch.zeros(3, dtype=torch.int32))),
    "target out of range": ("targets", _change(targets=torch.tensor([0, 5, 1]))),
    "ignored target": ("targets", _change(targets=torch.tensor([0, -100, 1]))),
    "int64 pieces": ("pieces", _change(pieces=torch.zeros(1, 4, dtype=torch.int64))),
    "pieces of three numbers": ("pieces", _change(pieces=torch.zeros(1, 3, dtype=torch.int32))),
    "rows out of range": ("pieces", _change(pieces=torch.tensor([[0, 6, 0, 1]], dtype=torch.int32))),
    "columns out of range": ("pieces", _change(pieces=torch.tensor([[0, 5, 0, 5]], dtype=torch.int32))),
    "rows reversed": ("pieces", _change(pieces=torch.tensor([[3, 2, 0, 1]], dtype=torch.int32))),
    "sample_weight of another size": ("sample_weight", _change(sample_weight=torch.ones(4))),
    "sample_weight of another dtype": ("sample_weight", _change(sample_weight=torch.ones(3).double())),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        ops.ablated_cross_entropy(**arguments)
