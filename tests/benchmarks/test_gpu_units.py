"""The units of `benchmarks.gpu`: they run, they find what is wrong, and they come in the order of their worth."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import checks, definition, networks, paths, rest, shortcut, speed
from benchmarks.gpu.builds import builds
from benchmarks.gpu.journal import lines
from benchmarks.gpu.machine import Card, Rehearsal
from benchmarks.gpu.units import units
from benchmarks.gpu.worker import outcome
from benchmarks.group_norm_silu.cases import EXTRAS, LAYOUTS, PASSES, Case, cases
from unetgn.ops.triton import plan_channels_last, plan_contiguous
from unetgn.ops.triton.device import INTERPRETER, Device

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H100 = Device(multiprocessors=132, largest_cluster=8)
MACHINE = Rehearsal(CPU, implementation="aten")


def test_what_needs_no_kernel_of_its_own_runs_here(one_thread: None) -> None:
    own = (checks.units, speed.units, speed.host_units, shortcut.units, checks.odd_units, rest.units, networks.units)
    some = [unit for units in own for unit in units(MACHINE) if unit.kind != "path"]
    some = [unit for unit in some if "tower" in unit.name or not unit.kind.startswith("network")]
    reports = {unit.name: outcome(unit) for unit in some}
    assert {name: report for name, report in reports.items() if report["status"] != "done"} == {
        "pytest": {**reports["pytest"], "status": "absent"}
    }
    json.dumps(reports)


@pytest.mark.parametrize("what", ["operator", "network"])
def test_what_is_called_compiled_has_been_compiled(what: str, one_thread: None) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Compiling(Rehearsal):
        def compile(self, function: Any) -> Any:
            return torch.compile(function, backend=backend, dynamic=False)

    machine = Compiling(CPU, implementation="aten")
    if what == "operator":
        found = speed.speed(checks.TINY[0], ("compiled",), machine)
        assert all("compiled_us" in row for row in found["rows"])
    else:
        networks.tower(1, "compiled", "channels_last", machine)
    assert graphs


def test_a_network_of_diffusers_is_left_out_where_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "find_spec", lambda _: None)
    unit = next(unit for unit in networks.units(MACHINE) if "sd15" in unit.name)
    assert outcome(unit)["reason"] == "diffusers is not installed"


@pytest.mark.slow
def test_every_unit_runs_at_a_tiny_size_under_the_interpreter(tmp_path: Path) -> None:
    rehearse(tmp_path)
    statuses = {line["unit"]: line["status"] for line in lines(tmp_path)}
    assert statuses.pop("pytest") == "absent"
    assert set(statuses.values()) == {"done"}, statuses


def test_what_needs_kernels_of_its_own_runs_at_a_tiny_size_under_the_interpreter(tmp_path: Path) -> None:
    output = rehearse(tmp_path, "--only", "path", "--only", "launch", "--only", "cluster")
    assert {line["kind"] for line in lines(tmp_path)} == {"path", "launch", "cluster"}
    assert {line["status"] for line in lines(tmp_path)} == {"done"}
    assert "nothing wrong, nothing failed, nothing left out" in output


def rehearse(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "worker.log").read_text()
    return done.stdout


def test_the_list_is_in_the_order_of_worth_and_fits_twenty_minutes() -> None:
    """Of a run of 450 seconds, what is in it begins with the first."""
    full = list(units(Card(CPU)))
    assert len({unit.name for unit in full}) == len(full)
    kinds = [unit.kind for unit in full]
    order = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    assert order == [
        *("builds", "check", "path", "speed", "compiled", "host", "shortcut", "launch", "network", "network compiled"),
        *("odd", "cluster", "rest", "pytest"),
    ]
    plain = [unit for unit in full if unit.kind in ("check", "compiled")]
    assert len(plain) == 48
    assert all(unit.seconds < unit.limit for unit in full)
    until_networks = sum(unit.seconds for unit in full if order.index(unit.kind) <= order.index("host"))
    assert until_networks < 450
    assert sum(unit.seconds for unit in full) < 1200


def perturbed(found: dict[str, torch.Tensor], name: str, how: str) -> dict[str, torch.Tensor]:
    value = found[name].clone()
    flat = value.view(-1)
    if how == "one element":
        flat[-1] += 3
    elif how == "NaN":
        flat[0] = torch.nan
    elif how == "not written":
        flat[: len(flat) // 16 + 1] = 0
    else:
        value *= 1.05
    return {**found, name: value}


@pytest.mark.parametrize("how", ["one element", "NaN", "not written", "scaled"])
@pytest.mark.parametrize("name", ["y", "x", "weight", "bias", "pre_bias", "scale", "shift"])
def test_the_comparison_in_slices_finds_whatever_is_wrong(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definition, "SLICE", 64)
    inputs = Case((3, 8, 4, 4), "float32", "channels_last", "scale_shift", groups=4).inputs(CPU, 1)
    inputs["pre_bias"] = torch.randn(3, 8)
    tensors = {key: value.double().requires_grad_() for key, value in inputs.items() if key != "dy"}
    y = definition.define(tensors, 4, 1e-5)
    gradients = torch.autograd.grad(y, list(tensors.values()), inputs["dy"].double())
    found = {"y": y.detach().float(), **{k: g.float() for k, g in zip(tensors, gradients, strict=True)}}
    assert definition.compare(found, inputs, 4, 1e-5)["faults"] == []
    faults = definition.compare(perturbed(found, name, how), inputs, 4, 1e-5)["faults"]
    assert faults
    assert all(f"{name} " in fault for fault in faults)


def test_a_slice_is_of_one_sample_and_all_elements_are_in_one() -> None:
    for samples, groups, length in ((2, 32, 2**20), (1, 32, 2**26), (5, 3, 7)):
        seen = torch.zeros(samples, groups)
        for sample, some in definition.slices(samples, groups, length):
            seen[sample, some] += 1
            assert (some.stop - some.start) * length <= definition.SLICE or some.stop - some.start == 1
        assert seen.eq(1).all()


@pytest.mark.parametrize("fault", ["wrong", "two runs differ"])
def test_a_check_says_what_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, count = checks.by_the_public_door, iter(range(9))

    def broken(*arguments: Any) -> dict[str, torch.Tensor]:
        found = usual(*arguments)
        found["y"].view(-1)[3] += 4.0 if fault == "wrong" else 1e-3 * next(count)
        return found

    monkeypatch.setattr(checks, "by_the_public_door", broken)
    report = outcome(next(iter(checks.units(MACHINE))))
    assert report["status"] == "wrong"
    assert ("1 elements of y are far off" if fault == "wrong" else "two runs differ in y") in report["data"]["faults"]


def test_the_limit_in_bytes_is_never_more_than_the_plan_moves() -> None:
    """In 16 bits and channels_last they are equal: 32x256x64x64 is read twice forward.

    But for 8x1280x16x16, whose backward pass is split by choice; the limit stays that of reading once.
    """
    for case in cases():
        plans = paths.planned_forward(case, H100), paths.planned_backward(case, H100)
        split = [isinstance(plan, plan_contiguous.Split | plan_channels_last.Split) for plan in plans]
        size = case.elements * case.itemsize
        tensors = [3 if split[0] else 2, 5 if split[1] else 3]
        if case.extras == "maps":  # read with y; read in each pass of the backward, and their gradients written
            tensors = [tensors[0] + 2, tensors[1] + (6 if split[1] else 4)]
        moved = tuple(count * size for count in tensors)
        limits = tuple(case.bytes_moved(which) for which in PASSES)
        assert all(limit <= own for limit, own in zip(limits, moved, strict=True)), case
        by_choice = case.shape == (8, 1280, 16, 16) and split[1]
        assert limits == moved or case.layout == "contiguous" or case.itemsize > 2 or by_choice, case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_path_is_planned_where_it_is_possible(layout: str, dtype: str) -> None:
    for shape in checks.PATH_SHAPES:
        for extras in EXTRAS:
            case = Case(shape, dtype, layout, extras)
            assert "split" in paths.forward_plans(case, H100)
            assert "split" in paths.backward_plans(case, H100)
    found = [paths.forward_plans(Case(shape, dtype, layout), H100) for shape in checks.PATH_SHAPES]
    assert any("resident" in plans for plans in found)
    assert any("cluster of 2" in plans for plans in found)
    found = [paths.backward_plans(Case(shape, dtype, layout), H100) for shape in checks.PATH_SHAPES]
    assert any("cluster of 4" in plans for plans in found) == (layout == "contiguous" or dtype == "bfloat16")


def test_what_is_compiled_beforehand_has_the_kernels_of_all_cases_and_plans() -> None:
    seen = set()

    def note(recipe: Any, tensors: Any, *_: Any) -> None:
        seen.update((one.kernel.__module__, one.kernel.__name__, tensors[0].dtype) for one in recipe.launches)

    some = list(builds(H100))
    with paths.instead_of_running(note):
        for build in some[:: len(some) // 60]:
            build.run(H100)
    assert {dtype for *_, dtype in seen} >= {torch.bfloat16, torch.float16, torch.float32}
    plans = {build.forward for build in some} | {build.backward for build in some}
    for case in checks.in_both_layouts(checks.PATH_SHAPES):
        found = paths.backward_plans(case, H100).items()
        assert plans >= {plan for name, plan in found if case.shape in checks.CLUSTER_SHAPES or "cluster" not in name}
    assert {build.shape for build in some} >= {case.shape for case in cases()}


@pytest.mark.thorough
@pytest.mark.parametrize("network", networks.MAKERS)
def test_the_norms_that_are_compiled_beforehand_are_those_of_the_network(network: str) -> None:
    with torch.device("meta"):
        model, inputs = networks.MAKERS[network](1, False)
    assert norms_of(model, inputs) == {side: set(channels) for side, channels in networks.NORMS[network].items()}


def test_the_norms_of_the_tower_are_compiled_beforehand_too() -> None:
    with torch.device("meta"):
        model = networks.Tower(networks.WIDTHS, fused=False)
        inputs = torch.empty(1, networks.LATENTS, networks.SIZE, networks.SIZE), torch.empty(1, networks.EMBEDDING)
    assert norms_of(model, inputs) == {side: set(channels) for side, channels in networks.NORMS["tower"].items()}


def norms_of(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[int, set[int]]:
    """Return the channels of all group norms that a forward pass calls, by the side of their maps."""
    seen: dict[int, set[int]] = {}

    def note(module: torch.nn.GroupNorm, given: tuple[torch.Tensor, ...], _: Any) -> None:
        x = given[0]
        side = x.shape[-1] if x.dim() == 4 else int(x.shape[-1] ** 0.5)  # attention has its pixels in a row
        seen.setdefault(side, set()).add(module.num_channels)

    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(*inputs)
    return seen


def test_a_card_is_asked_in_the_right_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended `torch.cuda`: names that PyTorch does not have would show on a first GPU only."""
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80, L2_cache_size=50, gcnArchName="gfx942:sramecc+"
    )
    stand_ins = {
        "get_device_properties": lambda _: properties,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 7,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    card = Card(torch.device("cuda", 0))
    assert card.facts().items() >= {"arch": "sm_90", "multiprocessors": 132, "cache_bytes": 50}.items()
    steps = iter(range(99))
    found = card.step(lambda: next(steps), rounds=4)
    assert next(steps) == 7
    assert len(found["wall_ms"]) == len(found["host_ms"]) == 4
    assert found["peak_bytes"] == 7
    assert found["host_step_ms"] <= found["step_ms"]


def test_interpreted_and_real_devices_plan_alike() -> None:
    """A rehearsal then goes through the paths that an H100 goes through."""
    for case, other in pairwise(checks.TINY):
        assert paths.planned_forward(case, INTERPRETER) == paths.planned_forward(case, H100)
        assert paths.planned_backward(other, INTERPRETER) == paths.planned_backward(other, H100)
