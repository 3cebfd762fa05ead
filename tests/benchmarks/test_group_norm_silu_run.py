"""The whole program of the fused operator's benchmark on a made-up machine: what it writes, and what failures leave."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.group_norm_silu import __main__ as program
from benchmarks.group_norm_silu import contenders, measure, record, run
from benchmarks.group_norm_silu.cases import Case
from benchmarks.group_norm_silu.timing import rotations

CASES = [
    Case((2, 64, 4, 4), dtype, layout, extras)
    for dtype, extras in (("bfloat16", "none"), ("float32", "none"), ("bfloat16", "scale_shift"))
    for layout in ("contiguous", "channels_last")
]


@dataclass
class Pretended:
    """A machine whose device is the CPU: calls are made once, and each second on the clock is made up."""

    device: torch.device
    implementation: str = "aten"
    alive: bool = True
    timed: int = 0

    def name(self) -> str:
        return "Made Up 1"

    def cache_bytes(self) -> int:
        return 8192

    def copy_bandwidth(self) -> float:
        return 1e12

    def device_us(self, calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        self.timed += 1
        return float(self.timed)

    def host_us(self, call: Callable[[], Any]) -> float:
        call()
        return 1.0

    def is_alive(self) -> bool:
        return self.alive

    def empty_cache(self) -> None: ...


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    """The program finds this machine in place of a GPU, the cases above, and a compiler that is quick."""
    pretended = Pretended(torch.device("cpu"))
    monkeypatch.setattr(program, "find_gpu", lambda: pretended)
    monkeypatch.setattr(program, "cases", lambda **_: CASES)
    monkeypatch.setattr(contenders, "compiled", lambda: torch.compile(contenders.eager, backend="aot_eager"))
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setenv("UNETGN_COMMIT", "abc")
    return pretended


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "group_norm_silu_made_up_1.json").read_text()))


def test_a_run_writes_every_pass_of_every_case_with_its_surroundings(machine: Pretended, tmp_path: Path) -> None:
    assert program.main(["--output", str(tmp_path)]) == run.DONE
    found = results(tmp_path)
    assert (found["device"], found["commit"], found["copy_bandwidth"]) == ("Made Up 1", "abc", 1e12)
    assert {"driver", "torch", "triton", "host"} <= found.keys()
    described = [(row["shape"], row["dtype"], row["layout"], row["extras"], row["pass"]) for row in found["rows"]]
    assert described == [
        (list(c.shape), c.dtype, c.layout, c.extras, which) for c in CASES for which in ("forward", "backward")
    ]
    for row in found["rows"]:
        assert row.keys() >= {"ours_us", "eager_us", "compiled_us", "copy_bandwidth", "bytes"}
        assert row["rotations"] == rotations(row["bytes_read"], machine.cache_bytes())
    assert found["rows"][0]["bytes_read"] * 2 == found["rows"][1]["bytes_read"] == 2 * 2048 * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "group_norm_silu_made_up_1.json"]


def test_each_call_reads_inputs_that_have_left_the_cache() -> None:
    assert rotations(2**20, 50 * 2**20) == 32  # at most: the queue of a round
    assert rotations(2**24, 50 * 2**20) == 10
    assert rotations(2**30, 50 * 2**20) == 2


def test_a_second_run_goes_on_where_the_first_stopped(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 10))  # each look at the clock finds it 10 s later
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert program.main(["--seconds", "45"]) == run.DONE
    assert "The time is up with 4 of 6 cases left" in capsys.readouterr().out
    first = results(tmp_path)["rows"]
    assert len(first) == 4
    machine.timed = 1000
    assert program.main([]) == run.DONE
    assert results(tmp_path)["rows"][:4] == first
    assert len(results(tmp_path)["rows"]) == 12
    timed = machine.timed
    assert program.main([]) == run.DONE
    assert machine.timed == timed


def test_results_of_another_commit_are_neither_mixed_nor_overwritten(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "cases", lambda **_: CASES[:1])
    assert program.main([]) == run.DONE
    before = results(tmp_path)
    assert program.main(["--commit", "def"]) == program.CANNOT_RUN
    assert "results of commit abc, and these are of def" in capsys.readouterr().err
    assert results(tmp_path) == before


def test_without_git_the_commit_must_be_given_before_anything_is_measured(
    machine: Pretended, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("UNETGN_COMMIT")
    monkeypatch.setattr(program, "commit_of", lambda _: None)
    assert program.main([]) == program.CANNOT_RUN
    assert "give --commit or set UNETGN_COMMIT" in capsys.readouterr().err
    assert machine.timed == 0


def test_git_tells_the_commit_inside_of_a_repository_only(tmp_path: Path) -> None:
    assert record.commit_of(tmp_path) is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-mm"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = record.commit_of(tmp_path)
    assert commit is not None
    assert len(commit) == 40


def test_a_contender_that_fails_is_recorded_and_stops_nobody(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(contenders, "compiled", lambda: failing)
    assert program.main([]) == run.DONE
    rows = results(tmp_path)["rows"]
    assert len(rows) == 12
    assert {row["compiled_error"] for row in rows} == {"RuntimeError: no such kernel"}
    assert all("ours_us" in row and "eager_us" in row and "compiled_us" not in row for row in rows)


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_a_case_whose_check_fails_is_a_fault_and_the_others_are_timed(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    right = run.faults_of_case

    def check(case: Case, *rest: Any) -> list[str]:
        if case.dtype != "float32":
            return right(case, *rest)
        if how == "raises":
            raise ValueError("no registers left")
        return ["y is off"]

    monkeypatch.setattr(run, "faults_of_case", check)
    assert program.main([]) == run.WRONG_RESULTS
    found = results(tmp_path)
    assert {row["dtype"] for row in found["rows"]} == {"bfloat16"}
    assert len(found["rows"]) == 8
    said = ["ValueError: no registers left"] if how == "raises" else ["y is off"]
    assert [(fault["dtype"], fault["faults"]) for fault in found["faults"]] == [("float32", said)] * 2


def test_results_that_are_wrong_are_found_by_the_check_of_the_case(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unetgn.ops import aten

    right = aten.forward
    monkeypatch.setattr(aten, "forward", lambda x, *rest: (right(x, *rest)[0] * 1.1, *right(x, *rest)[1:]))
    monkeypatch.setattr(program, "cases", lambda **_: CASES[2:3])
    assert program.main([]) == run.WRONG_RESULTS
    assert results(tmp_path)["rows"] == []
    assert any("y is off by 1.0e-01" in fault for fault in results(tmp_path)["faults"][0]["faults"])


def test_a_lost_device_ends_the_run_and_the_next_one_leaves_the_case_out(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def illegal_access(case: Case, *_: object) -> list[dict[str, Any]]:
        machine.alive = case != CASES[1]
        if not machine.alive:
            raise measure.DeviceLost("an illegal memory access was encountered")
        return right(case, *_)  # type: ignore[arg-type]

    right = measure.rows
    monkeypatch.setattr(run, "rows", illegal_access)
    assert program.main([]) == run.DEVICE_LOST
    assert "Run the same command again" in capsys.readouterr().err
    assert len(results(tmp_path)["rows"]) == 2
    machine.alive = True
    assert program.main([]) == run.WRONG_RESULTS
    assert len(results(tmp_path)["rows"]) == 10


def test_an_error_of_a_contender_that_breaks_the_device_is_a_lost_device(machine: Pretended) -> None:
    def broken(_: object) -> torch.Tensor:
        machine.alive = False
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(measure.DeviceLost, match="ours, forward: RuntimeError: an illegal"):
        measure._timed("ours", broken, [CASES[0].inputs(machine.device, 0)], "forward", machine)


def test_clusters_run_in_a_process_of_their_own_after_the_plain_rows_are_written(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def pretended_run(command: list[str], *, timeout: float, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert len(results(tmp_path)["rows"]) == 12
        if len(commands) == 2:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, {1: 0, 3: -9}[len(commands)])

    instead = SimpleNamespace(run=pretended_run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(run, "subprocess", instead)
    given = ["--output", str(tmp_path), "--clusters"]
    assert program.main(given) == run.DONE
    assert commands[0][2:6] == ["benchmarks.group_norm_silu", "--output", str(tmp_path), "--commit"]
    assert "--clusters-alone" in commands[0]
    assert "--clusters" not in commands[0]
    assert program.main(given) == run.WRONG_RESULTS  # it hangs
    assert "were stopped" in capsys.readouterr().out
    assert program.main(given) == run.DEVICE_LOST  # it is killed


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_clusters_are_timed_where_they_change_the_plan(machine: Pretended, tmp_path: Path, monkeypatch: Any) -> None:
    large = Case((1, 128, 128, 128), "bfloat16", "contiguous")
    monkeypatch.setattr(program, "cases", lambda **_: [CASES[0], large])
    assert program.main(["--clusters-alone"]) == run.DONE
    (row,) = results(tmp_path)["rows"]
    assert (row["shape"], row["clusters"], row["pass"]) == (list(large.shape), True, "forward")
    assert "eager_us" not in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1x2x3x4"], "none of the shapes: 32x256x64x64"),
        (["--part", "4/3"], "write k/n with 1 <= k <= n"),
        (["--dtype", "float64"], "invalid choice"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert message in capsys.readouterr().err


def test_options_choose_the_cases(machine: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(program, "cases", lambda **options: asked.update(options) or [])
    assert program.main(["--dtype", "float16", "--shape", "8x320x64x64", "--part", "2/3", "--quick"]) == run.DONE
    assert asked == {"dtypes": ["float16"], "shapes": [(8, 320, 64, 64)], "part": (2, 3), "quick": True}
