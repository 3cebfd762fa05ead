"""What failures of contenders, results, devices and processes leave in the record of the operator's benchmark."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.group_norm_silu import __main__ as program
from benchmarks.group_norm_silu import contenders, measure, record, run
from benchmarks.group_norm_silu.cases import Case
from tests.benchmarks.made_up_machine import CASES, Pretended, results


@pytest.mark.parametrize("when", ["it is made", "it is called"])
def test_a_contender_that_fails_is_recorded_and_stops_nobody(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def failing(_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand a long story")

    def cannot_be_made() -> Callable[..., torch.Tensor]:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(contenders, "compiled", cannot_be_made if when == "it is made" else lambda: failing)
    assert program.main([]) == run.DONE
    rows = results(tmp_path)["rows"]
    assert len(rows) == 12
    assert {row["compiled_error"] for row in rows} == {"RuntimeError: no such kernel"}
    assert all("ours_us" in row and "eager_us" in row and "compiled_us" not in row for row in rows)


def test_peers_that_are_installed_and_fail_to_start_leave_the_other_times(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("apex", "liger_kernel"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert program.main([]) == run.DONE
    rows = [row for row in results(tmp_path)["rows"] if row["extras"] == "none" and row["dtype"] == "bfloat16"]
    assert all("ours_us" in row and "eager_us" in row for row in rows)
    said = [row["liger_error" if row["layout"] == "contiguous" else "apex_error"] for row in rows]
    assert said == ["ImportError: built for another torch"] * 4


def test_a_case_that_is_wrong_is_a_fault_and_the_others_are_timed(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = run.faults_of_case

    def check(case: Case, *rest: Any) -> list[str]:
        return right(case, *rest) if case.dtype != "float32" else ["y is off"]

    monkeypatch.setattr(run, "faults_of_case", check)
    assert program.main([]) == run.WRONG_RESULTS
    found = results(tmp_path)
    assert {row["dtype"] for row in found["rows"]} == {"bfloat16"}
    assert len(found["rows"]) == 8
    assert [(fault["dtype"], fault["faults"]) for fault in found["faults"]] == [("float32", ["y is off"])] * 2
    assert found["errors"] == []
    assert capsys.readouterr().err.count("WRONG, not timed") == 2


@pytest.mark.parametrize("where", ["faults_of_case", "rows"])
def test_a_case_that_cannot_be_run_is_an_error_and_no_wrong_result_and_is_tried_again(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    right = getattr(run, where)

    def out_of_memory(case: Case, *rest: Any) -> Any:
        if case == CASES[2]:
            raise MemoryError("none left")
        return right(case, *rest)

    monkeypatch.setattr(run, where, out_of_memory)
    for _ in range(2):
        assert program.main([]) == run.NOT_MEASURED
        found = results(tmp_path)
        assert [(one["layout"], one["error"], one["again"]) for one in found["errors"]] == [
            (CASES[2].layout, "MemoryError: none left", True)
        ]
        assert found["faults"] == []
        assert len(found["rows"]) == 10
        said = capsys.readouterr().err
        assert "NOT MEASURED, to be tried again" in said
        assert "WRONG" not in said
    monkeypatch.setattr(run, where, right)
    assert program.main([]) == run.DONE
    assert results(tmp_path)["errors"] == []
    assert len(results(tmp_path)["rows"]) == 12


def test_results_that_are_wrong_are_found_by_the_check_of_the_case(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unetgn.ops import aten

    right = aten.forward
    monkeypatch.setattr(aten, "forward", lambda arguments: (right(arguments)[0] * 1.1, *right(arguments)[1:]))
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
    assert program.main([]) == run.NOT_MEASURED
    found = results(tmp_path)
    assert len(found["rows"]) == 10
    assert [(one["layout"], one["again"]) for one in found["errors"]] == [(CASES[1].layout, False)]
    assert found["faults"] == []


def test_an_error_of_a_contender_that_breaks_the_device_is_a_lost_device(machine: Pretended) -> None:
    def broken(_: object) -> torch.Tensor:
        machine.alive = False
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(measure.DeviceLost, match="ours, forward: RuntimeError: an illegal"):
        measure.timed("ours", lambda: broken, [CASES[0].inputs(machine.device, 0)], "forward", machine)


def other_process(ends: Callable[[list[str], float], int]) -> SimpleNamespace:
    """What stands in for `subprocess`: `ends` gets the command and the time limit, and returns the exit code."""

    def pretended_run(command: list[str], *, timeout: float, check: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, ends(command, timeout))

    return SimpleNamespace(run=pretended_run, TimeoutExpired=subprocess.TimeoutExpired)


def test_clusters_run_in_a_process_of_their_own_after_the_plain_rows_are_written(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def ends_well(command: list[str], _: float) -> int:
        commands.append(command)
        assert len(results(tmp_path)["rows"]) == 12
        return 0

    monkeypatch.setattr(run, "subprocess", other_process(ends_well))
    assert program.main(["--output", str(tmp_path), "--clusters"]) == run.DONE
    assert commands[0][2:6] == ["benchmarks.group_norm_silu", "--output", str(tmp_path), "--commit"]
    assert "--clusters-alone" in commands[0]
    assert "--clusters" not in commands[0]


@pytest.mark.parametrize(
    ("how", "lasted", "code", "again"),
    [
        ("hangs", 100.0, run.NOT_MEASURED, False),
        ("has just begun", 5.0, run.NOT_MEASURED, True),
        ("is killed", 5.0, run.DEVICE_LOST, False),
    ],
)
def test_a_cluster_case_that_its_process_does_not_come_back_from_is_recorded(
    machine: Pretended,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    lasted: float,
    code: int,
    again: bool,
) -> None:
    def ends_badly(command: list[str], timeout: float) -> int:
        path = tmp_path / "group_norm_silu_made_up_1.json"
        other = record.Record.open(path, {"device": "Made Up 1", "commit": "abc"})
        other.begin(CASES[0], clusters=True)
        other.contents["running"]["began"] -= lasted
        other.save()
        if how == "is killed":
            return -9
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run, "subprocess", other_process(ends_badly))
    assert program.main(["--clusters"]) == code
    found = results(tmp_path)
    assert found["faults"] == []
    (error,) = found["errors"]
    assert (error["layout"], error["clusters"], error["again"]) == (CASES[0].layout, True, again)
    assert ("signal 9" if how == "is killed" else "did not end") in error["error"]
    opened = record.Record.open(tmp_path / "group_norm_silu_made_up_1.json", {"device": "Made Up 1", "commit": "abc"})
    assert opened.has(CASES[0], clusters=True) is not again
    assert len(opened.contents["rows"]) == 12


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_clusters_are_timed_where_they_change_the_plan(machine: Pretended, tmp_path: Path, monkeypatch: Any) -> None:
    large = Case((1, 256, 64, 64), "bfloat16", "contiguous")  # 32768 elements a group
    checked = []
    right = run.faults_of_case

    def check(case: Case, *rest: Any) -> list[str]:
        checked.append(case)
        return right(case, *rest)

    monkeypatch.setattr(run, "faults_of_case", check)
    cases = [CASES[0], large, replace(large, layout="channels_last"), replace(large, extras="maps")]
    monkeypatch.setattr(program, "cases", lambda **_: cases)
    for _ in range(2):
        assert program.main(["--clusters-alone"]) == run.DONE
    assert checked == cases[1:3]
    rows = results(tmp_path)["rows"]
    timed = [(layout, which) for layout in ("contiguous", "channels_last") for which in ("forward", "backward")]
    assert [(row["layout"], row["pass"]) for row in rows] == timed
    assert all(row["shape"] == list(large.shape) and row["clusters"] and "eager_us" not in row for row in rows)
