"""Every program of whole comparisons, at its tiniest, in this process: its JSON, and that the tables take it.

What would run in processes of its own runs here, except in tests that are marked `thorough`.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import contenders, fresh, memory, sample, startup, tables, train, train_peer, unet_step
from benchmarks.networks import NETWORKS, TINY
from unetgn.sampling.sample import main as sample_main
from unetgn.training.config_files import load_config
from unetgn.training.train import main as train_main

MAINS: dict[str, Callable[[list[str]], int]] = {"train.py": train_main, "sample.py": sample_main}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Run in this process what the programs start others for, without MONAI, whose import takes seconds."""

    def call(module: str, function: str, arguments: dict[str, Any], *, threads: int) -> dict[str, Any]:
        return {**getattr(importlib.import_module(module), function)(**arguments), "peak_bytes": 2**40}

    def run(arguments: list[str], *, threads: int) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        if arguments[0] == "-m":
            train_peer.train(train_peer.Settings(**json.loads(Path(arguments[2]).read_text())))
        else:
            assert MAINS[Path(arguments[0]).name](arguments[1:]) == 0
        return ""

    for module in (unet_step, memory, sample):
        monkeypatch.setattr(module, "call", call)
    for module in (train, sample):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    monkeypatch.setattr(contenders, "BACKEND", "eager")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return tmp_path / "out.json"


def measured(main: Callable[[list[str]], None], out: Path, *more: str) -> dict[str, Any]:
    """Run a program, and return its result, which the tables take."""
    main(["--quick", "--out", str(out), *more])
    result: dict[str, Any] = json.loads(out.read_text())
    assert {"device", "torch", "python", "commit", "command", "load_average"} <= result.keys()
    program = main.__module__.rpartition(".")[2]
    assert tables.origin(result) in "\n".join(tables.pages({result["device"]: {program: result}}))
    return result


def test_unet_step_has_a_row_for_each_contender_and_the_reason_for_one_that_is_absent(here: Path):
    rows = measured(unet_step.main, here, "--layouts", "contiguous", "--dtypes", "float32")["rows"]
    assert [row["contender"] for row in rows] == list(contenders.COMPARED)
    *present, monai = rows
    assert monai["absent"].startswith("MONAI is not installed")
    assert all(row["seconds"] > 0 and row["peak_bytes"] == 2**40 for row in present)
    kept = {row["contender"]: row["kept_ratio"] for row in present}
    assert 1 == kept["diffusers"] > kept["ours"] > kept["ours, activations"]
    parts = json.loads(here.read_text())["parts"]
    assert [part["contender"] for part in parts] == list(unet_step.BROKEN_DOWN)


def test_unet_step_measures_both_layouts_and_types(here: Path):
    assert unet_step.make_parser().parse_args([]).rounds >= 3
    monkey = unet_step.make_parser().parse_args(["--networks", "tiny", "--layouts", *unet_step.LAYOUTS])
    monkey.dtypes = list(unet_step.DTYPES)
    assert len(unet_step.cases(monkey)) == 4
    step = contenders.make_step("ours", TINY, layout="channels_last", dtype=torch.bfloat16)
    assert step.batch[0].is_contiguous(memory_format=torch.channels_last)
    assert step.forward().dtype == torch.bfloat16


@pytest.mark.thorough
def test_unet_step_compares_what_compiles(here: Path):
    rows = measured(unet_step.main, here, "--compiled", "--networks", "tiny")["rows"]
    assert [row["contender"] for row in rows] == list(unet_step.COMPILED_ONES)
    *present, monai = rows
    assert monai["absent"].startswith("MONAI is not installed")
    assert all(row["seconds"] > 0 for row in present)
    kept = {row["contender"].removesuffix(contenders.COMPILED): row["kept_ratio"] for row in present}
    assert 1 == kept["diffusers"] > kept["diffusers, fused"] >= kept["ours"]


def test_contenders_compute_the_same_but_monai():
    names = [name for name in contenders.CONTENDERS if name != "MONAI"]
    base, *others = (
        contenders.make_step(name, TINY, layout="contiguous", dtype=torch.float32).forward() for name in names
    )
    for other in others:
        torch.testing.assert_close(other, base, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NETWORKS)
def test_monai_has_the_same_plan_of_channels(name: str):
    pytest.importorskip("monai")
    network = NETWORKS[name]
    case: dict[str, Any] = {"layout": "contiguous", "dtype": torch.float32, "device": "meta"}
    steps = [contenders.make_step(who, network, **case) for who in ("ours", "MONAI")]
    ours, monai = (sum(parameter.numel() for parameter in step.model.parameters()) for step in steps)
    assert abs(monai / ours - 1) < 0.15
    with torch.no_grad():
        assert len({tuple(step.forward().shape) for step in steps}) == 1


def test_train_measures_both_programs_on_the_same_images(here: Path):
    result = measured(train.main, here, "--processes", "1")
    (row,) = result["rows"]
    windows = train.QUICK.steps // train.WINDOW - 1  # the first is left out
    assert {name: [len(each) for each in runs] for name, runs in row["windows"].items()} == {
        train.BASE: [windows],
        "ours": [windows],
    }
    assert min(row["images_per_second"].values()) > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_train_compiles_ours_where_it_is_asked_for(tmp_path: Path, compiled: bool):
    train.prepare(tmp_path, train.QUICK, compiled=compiled)
    assert load_config(tmp_path / "ours.yaml", []).train.compile is compiled


def test_the_peer_trains(here: Path, tmp_path: Path):
    """It is a program that learns, not one that takes time: the loss of its second half is the smaller."""
    work = train.Work(steps=60, batch_size=8, channels=(32, 32), size=8, pictures=16, num_workers=0)
    folder = tmp_path / "work"
    folder.mkdir()
    train.prepare(folder, work)
    settings = {**json.loads((folder / "peer.json").read_text()), "learning_rate": 1e-3}
    losses: list[float] = []
    plain = train_peer.F.mse_loss

    def remembered(*arguments: torch.Tensor) -> torch.Tensor:
        loss = plain(*arguments)
        losses.append(float(loss.detach()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_peer.F, "mse_loss", remembered)
        AcceleratorState._reset_state(reset_partial_state=True)
        train_peer.train(train_peer.Settings(**settings))
    assert len(losses) == 60
    assert sum(losses[30:]) < 0.5 * sum(losses[:30])
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_sample_measures_pipelines_and_programs(here: Path):
    rows = measured(sample.main, here)["rows"]
    assert [(row["what"], row["batch"]) for row in rows] == [("pipeline", 1), ("pipeline", 2), ("program", 64)]
    assert all(min(row["images_per_second"].values()) > 0 for row in rows)


def test_memory_has_a_row_for_each_grade(here: Path):
    rows = measured(memory.main, here)["rows"]
    assert [row["contender"] for row in rows] == list(memory.CONTENDERS)
    kept = {row["contender"]: row["kept_bytes"] for row in rows}
    assert kept["diffusers"] > kept["ours"] > kept["ours, activations"] > kept["ours, blocks"]
    assert kept["diffusers"] > kept["diffusers, checkpointed"]


def test_startup_starts_processes_in_turns(here: Path, monkeypatch: pytest.MonkeyPatch):
    programs = {"Python": ("", "Python"), "json": ("import json; print(json)", "Python")}
    monkeypatch.setattr(startup, "PROGRAMS", programs)
    rows = measured(startup.main, here)["rows"]
    assert [row["what"] for row in rows] == list(programs)
    assert rows[0]["seconds_above"] == 0


@pytest.mark.parametrize("name", startup.PROGRAMS)
def test_what_is_started_runs(name: str, capfd: pytest.CaptureFixture[str]):
    exec(startup.PROGRAMS[name][0], {})


def test_a_process_of_its_own_answers_with_its_peak():
    answer = fresh.call("json", "loads", {"s": '{"found": 5}'}, threads=1)
    assert answer["found"] == 5
    assert 2**20 < answer["peak_bytes"] < 2**32
    assert answer["process_seconds"] > 0


def test_a_process_that_fails_is_told_with_its_last_words():
    with pytest.raises(fresh.Failed, match=r"ended with 1: [\s\S]*ZeroDivisionError"):
        fresh.run(["-c", "1 / 0"], threads=1)


@pytest.mark.thorough
def test_two_processes_train_as_one_does(tmp_path: Path):
    train.main(["--quick", "--processes", "2", "--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["processes"] == 2
    assert min(row["images_per_second"].values()) > 0


@pytest.mark.skipif(not fresh.FORGET.is_file(), reason="the peak begins anew on Linux")
def test_a_peak_of_before_is_forgotten():
    block = torch.ones(2**25)  # 128 MiB
    peak = fresh.held_bytes()
    del block
    assert fresh.forget_peak() < peak - 2**26
