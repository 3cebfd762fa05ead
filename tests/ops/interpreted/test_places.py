"""Tests places in tensors of more than 2**31 elements: the kernels' own arithmetic, run without the tensors."""

import pytest
import torch
import triton
import triton.language as tl

from tests.ops.triton_cases import Case, heuristic
from unetgn.ops.triton.kernels.elements import pair_of, plane_of
from unetgn.ops.triton.kernels.forward_channels_last import locate_strip, rows_of_part
from unetgn.ops.triton.kernels.forward_contiguous import locate_part
from unetgn.ops.triton.plan_channels_last import Split
from unetgn.ops.triton.problem import INT32_POSITIONS


@triton.jit
def chunk_places(
    out, program, chunks, group_channels, segments, CHUNK: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    group, base, channel, start, limit = locate_part(program, chunks, group_channels, segments, CHUNK, WIDTH, WIDE)
    tl.store(out, group)
    tl.store(out + 1, base)
    tl.store(out + 2, channel)
    tl.store(out + 3, tl.sum(tl.sum(start, 1), 0))
    tl.store(out + 4, limit)


@triton.jit
def tile_places(out, program, strips, column_tiles, row_vectors, spatial, VECTOR: tl.constexpr):
    sample, _strip, base, _channel, offsets, count = locate_strip(
        program, strips, column_tiles, row_vectors, spatial, 128, 128, 64, VECTOR
    )
    tl.store(out, sample)
    tl.store(out + 1, base)
    tl.store(out + 2, tl.max(tl.max(offsets, 1), 0))
    tl.store(out + 3, count)


@triton.jit
def rows_of_two_blocks(out, row_block, spatial, ROWS: tl.constexpr):
    first, count = rows_of_part(row_block + tl.arange(0, 2), spatial, ROWS)
    tl.store(out + tl.arange(0, 2), first)
    tl.store(out + 2 + tl.arange(0, 2), count)


@triton.jit
def pointer_distances(out, plane, group):
    begin = out.to(tl.int64)
    tl.store(out, plane_of(out, 0, plane).to(tl.int64) - begin)
    tl.store(out + 1, plane_of(out, 1, plane).to(tl.int64) - begin)
    tl.store(out + 2, plane_of(out, 2, plane).to(tl.int64) - begin)
    tl.store(out + 3, pair_of(out, group).to(tl.int64) - begin)


def test_a_group_of_many_long_channels_has_its_chunks_in_the_right_places() -> None:
    group_channels, spatial, chunk = 5, 2**30 + 2**13, 8192  # a group of more than 2**32 elements
    chunks = group_channels * spatial // chunk
    program = 3 * chunks + chunks - 1  # the last chunk of group 3
    out = torch.zeros(5, dtype=torch.int64)
    chunk_places[(1,)](out, program, chunks, group_channels, spatial // 4096, CHUNK=chunk, WIDTH=4096, WIDE=False)
    assert out.tolist() == [3, (3 * 5 + 4) * spatial, 4, 5 * spatial - chunk - 4 * spatial, chunk]


@pytest.mark.parametrize("place", ["first", "end of the first channel", "last"])
def test_a_channel_of_more_than_two_to_the_31_elements_has_its_chunks_in_the_right_places(place: str) -> None:
    spatial, chunk = 2**31 + 4096, 8192
    assert spatial >= INT32_POSITIONS  # which is what makes the plan WIDE
    chunks = -(-2 * spatial // chunk)
    program = {"first": 0, "end of the first channel": chunks // 2 - 1, "last": chunks - 1}[place]
    channel, start = divmod(program * chunk, spatial)
    limit = min(2 * spatial - program * chunk, chunk)
    out = torch.zeros(5, dtype=torch.int64)
    chunk_places[(1,)](out, chunks + program, chunks, 2, spatial // 4096, CHUNK=chunk, WIDTH=4096, WIDE=True)
    assert out.tolist() == [1, (2 + channel) * spatial, channel, start, limit]


def test_samples_of_more_than_two_to_the_31_elements_have_their_tiles_in_the_right_places() -> None:
    channels, spatial = 512, 2**24 + 1  # 2**33 elements a sample
    row_blocks, column_blocks = -(-spatial // 128), channels // 64
    out = torch.zeros(4, dtype=torch.int64)
    program = 3 * row_blocks * column_blocks - 1  # the last tile of sample 2
    tile_places[(1,)](out, program, row_blocks, column_blocks, channels // 8, spatial, VECTOR=8)
    assert out.tolist() == [2, (2 * spatial + 2**24) * channels, 127 * channels + channels - 1, 1]


def test_more_than_two_to_the_31_rows_have_their_tiles_in_the_right_places() -> None:
    channels, spatial = 2, 2**31 + 128 + 3
    row_blocks = -(-spatial // 128)
    out = torch.zeros(4, dtype=torch.int64)
    tile_places[(1,)](out, 2 * row_blocks - 1, row_blocks, 1, 1, spatial, VECTOR=2)
    assert out.tolist() == [1, (spatial + 2**31 + 128) * channels, 127 * channels + 63, 3]


def test_more_than_two_to_the_31_rows_are_counted_right_when_their_statistics_are_merged() -> None:
    spatial = 2**31 + 128 + 3
    out = torch.zeros(4, dtype=torch.int64)
    rows_of_two_blocks[(1,)](out, 2**24, spatial, ROWS=128)
    assert out.tolist() == [2**31, 2**31 + 128, 128, 3]


@pytest.mark.parametrize("plane", [2**30, 2**31 - 1, 2**31 + 5])
def test_planes_of_sums_and_pairs_of_group_means_may_lie_beyond_two_to_the_31(plane: int) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    pointer_distances[(1,)](out, plane, 2**30)
    assert [distance // 8 for distance in out.tolist()] == [0, plane, 2 * plane, 2**31]


def test_samples_too_long_for_32_bits_are_split_in_channels_last() -> None:
    """The kernels that hold a group on chip count the elements of a sample in 32 bits."""
    long = Case((1, 2**21, 32, 32), 2**18, torch.bfloat16, True)
    assert all(isinstance(plan, Split) for plan in heuristic(long, clusters=True))
    short = Case((1, 2**20, 32, 32), 2**17, torch.bfloat16, True)
    assert not any(isinstance(plan, Split) for plan in heuristic(short))
