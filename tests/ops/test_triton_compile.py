"""Tests what Triton's compiler makes of the kernels for GPUs that are not there: no spills, full-width accesses.

The configurations are those that the heuristic picks for every group norm of three U-Nets, at batch 1 and 8, in both
layouts and several dtypes. The quick tests take, of each kernel and target, the build that holds the most, and for
sm_90 a share of all in bf16, drawn from a seed; the slow ones take them all.
"""

import functools
import math
import os
import random
import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler: installed, and not set to interpret", allow_module_level=True)

import triton

from tests.ops.triton_cases import Case, arguments_of
from tests.ops.triton_offline import (
    DEVICES,
    TARGETS,
    Launch,
    compile_launch,
    key,
    launches_of,
    machine_code,
    recorded,
    specialization,
)
from tests.ops.unet_shapes import UNETS
from unetgn.ops.arguments import Needs
from unetgn.ops.triton import backward, entry
from unetgn.ops.triton import plan_contiguous as contiguous
from unetgn.ops.triton.forward import ForwardOperands
from unetgn.ops.triton.kernels.forward_contiguous import merge_statistics
from unetgn.ops.triton.launch import launch_of

Extras = tuple[tuple[str, ...], ...]
EXTRAS: Extras = (("weight", "bias"), ("weight", "bias", "pre_bias"), ("weight", "bias", "scale", "shift"))
MAPS: Extras = (("weight", "bias", "scale", "shift", "maps"),)
SHAPES = sorted({shape for shapes in UNETS.values() for shape in shapes})
MOVES_TILES = ("resident_forward", "resident_backward", "split_statistics", "split_apply", "split_sums")
CLUSTER = "cluster_backward"


DTYPES = {  # of x and of the parameters
    "bf16": (torch.bfloat16, torch.float32),
    "all_bf16": (torch.bfloat16, torch.bfloat16),
    "all_fp16": (torch.float16, torch.float16),
    "all_fp32": (torch.float32, torch.float32),
}
SHARE = 16  # builds


def cases(dtypes: str, extras_of_cases: Extras = EXTRAS) -> list[Case]:
    dtype, parameter_dtype = DTYPES[dtypes]
    return [
        Case((n, channels, side, side), 32, dtype, channels_last, extras, parameter_dtype)
        for channels, side in SHAPES
        for n in (1, 8)
        for channels_last in (False, True)
        for extras in extras_of_cases
    ]


@functools.cache
def distinct_launches(
    target: str, *, clusters: bool = False, dtypes: str = "bf16", extras: Extras = EXTRAS
) -> list[tuple[Case, Launch]]:
    """List one launch of each build, with a case that it belongs to."""
    found = {}
    for case in cases(dtypes, extras):
        forward, backward = launches_of(case, target, clusters=clusters)
        for launch in forward + backward:
            if launch.num_ctas > 1 or not clusters:
                found.setdefault(key(launch), (case, launch))
    return list(found.values())


def held(launch: Launch) -> int:
    """Estimate the elements that a thread holds at a time, more or less."""
    sizes = [
        launch.arguments.get(name, 1)
        for name in ("TILES", "TILE", "ROWS", "SEGMENTS", "SAMPLES", "WIDTH", "COLUMNS", "STEPS", "VECTOR")
    ]
    if "TILE" in launch.arguments:
        sizes = [launch.arguments.get("TILES", 1), launch.arguments["TILE"]]
    if "TILE_ROWS" in launch.arguments:  # ROWS are those of a strip, of which a turn of the loop holds some tiles
        sizes = [launch.arguments[name] for name in ("TILES", "TILE_ROWS", "COLUMNS")]
    return math.prod(sizes) // launch.num_warps


def heaviest_of_each_kernel(
    target: str, *, clusters: bool = False, dtypes: str = "bf16", extras: Extras = EXTRAS
) -> list[tuple[Case, Launch]]:
    """List, of the builds of each kernel, the one whose threads hold the most; with pre_bias where it has that."""
    found: dict[str, tuple[Case, Launch]] = {}
    for case, launch in distinct_launches(target, clusters=clusters, dtypes=dtypes, extras=extras):
        name = key(launch)[0]
        weight = (held(launch), launch.arguments.get("pre_bias") is not None)
        if name not in found or weight > (held(found[name][1]), found[name][1].arguments.get("pre_bias") is not None):
            found[name] = (case, launch)
    return list(found.values())


def tile_width(case: Case, launch: Launch, target: str) -> int:
    """Return the bits of the widest load that the layout of x and the number of threads allow this launch."""
    sizes = launch.arguments
    run = sizes.get("VECTOR", sizes.get("WIDTH", 1))
    if "GROUPS" in sizes:
        threads = DEVICES[target].warp_size * launch.num_warps
        run = min(run, sizes["ROWS"] * sizes["GROUPS"] * sizes["VECTOR"] // threads)
    return min(128, run * torch.empty(0, dtype=case.dtype).element_size() * 8)


def faults(case: Case, launch: Launch, target: str) -> list[str]:
    """List what is wrong with a build. Where parameters are float32, 16-bit accesses could only be pieces of tiles."""
    build = compile_launch(launch, target)
    found = [f"{build.spills} bytes (instructions on AMD) of spilled registers"] if build.spills else []
    if build.kernel.endswith((*MOVES_TILES, CLUSTER)):
        wanted = tile_width(case, launch, target)
        if max(build.loads, default=0) < wanted:
            found.append(f"loads of at most {max(build.loads, default=0)} bits, not {wanted}")
        writes_tiles = {"y", "dx"} & launch.arguments.keys()
        if writes_tiles and max(build.stores, default=0) < wanted:
            found.append(f"stores of at most {max(build.stores, default=0)} bits, not {wanted}")
        narrow = sum(n for widths in (build.loads, build.stores) for bits, n in widths.items() if bits < 32)
        if narrow and case.parameter_dtype == torch.float32:
            found.append(f"{narrow} accesses of 16 bits or less")
    return [f"{build.kernel} for {case.shape}, {case.dtype}, {case.extras}: {fault}" for fault in found]


@pytest.mark.parametrize("target", TARGETS)
def test_the_heaviest_build_of_each_kernel_spills_nothing_and_moves_16_bytes_at_a_time(target: str) -> None:
    chosen = heaviest_of_each_kernel(target)
    names = {key(launch)[0].rpartition(".")[2] for _, launch in chosen}
    assert names >= {*MOVES_TILES, "fold_slots", "parameter_gradients", "merge_statistics"}
    assert [fault for case, launch in chosen for fault in faults(case, launch, target)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_heaviest_builds_with_maps_spill_nothing(target: str) -> None:
    chosen = heaviest_of_each_kernel(target, extras=MAPS, dtypes="all_bf16")
    assert sum("scale_map" in launch.arguments for _, launch in chosen) >= len(MOVES_TILES)
    assert [fault for case, launch in chosen for fault in faults(case, launch, target)] == []


def test_the_assembly_text_shows_the_widths_and_spills_of_the_machine_code() -> None:
    """For a few builds, and for one that must spill: 160 elements a thread, of xhat and of dz each."""
    chosen = heaviest_of_each_kernel("sm_90", dtypes="all_fp32")[:4]
    spilled = spilling_launch()
    for launch in (*(launch for _, launch in chosen), spilled):
        build = compile_launch(launch, "sm_90")
        spill_instructions, loads, stores = machine_code(build)
        assert bool(build.spills) == bool(spill_instructions) == (launch is spilled)
        assert (max(build.loads), max(build.stores)) == (max(loads), max(stores))


def spilling_launch() -> Launch:
    case = Case((1, 640, 16, 16), 32)
    needs = Needs(True, True, True, False, False, False)
    width, exact = contiguous.backward_segment(case.problem)
    plan = replace(contiguous.backward_resident(case.problem, DEVICES["sm_90"], width, exact), num_warps=1)
    recipe = backward.recipe_of(plan, case.problem, DEVICES["sm_90"], True, needs)
    with recorded() as launches:
        tensors = case.shapes()
        statistics = torch.empty(1, 32, device="meta")
        entry.follow_backward(recipe, tensors["dy"], arguments_of(case, tensors), statistics, statistics, needs)
    return launches[0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_only_16_bits_are_computed_with_approximate_reciprocals(dtype: torch.dtype, channels_last: bool) -> None:
    forward, backward = launches_of(Case((1, 64, 8, 8), 32, dtype, channels_last), "sm_90")
    for launch in (forward[-1], backward[0]):
        ptx = compile_launch(launch, "sm_90").text["ptx"]
        assert ("rcp.approx.ftz.f32" in ptx) == (dtype.itemsize == 2)
        assert ("shl.b32" in ptx and "0xffff0000" in ptx) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtypes", ["all_fp16", "all_fp32"])
def test_the_heaviest_builds_of_other_dtypes_spill_nothing(dtypes: str) -> None:
    chosen = heaviest_of_each_kernel("sm_90", dtypes=dtypes)
    assert [fault for case, launch in chosen for fault in faults(case, launch, "sm_90")] == []


def test_no_build_of_a_share_for_sm_90_spills() -> None:
    launches = random.Random(5).sample(distinct_launches("sm_90"), SHARE)
    assert [fault for case, launch in launches for fault in faults(case, launch, "sm_90")] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_build_for_any_group_norm_of_three_unets_spills(target: str, dtypes: str) -> None:
    launches = distinct_launches(target, dtypes=dtypes)
    assert len(launches) > 100
    assert [fault for case, launch in launches for fault in faults(case, launch, target)] == []


def test_groups_in_float32_that_registers_hold_in_16_bits_only_are_split() -> None:
    """20480 elements: five tiles spill in float32 (xhat and dz, and x and dy beside them), not in bfloat16."""
    shape = (1, 640, 32, 32)
    for dtype, resident in ((torch.float32, False), (torch.bfloat16, True)):
        _, backward = launches_of(Case(shape, 32, dtype), "sm_90")
        assert key(backward[0])[0].endswith("resident_backward") == resident
        assert [launch for launch in backward if compile_launch(launch, "sm_90").spills] == []


def test_nearly_all_main_paths_have_full_width_vectors() -> None:
    """Narrower ones: channels_last where 16 bytes do not divide a group's channels, and groups are short, or few."""
    narrow = [
        (case.shape, launch.arguments["VECTOR"])
        for case, launch in distinct_launches("sm_90")
        if "VECTOR" in launch.arguments and tile_width(case, launch, "sm_90") < 128
    ]
    assert all(
        shape[1] // 32 % 8 and (math.prod(shape[1:]) // 32 <= 8192 or 32 * shape[0] < 132) for shape, _ in narrow
    )


def split_axes(ttgir: str) -> set[int]:
    """Return the axes along which a build's layouts are split over the blocks of its cluster."""
    axes = set()
    for bases in re.findall(r"CGALayout = \[(\[.*?\])\]", ttgir):
        for basis in re.findall(r"\[([\d, ]*)\]", bases):
            axes |= {axis for axis, step in enumerate(basis.split(",")) if int(step)}
    return axes


def check_cluster(case: Case, launch: Launch, target: str) -> list[str]:
    build = compile_launch(launch, target)
    found = faults(case, launch, target)
    if split_axes(build.text["ttgir"]) != {0}:
        found.append(f"{build.kernel} for {case.shape}: split along axes {split_axes(build.text['ttgir'])}, not 0 only")
    if "barrier.cluster.wait.acquire" not in build.text["ptx"]:
        found.append(f"{build.kernel} for {case.shape}: no cluster barrier")
    return found


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_heaviest_cluster_builds_are_split_over_blocks_only_and_spill_nothing(target: str) -> None:
    chosen = heaviest_of_each_kernel(target, clusters=True)
    assert len(chosen) == 4  # both passes in both layouts
    assert all(launch.arguments["pre_bias"] is not None for _, launch in chosen)
    assert [fault for case, launch in chosen for fault in check_cluster(case, launch, target)] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["bf16", "all_bf16", "all_fp16"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_all_cluster_builds_are_split_over_blocks_only_and_spill_nothing(target: str, dtypes: str) -> None:
    shortcut = ("weight", "bias", "pre_bias", "dshortcut")
    launches = distinct_launches(target, clusters=True, dtypes=dtypes, extras=(*EXTRAS, ("pre_bias",), shortcut))
    assert [fault for case, launch in launches for fault in check_cluster(case, launch, target)] == []


def first_offsets(ttir: str, name: str) -> list[str]:
    """Return the types of what is added to a pointer argument itself, or to the tensor that repeats it."""
    pointers = [f"%{name}", *re.findall(rf"(%\w+) = tt\.splat %{name} :", ttir)]
    return [found for pointer in pointers for found in re.findall(rf"tt\.addptr {pointer}, .* : \S+, (\S+)", ttir)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 320, 64, 64), (8, 1280, 8, 8)], ids=str)
def test_offsets_begin_at_a_64_bit_base_and_nothing_is_atomic(shape: tuple[int, ...], channels_last: bool) -> None:
    """More than 2**31 elements: the first that a kernel adds to x (dy, y, dx) has 64 bits; 32 may follow within a tile.

    And no atomics anywhere: each slot has one writer, so that results do not depend on the order of programs.
    """
    forward, backward = launches_of(Case(shape, 32, torch.bfloat16, channels_last), "sm_90")
    for launch in forward + backward:
        ttir = compile_launch(launch, "sm_90").text["ttir"]
        assert "atomic" not in ttir
        for name in ("x", "dy", "y", "dx"):
            if isinstance(launch.arguments.get(name), torch.Tensor):
                added = first_offsets(ttir, name)
                assert added
                assert all("i64" in offset for offset in added), (key(launch)[0], name, added)


class PretendedDriver:
    """Stands for as much of a GPU's driver as Triton's launcher asks before it compiles."""

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_offline_builds_are_those_of_tritons_own_launcher(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedDriver())
    case = Case((1, 64, 8, 8), 32, torch.bfloat16, channels_last, ("weight", "scale"))
    forward, backward = launches_of(case, "sm_90")
    for launch in forward + backward:
        real = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in launch.arguments.items()
        }
        kernel: Any = launch.kernel
        compiled = kernel.warmup(**real, grid=(launch.programs,), num_warps=launch.num_warps)
        signature, _, attributes = specialization(launch)
        assert compiled.src.signature == signature
        assert {
            place: [list(pair) for pair in pairs] for place, pairs in compiled.src.attrs.items() if pairs
        } == attributes


@pytest.mark.parametrize(
    "sizes", [{"chunks": 3}, {"chunks": 3, "length": 9, "eps": 0.1, "CHUNK": 4, "SLOT": 4}], ids=str
)
def test_a_launch_whose_sizes_are_not_those_of_its_kernel_is_refused_with_the_names(sizes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"merge_statistics takes .*TURNS; given are the sizes chunks"):
        launch_of(merge_statistics, ForwardOperands, 1, 4, **sizes)
