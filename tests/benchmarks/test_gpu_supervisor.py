"""The supervisor of `benchmarks.gpu` with workers that hang, break and die: each unit has its line, the others run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import child
from benchmarks.gpu.journal import NAME, lines
from benchmarks.gpu.summary import summary
from benchmarks.gpu.supervisor import LOG, Refused, Supervisor

WORKER = Path(__file__).with_name("pretended_worker.py")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LAST_WORDS", 0.2)
    monkeypatch.setattr(child, "LOOK", 0.01)


def supervisor(folder: Path, units: Sequence[str], seconds: float = 60.0, **options: Any) -> Supervisor:
    variables = {**os.environ, "MARK": str(folder), **options.pop("variables", {})}
    command = [sys.executable, str(WORKER), *units]
    return Supervisor(command, folder, time.monotonic() + seconds, variables, **options)


def run(folder: Path, units: Sequence[str], seconds: float = 60.0, **options: Any) -> dict[str, str]:
    """Run, and return the status of each unit, in the order of their lines."""
    assert supervisor(folder, units, seconds, **options).run()
    return {line["unit"]: line["status"] for line in lines(folder)}


def is_gone(command: str) -> bool:
    """Return True once no process has this in its command line: the kernel may need a moment for what was killed."""
    for _ in range(100):
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if command not in processes:
            return True
        time.sleep(0.05)
    return False


ENDS = {
    "wrong": ("wrong", "off by"),
    "raises": ("error", "ValueError: no such kernel"),
    "absent": ("absent", "diffusers is not installed"),
    "breaks": ("lost", "illegal memory access"),
    "hangs": ("hung", "killed after"),
    "deaf": ("hung", "killed after"),
    "killed": ("died", "SIGKILL"),
    "segfault": ("died", "SIGSEGV"),
    "exits": ("died", "exit code 7"),
    "chatters": ("done", "1.5"),
}


def test_each_end_of_a_unit_is_written_down_and_costs_no_other_unit(tmp_path: Path) -> None:
    units = [unit for end in ENDS for unit in (end, f"fine after {end}")]
    assert run(tmp_path, units) == {unit: ENDS[unit][0] if unit in ENDS else "done" for unit in units}
    for line in lines(tmp_path):
        assert line["device"] == "device"
        if line["unit"] in ENDS:
            assert ENDS[line["unit"]][1] in json.dumps(line)
        else:
            assert line["data"] == {"us": [1.5, 2.5]}
    assert "in hangs\n" in (tmp_path / LOG).read_text(), "the log says where it hung"


def test_nothing_that_a_worker_started_is_left_behind(tmp_path: Path) -> None:
    run(tmp_path, ["deaf"])
    assert is_gone(f"time.sleep(60) {tmp_path}")


def test_what_does_not_fit_the_time_is_left_out_with_its_estimate_and_what_does_is_run(tmp_path: Path) -> None:
    assert run(tmp_path, ["fine long:900", "fine short"], 30.0) == {"fine long": "skipped", "fine short": "done"}
    first = lines(tmp_path)[0]
    assert first["estimate"] == 900
    assert "900 s by estimate" in first["reason"]


def test_a_unit_that_takes_longer_than_the_time_left_is_stopped_and_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = supervisor(tmp_path, ["fine", "slow", "fine too"])

    def late() -> None:
        one.deadline = time.monotonic() + 0.1

    when_ordered(monkeypatch, "slow", late)
    assert one.run()
    assert [line["status"] for line in lines(tmp_path)] == ["done", "skipped", "skipped"]
    assert "the time was up after" in lines(tmp_path)[1]["reason"]


def when_ordered(monkeypatch: pytest.MonkeyPatch, unit: str, then: Callable[[], None]) -> None:
    """Call `then` as soon as a worker has been asked for that unit."""
    usual = child.Child.order

    def order(self: child.Child, name: str) -> None:
        usual(self, name)
        if name == unit:
            then()

    monkeypatch.setattr(child.Child, "order", order)


def test_the_same_command_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    units = ["fine", "wrong", "raises", "killed", "absent", "fine later:900"]
    run(tmp_path, units, 30.0)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"unit": "torn", "ki')  # the machine was taken away
    before = len(lines(tmp_path))
    run(tmp_path, units, 2000.0)
    assert [line["unit"] for line in lines(tmp_path)[before:]] == ["absent", "fine later"]
    before = len(lines(tmp_path))
    run(tmp_path, units, again=True)
    assert [line["unit"] for line in lines(tmp_path)[before:]] == ["raises", "killed", "absent"]
    before = len(lines(tmp_path))
    run(tmp_path, units, 2000.0, variables={"source": "another"})
    assert [line["unit"] for line in lines(tmp_path)[before:]] == [*units[:-1], "fine later"]


def test_units_of_one_kind_can_be_chosen(tmp_path: Path) -> None:
    assert run(tmp_path, ["fine first", "fine second", "wrong first"], only=["second"]) == {"fine second": "done"}


def test_after_two_hangs_of_a_kind_its_others_are_left_out(tmp_path: Path) -> None:
    found = run(tmp_path, ["hangs 1 cluster", "hangs 2 cluster", "fine 3 cluster", "fine rest"])
    assert list(found.values()) == ["hung", "hung", "skipped", "done"]


def test_a_machine_on_which_no_worker_starts_is_given_up(tmp_path: Path) -> None:
    assert not supervisor(tmp_path, ["fine"], variables={"STARTS": "never"}).run()
    assert [line["status"] for line in lines(tmp_path)] == ["died"] * 3
    assert "exit code 9" in lines(tmp_path)[0]["reason"]


def test_a_worker_that_cannot_work_here_says_why(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No CUDA"):
        supervisor(tmp_path, ["fine"], variables={"REFUSED": "No CUDA or ROCm device"}).run()


def test_an_interrupted_run_ends_its_worker_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_ordered(monkeypatch, "slow", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        supervisor(tmp_path, ["fine", "slow", f"fine {tmp_path}"]).run()
    assert [line["unit"] for line in lines(tmp_path)] == ["fine"]
    assert is_gone(f"{WORKER} fine slow fine {tmp_path}")


def test_the_table_names_what_is_wrong_failed_and_left_out(tmp_path: Path) -> None:
    run(tmp_path, ["fine check", "wrong check", "raises check", "absent network", "fine rest:900"], 30.0)
    table = summary(tmp_path)
    for words in ("1 done  1 wrong  1 error", "wrong check: y is off", "ValueError", "diffusers is not", "900 s by"):
        assert words in table


def test_the_supervisor_needs_neither_torch_nor_what_is_measured() -> None:
    code = "import sys, benchmarks.gpu.__main__; sys.exit(any(m in sys.modules for m in ('torch', 'unetgn', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=WORKER.parents[2], check=False).returncode == 0
