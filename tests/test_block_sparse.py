"""BlockSparseTensor: round trips of any structure, and refusal of what is none."""

from __future__ import annotations

import copy
import itertools
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import fastprune as fp

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (BSR|CSR) tensor support is in beta")

SIDES = st.integers(1, 37)
BLOCKS = st.tuples(st.integers(1, 20), st.integers(1, 20))


def _random(shape, block, density, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    mask = torch.rand(fp.Block(*block).shape(torch.Size(shape)), generator=generator) < density
    return weight, mask


@hypothesis.given(st.tuples(SIDES, SIDES), BLOCKS, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_a_matrix_comes_back_with_the_blocks_outside_the_mask_zero(shape, block, density, seed):
    weight, mask = _random(shape, block, density, seed)
    sparse = fp.BlockSparseTensor.from_dense(weight, block, mask)
    expected = weight * fp.Block(*block).expand(mask, weight.shape)
    assert torch.equal(sparse.to_dense(), expected)
    assert sparse.blocksize == block
    assert sparse.packed_values.shape == (int(mask.sum()), block[1], block[0])
    assert sparse.density == pytest.approx(float(mask.float().mean()))
    sparse.validate()
    # Without a mask the blocks that hold anything are kept.
    again = fp.BlockSparseTensor.from_dense(expected, block)
    assert torch.equal(again.to_dense(), expected)
    assert again.packed_values.shape[0] <= sparse.packed_values.shape[0]


@hypothesis.given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    BLOCKS,
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 99),
)
def test_torch_bsr_is_the_same_matrix_both_ways(blocks, block, density, seed):
    weight, mask = _random((blocks[0] * block[0], blocks[1] * block[1]), block, density, seed)
    sparse = fp.BlockSparseTensor.from_dense(weight, block, mask)
    bsr = sparse.to_torch_bsr()
    assert bsr.layout == torch.sparse_bsr
    assert torch.equal(bsr.to_dense(), sparse.to_dense())
    assert torch.equal(bsr.values(), sparse.values)
    back = fp.BlockSparseTensor.from_torch_bsr(bsr)
    assert torch.equal(back.to_dense(), sparse.to_dense())
    assert back.crow_indices.dtype == torch.int32
    assert back.packed_values.is_contiguous()


def test_what_torch_calls_bsr_is_read_with_its_int64_indices():
    weight = torch.randn(12, 10)
    weight[4:8, 5:] = 0
    sparse = fp.BlockSparseTensor.from_torch_bsr(weight.to_sparse_bsr((4, 5)))
    assert torch.equal(sparse.to_dense(), weight)
    assert sparse.blocksize == (4, 5)
    assert sparse.density == pytest.approx(5 / 6)


def test_values_are_a_view_of_the_packed_values():
    sparse = fp.BlockSparseTensor.from_dense(torch.randn(8, 6), (4, 3))
    sparse.values[1, 2, 0] = 7.0
    assert float(sparse.packed_values[1, 0, 2]) == 7.0
    assert float(sparse.to_dense()[2, 3]) == 7.0


def test_padding_is_zero_and_never_shows():
    sparse = fp.BlockSparseTensor.from_dense(torch.ones(17, 33), (16, 16))
    assert sparse.to_dense().shape == (17, 33)
    assert float(sparse.packed_values.sum()) == 17 * 33
    sparse.packed_values.fill_(1.0)
    assert sparse.to_dense().shape == (17, 33)


def test_gradients_flow_from_the_dense_matrix_to_the_kept_blocks():
    weight, mask = _random((7, 9), (4, 4), 0.5, 3)
    values = fp.BlockSparseTensor.from_dense(weight, (4, 4), mask).packed_values.requires_grad_()
    rebuilt = fp.BlockSparseTensor.from_dense(weight, (4, 4), mask)
    rebuilt.packed_values = values
    factor = torch.randn(7, 9)
    (rebuilt.to_dense() * factor).sum().backward()
    expected = fp.BlockSparseTensor.from_dense(factor, (4, 4), mask).packed_values
    assert torch.equal(values.grad, expected)


def test_a_block_that_holds_only_nan_is_not_dropped():
    weight = torch.zeros(4, 4)
    weight[3, 3] = torch.nan
    sparse = fp.BlockSparseTensor.from_dense(weight, (2, 2))
    assert sparse.packed_values.shape[0] == 1
    assert bool(sparse.to_dense()[3, 3].isnan())


def test_the_matrix_can_change_its_dtype_and_the_indices_stay_int32():
    sparse = fp.BlockSparseTensor.from_dense(torch.randn(8, 8), (4, 4)).to(torch.float64)
    assert sparse.packed_values.dtype == torch.float64
    assert sparse.crow_indices.dtype == sparse.col_indices.dtype == torch.int32


def test_it_prints_what_it_is():
    sparse = fp.BlockSparseTensor.from_dense(torch.eye(32), (16, 16))
    assert repr(sparse) == (
        "BlockSparseTensor(shape=(32, 32), blocksize=(16, 16), kept=2, density=0.500, dtype=torch.float32)"
    )


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# A 5 x 7 matrix in blocks of 2 x 3: 3 block rows, 3 block columns, 4 kept blocks.
GOOD = {
    "packed_values": torch.ones(4, 3, 2),
    "crow_indices": _int32(0, 2, 2, 4),
    "col_indices": _int32(0, 2, 1, 2),
    "shape": (5, 7),
}
BAD_PARTS = [
    ("packed_values", torch.ones(4, 6), r"`packed_values` must be \[kept, cols, rows\]"),
    ("packed_values", torch.ones(3, 3, 2), "entries"),
    ("packed_values", torch.ones(4, 129, 2), "`packed_values`"),
    ("packed_values", torch.ones(4, 0, 2), "`packed_values`"),
    ("packed_values", torch.ones(4, 3, 1), "entries"),
    ("crow_indices", _int32(0, 2, 2, 4).long(), "`crow_indices` must be one-dimensional int32"),
    ("crow_indices", _int32(0, 2, 2, 4)[None], "`crow_indices` must be one-dimensional int32"),
    ("crow_indices", _int32(0, 2, 4), "entries"),
    ("crow_indices", _int32(0, 2, 2, 2, 4), "entries"),
    ("crow_indices", _int32(0, 3, 2, 4), "`crow_indices` must not decrease"),
    ("crow_indices", _int32(0, -2, 2, 4), "`crow_indices` must not decrease"),
    ("crow_indices", _int32(1, 2, 2, 4), "`crow_indices` must not decrease, from 0"),
    ("crow_indices", _int32(0, 2, 2, 3), "`crow_indices` must not decrease, from 0 to 4"),
    ("crow_indices", _int32(0, 2, 2, 5), "`crow_indices` must not decrease, from 0 to 4"),
    ("crow_indices", _int32(0, 9, 8 - 2**31, 4), "`crow_indices` must not decrease"),  # in int32 it does not
    ("col_indices", _int32(0, 2, 1), "entries"),
    ("col_indices", _int32(0, 2, 1, 2).float(), "`col_indices` must be one-dimensional int32"),
    ("col_indices", _int32(0, 3, 1, 2), r"`col_indices` must lie in \[0, 3\)"),
    ("col_indices", _int32(-1, 2, 1, 2), r"`col_indices` must lie in \[0, 3\)"),
    ("col_indices", _int32(0, 2**31 - 1, 1, 2), r"`col_indices` must lie in \[0, 3\)"),
    ("col_indices", _int32(2, 0, 1, 2), "`col_indices` must increase"),
    ("col_indices", _int32(0, 2, 1, 1), "`col_indices` must increase"),
    ("col_indices", _int32(0, 2, 1, 2).to("meta"), "`col_indices` must be on cpu"),
    ("shape", (5, 7, 1), "`shape`"),
    ("shape", (5,), "`shape`"),
    ("shape", (-5, 7), "`shape`"),
    ("shape", (7, 7), "entries"),
    ("shape", (5, 6), r"`col_indices` must lie in \[0, 2\)"),
]


def test_the_parts_that_the_bad_ones_are_made_from_are_good():
    sparse = fp.BlockSparseTensor(**GOOD)
    dense = sparse.to_dense()
    assert dense.shape == (5, 7)
    assert int(dense.sum()) == 2 * 3 + 2 * 1 + 1 * 3 + 1 * 1


@pytest.mark.parametrize(("part", "value", "message"), BAD_PARTS)
def test_a_structure_that_a_kernel_must_not_read_is_refused(part, value, message):
    with pytest.raises(ValueError, match=message):
        fp.BlockSparseTensor(**{**GOOD, part: value})


@hypothesis.given(
    st.lists(st.integers(-3, 6), min_size=4, max_size=4), st.lists(st.integers(-2, 5), min_size=4, max_size=4)
)
def test_only_true_structures_pass_the_validation(crow, col):
    rows_fit = crow[0] == 0 and crow[-1] == 4 and crow == sorted(crow)
    sorted_rows = rows_fit and all(
        col[begin:end] == sorted(set(col[begin:end])) for begin, end in itertools.pairwise(crow)
    )
    valid = sorted_rows and all(0 <= column < 3 for column in col)
    parts = {**GOOD, "crow_indices": _int32(*crow), "col_indices": _int32(*col)}
    if valid:
        fp.BlockSparseTensor(**parts)
    else:
        with pytest.raises(ValueError, match="_indices` must"):
            fp.BlockSparseTensor(**parts)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 4), ()])
def test_from_dense_takes_only_matrices(shape):
    with pytest.raises(ValueError, match="`weight` must be a matrix"):
        fp.BlockSparseTensor.from_dense(torch.ones(shape))


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(2, 2), ValueError),
        (torch.ones(2, 3, dtype=torch.bool), ValueError),
        (torch.ones(8, 8, dtype=torch.bool), ValueError),
        ([[True, False], [True, True]], TypeError),
    ],
)
def test_from_dense_refuses_a_mask_that_does_not_fit(mask, error):
    with pytest.raises(error, match="`mask` must be a bool tensor"):
        fp.BlockSparseTensor.from_dense(torch.ones(8, 8), (4, 4), mask)


@pytest.mark.parametrize("blocksize", [(0, 4), (4, 129), (4.0, 4), 4, [4, 4], (4,)])
def test_from_dense_refuses_a_blocksize_out_of_range(blocksize):
    with pytest.raises(ValueError, match="`blocksize`"):
        fp.BlockSparseTensor.from_dense(torch.ones(8, 8), blocksize)


def test_torch_bsr_needs_dimensions_that_divide():
    with pytest.raises(ValueError, match="divide by the block"):
        fp.BlockSparseTensor.from_dense(torch.ones(17, 16), (16, 16)).to_torch_bsr()


@pytest.mark.parametrize(
    "make", [lambda x: x, torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=["dense", "COO", "CSR"]
)
def test_from_torch_bsr_takes_nothing_else(make):
    with pytest.raises(ValueError, match=r"`matrix` must be a 2-D torch\.sparse_bsr tensor"):
        fp.BlockSparseTensor.from_torch_bsr(make(torch.ones(4, 4)))


def test_copies_and_files_hold_the_same_matrix(tmp_path):
    sparse = fp.BlockSparseTensor.from_dense(torch.randn(17, 9), (4, 4), torch.rand(5, 3) < 0.5)
    path = tmp_path / "sparse.pt"
    torch.save({"weight": sparse}, path)
    duplicate = copy.deepcopy(sparse)
    for other in (duplicate, pickle.loads(pickle.dumps(sparse)), torch.load(path)["weight"]):
        assert torch.equal(other.to_dense(), sparse.to_dense())
        assert other.blocksize == sparse.blocksize
    duplicate.packed_values.zero_()
    assert bool((sparse.to_dense() != 0).any())


def test_a_file_with_a_broken_structure_is_refused(tmp_path):
    sparse = fp.BlockSparseTensor.from_dense(torch.ones(8, 8), (4, 4))
    sparse.col_indices = torch.tensor([0, 7, 0, 1], dtype=torch.int32)
    torch.save(sparse, tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match="`col_indices` must lie in"):
        torch.load(tmp_path / "sparse.pt")
