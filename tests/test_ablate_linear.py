"""ablate_linear: outputs under masked pieces against the reference twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablation_cases import block_pieces, column_pieces, in_double
from fastprune import ops, reference

# samples, in_features, out_features
CASES = [(1, 1, 1), (1, 15, 17), (15, 17, 15), (17, 129, 151), (129, 15, 64), (31, 151, 129)]


def make_problem(samples: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    input, weight = torch.randn(samples, in_features), torch.randn(out_features, in_features)
    return input @ weight.T + torch.randn(out_features), input, weight


@pytest.mark.parametrize(("samples", "in_features", "out_features"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_reference(
    isa: str, samples: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    problem = [tensor.to(dtype) for tensor in make_problem(samples, in_features, out_features)]
    pieces = torch.cat(
        [
            block_pieces(out_features, in_features, 16, 16)[:90],
            block_pieces(out_features, in_features, 70, 5)[:40],
            block_pieces(out_features, in_features, 1, 1)[:20],
            block_pieces(out_features, in_features, out_features, 32),
            column_pieces(out_features, in_features)[:20],
            torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.int32),
        ]
    )
    masked = ops.ablate_linear(*problem, pieces)
    wanted = reference.ablate_linear(*in_double(problem), pieces)
    assert masked.dtype == dtype
    assert masked.is_contiguous()
    bound = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * in_features**0.5 * 8
    torch.testing.assert_close(masked.double(), wanted, rtol=bound, atol=bound)
    # Outside the piece's rows the output is copied as it is.
    rows = torch.arange(out_features)
    kept = (rows < pieces[:, :1]) | (rows >= pieces[:, 1:2])
    assert torch.equal(masked.transpose(1, 2)[kept], problem[0].T.expand(len(pieces), -1, -1)[kept])


def test_nan_and_inf_stay_in_their_sample_and_rows(isa: str) -> None:
    output, input, weight = make_problem(20, 6, 19)
    input[11, 2] = torch.nan
    masked = ops.ablate_linear(output, input, weight, torch.tensor([[3, 18, 2, 4]], dtype=torch.int32))[0]
    assert bool(masked[11, 3:18].isnan().all())
    assert int(masked.isnan().sum()) == 15


def test_sliced_inputs_give_the_same() -> None:
    output, input, weight = make_problem(50, 20, 33)
    pieces = block_pieces(33, 20, 16, 16)
    plain = ops.ablate_linear(output, input, weight, pieces)
    sliced = ops.ablate_linear(
        torch.cat([output, output], dim=1)[:, 33:],
        torch.stack([input, input], dim=1).flatten(0, 1)[::2],
        weight.T.contiguous().T,
        pieces,
    )
    assert torch.equal(sliced, plain)


def test_bits_do_not_depend_on_threads_or_on_the_other_samples(isa: str) -> None:
    output, input, weight = make_problem(1001, 64, 70)
    pieces = torch.cat([block_pieces(70, 64, 16, 16), column_pieces(70, 64)[:5]])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ops.ablate_linear(output, input, weight, pieces))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert torch.equal(ops.ablate_linear(output[37:40], input[37:40], weight, pieces), results[0][:, 37:40])


def test_no_pieces_and_no_samples() -> None:
    output, input, weight = make_problem(5, 4, 3)
    none = torch.zeros(0, 4, dtype=torch.int32)
    assert ops.ablate_linear(output, input, weight, none).shape == (0, 5, 3)
    assert ops.ablate_linear(output[:0], input[:0], weight, column_pieces(3, 4)).shape == (4, 0, 3)


def test_opcheck_and_gradients() -> None:
    leaves = [tensor.requires_grad_() for tensor in in_double(make_problem(6, 5, 4))]
    pieces = block_pieces(4, 5, 2, 2)
    torch.library.opcheck(torch.ops.fastprune.ablate_linear.default, (*leaves, pieces))
    assert torch.autograd.gradcheck(lambda *tensors: ops.ablate_linear(*tensors, pieces), leaves)


def _change(**changes):
    output, input, weight = make_problem(3, 4, 5)
    pieces = column_pieces(5, 4)
    return {"output": output, "input": input, "weight": weight, "pieces": pieces, **changes}


BAD_ARGUMENTS = {
    "output of one dimension": ("output", _change(output=torch.randn(5))),
    "half output": ("output", _change(output=torch.randn(3, 5).half())),
    "input of other samples": ("input", _change(input=torch.randn(2, 4))),
    "input in double": ("input", _change(input=torch.randn(3, 4).double())),
    "weight of other outputs": ("weight", _change(weight=torch.randn(4, 4))),
    "weight of other inputs": ("weight", _change(weight=torch.randn(5, 3))),
    "int64 pieces": ("pieces", _change(pieces=torch.zeros(1, 4, dtype=torch.int64))),
    "pieces of three numbers": ("pieces", _change(pieces=torch.zeros(1, 3, dtype=torch.int32))),
    "rows out of range": ("pieces", _change(pieces=torch.tensor([[0, 6, 0, 1]], dtype=torch.int32))),
    "columns reversed": ("pieces", _change(pieces=torch.tensor([[0, 5, 2, 1]], dtype=torch.int32))),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        ops.ablate_linear(**arguments)
