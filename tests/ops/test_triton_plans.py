"""Tests what plans promise the kernels, over many sizes; nothing is compiled or run."""

import itertools
import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler: installed, and not set to interpret", allow_module_level=True)

from tests.ops.triton_cases import Case, heuristic
from tests.ops.triton_offline import DEVICES, key, launches_of
from unetgn.ops.triton import plan_channels_last
from unetgn.ops.triton.problem import Problem

SIZES = list(itertools.product((1, 3, 64), (2, 32, 96, 320, 2560), (1, 7, 64, 77, 4096, 2**20), (2, 4, 8)))


@pytest.mark.parametrize("target", DEVICES)
def test_a_strip_is_whole_turns_of_its_loop_and_each_thread_has_a_full_load_of_a_tile(target: str) -> None:
    device = DEVICES[target]
    for samples, channels, spatial, itemsize in SIZES:
        problem = Problem(samples, channels, 2, spatial, itemsize)
        plan = plan_channels_last.split(problem, device)
        for rows, tensors in itertools.product((plan.rows, plan.apply_rows), (1, 2)):
            sizes = plan.tiles_at_once(rows, tensors)
            assert sizes["ROWS"] == rows
            assert rows % (sizes["TILES"] * sizes["TILE_ROWS"]) == 0
            assert sizes["TILES"] * tensors <= plan_channels_last.LOADS_AT_ONCE
            tile = sizes["TILE_ROWS"] * plan.columns
            assert tile >= min(plan.num_warps * device.warp_size * problem.vector, rows * plan.columns)
        assert plan.rows * plan.columns <= max(plan_channels_last.LONGEST_STRIP, plan.tile_rows * plan.columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("side", [8, 16, 32, 64])
@pytest.mark.parametrize("group_channels", [1, 2, 3])
def test_whole_channels_in_a_tile_need_no_fold(group_channels: int, side: int, dtype: torch.dtype) -> None:
    _, backward = launches_of(Case((2, 32 * group_channels, side, side), 32, dtype), "sm_90")
    names = [key(launch)[0].rpartition(".")[2] for launch in backward]
    assert names == ["resident_backward", "parameter_gradients"]


def test_long_groups_of_many_steps_are_split_in_channels_last_where_they_are_many() -> None:
    def first(*shape: int) -> str:
        _, backward = launches_of(Case(shape, 32, torch.bfloat16, True), "sm_90")
        return key(backward[0])[0].rpartition(".")[2]

    assert first(8, 1280, 16, 16) == "split_sums"
    assert first(1, 1280, 16, 16) == first(8, 1280, 8, 8) == first(64, 128, 32, 32) == "resident_backward"


@pytest.mark.parametrize(
    ("shape", "channels_last", "forward", "backward"),
    [
        ((4, 640, 32, 32), False, "Resident", "Resident"),
        ((8, 640, 32, 32), False, "Resident", "Split"),  # blocks alone on a multiprocessor, in turns
        ((4, 640, 32, 32), True, "Resident", "Split"),  # few groups of 20 channels
        ((8, 640, 32, 32), True, "Split", "Split"),
    ],
)
def test_how_many_groups_there_are_decides_where_blocks_are_alone_or_loads_narrow(
    shape: tuple[int, ...], channels_last: bool, forward: str, backward: str
) -> None:
    plans = heuristic(Case(shape, 32, torch.bfloat16, channels_last))
    assert [type(plan).__name__ for plan in plans] == [forward, backward]


def test_backward_clusters_in_channels_last_are_planned_where_their_builds_are_known() -> None:
    device = DEVICES["sm_90"]

    def blocks(channels: int, side: int, itemsize: int = 2) -> list[int]:
        problem = Problem(8, channels, 32, side * side, itemsize)
        plans = [plan_channels_last.cluster_of(problem, device, blocks) for blocks in device.cluster_sizes]
        return [plan.blocks for plan in plans if plan is not None]

    assert blocks(256, 64) == [4, 8]  # two would hold too much
    assert blocks(256, 64, 4) == []
    assert blocks(320, 64) == []  # 10 channels are no whole vectors
    assert blocks(1280, 24) == []  # 72 rows are no whole tile
    assert blocks(2048, 16) == [2, 4]  # eight would have tiles of 8 rows
