"""Granularities: pieces cover a weight exactly once, at any size."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.granularity import check_blocksize, is_scorable, weight_as_taps, weight_from_taps
from helpers import pieces_of

SIDES = st.integers(1, 21)
LINEAR_SHAPES = st.tuples(SIDES, SIDES)
CONV_SHAPES = st.tuples(SIDES, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
SHAPES = st.one_of(LINEAR_SHAPES, CONV_SHAPES).map(torch.Size)
GRANULARITIES = st.one_of(
    st.builds(fp.Block, st.integers(1, 24), st.integers(1, 24)), st.just(fp.Unit()), st.just(fp.Element())
)


@hypothesis.given(SHAPES, GRANULARITIES)
def test_pieces_are_the_tiles_that_plain_loops_give_in_the_same_order(shape, granularity):
    masks = list(pieces_of(granularity, shape))
    assert granularity.shape(shape).numel() == len(masks)
    weight = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([weight[mask].sum() for mask in masks])
    torch.testing.assert_close(granularity.sum_pieces(weight).flatten(), expected)
    labels = torch.arange(len(masks)).view(granularity.shape(shape))
    spread = granularity.expand(labels, shape)
    assert spread.shape == shape
    for index in range(0, len(masks), max(1, len(masks) // 7)):
        assert torch.equal(spread == index, masks[index])


@hypothesis.given(SHAPES, GRANULARITIES)
def test_sizes_count_each_real_weight_once_and_no_padding(shape, granularity):
    sizes = granularity.sizes(shape)
    assert sizes.dtype == torch.int64
    assert sizes.shape == granularity.shape(shape)
    assert int(sizes.sum()) == shape.numel()
    assert int(sizes.min()) >= 1


@hypothesis.given(SHAPES, GRANULARITIES)
def test_sum_pieces_of_expand_is_each_entry_times_its_size(shape, granularity):
    pieces = torch.randint(-9, 9, granularity.shape(shape))
    summed = granularity.sum_pieces(granularity.expand(pieces, shape).contiguous())
    assert torch.equal(summed, pieces * granularity.sizes(shape))


@hypothesis.given(CONV_SHAPES)
def test_the_tap_view_of_a_conv_weight_goes_back_to_the_weight(shape):
    weight = torch.randn(shape)
    taps = weight_as_taps(weight)
    assert taps.shape == (shape[0], shape[2] * shape[3], shape[1])
    assert torch.equal(weight_from_taps(taps, weight.shape), weight)
    assert torch.equal(taps[0, 0], weight[0, :, 0, 0])


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((129, 151), (16, 16), (9, 10)),
        ((1, 1), (16, 16), (1, 1)),
        ((15, 17), (16, 16), (1, 2)),
        ((100, 64), (128, 1), (1, 64)),
        ((17, 5, 3, 3), (16, 4), (2, 18)),  # padding is per tap: 9 taps of 2 block columns
        ((8, 1, 5, 5), (4, 16), (2, 25)),
    ],
)
def test_block_shapes_are_rounded_up_and_conv_pads_per_tap(shape, block, expected):
    assert fp.Block(*block).shape(torch.Size(shape)) == expected


def test_a_ragged_edge_block_holds_fewer_weights():
    assert fp.Block(16, 16).sizes(torch.Size([17, 33])).tolist() == [[256, 256, 16], [16, 16, 1]]


@pytest.mark.parametrize("rows", [0, -1, 129, 1.5, "16", None])
def test_a_block_side_out_of_range_is_refused(rows):
    for sides in ((rows, 16), (16, rows)):
        with pytest.raises(ValueError, match="`blocksize` must be two integers"):
            fp.Block(*sides)


@pytest.mark.parametrize("blocksize", [16, (16,), (16, 16, 16), [16, 16], "16", None])
def test_a_blocksize_that_is_no_pair_is_refused(blocksize):
    with pytest.raises(ValueError, match="`name` must be two integers"):
        check_blocksize(blocksize, "name")


def test_granularities_are_compared_by_value():
    assert fp.Block(4, 8) == fp.Block(4, 8) != fp.Block(8, 4)
    assert fp.Unit() == fp.Unit() != fp.Element()
    assert {fp.Block(4, 8): 1}[fp.Block(4, 8)] == 1
    assert fp.Unit().masks_whole_units
    assert not fp.Block(4, 8).masks_whole_units


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_a_weight_of_another_layer_kind_is_refused(shape):
    with pytest.raises(ValueError, match="`weight` must be that of a Linear or Conv2d"):
        weight_as_taps(torch.zeros(shape))


def test_only_linear_and_conv2d_are_scorable():
    assert is_scorable(nn.Linear(2, 2))
    assert is_scorable(nn.Conv2d(2, 2, 1))
    for module in (nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Embedding(2, 2), nn.ReLU()):
        assert not is_scorable(module)
