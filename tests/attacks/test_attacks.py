"""Attacks, a few of each kind: `python -m tests.attacks` makes many, and prints figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks import files
from tests.attacks.__main__ import KINDS
from tests.attacks.judge import BAD, Count, judge
from tests.attacks.runs import HOWS, whole
from tests.training.launched import ROOT

RUNS = [name for name in KINDS if name.startswith("run of ")]
# Each kind with one process or with several; the others, which are like these, with `-m slow`.
ELSEWHERE = (
    *(f"run of 1: {attack}" for attack in ("workers", "signals", "killed at any")),
    *(f"run of 2: {attack}" for attack in ("killed at an op", "files", "limits", "clock")),
    *(f"run of 3: {attack}" for attack in ("signals", "an op")),
)
IN_A_RUN = [name for name in KINDS if "of a run" in name or name == "file: logs"]  # a run comes before them
OTHERS = [name for name in KINDS if name not in (*RUNS, *IN_A_RUN)]


def hold(name: str, many: int) -> None:
    """Make attacks of a kind; none may be lost, wrong or hung."""
    kind, count = KINDS[name], Count()
    files.prepare([kind])
    for number, verdict in judge(kind, 0, range(many)):
        count.add(name, 0, number, verdict)
    assert count.tried == many
    assert count.faults == []


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("operator")])
def test_calls_are_right_or_refused(name: str) -> None:
    hold(name, 300)


@pytest.mark.parametrize("name", [name for name in OTHERS if not name.startswith("operator")])
def test_damaged_files_are_refused_or_as_they_were(name: str) -> None:
    hold(name, 3 if "resume" in name else 6)  # of those that train, fewer


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in [*RUNS, *IN_A_RUN] if not name.startswith(ELSEWHERE)])
def test_runs_of_one_and_of_two_processes_hold(name: str) -> None:
    hold(name, 1 if name in RUNS else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(ELSEWHERE)])
def test_runs_of_other_numbers_of_processes_hold(name: str) -> None:
    hold(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_fifty_random_times_ends_with_the_same_bits(processes: int) -> None:
    hold(f"run of {processes}: killed at any time", 50)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_every_operation_on_a_file_ends_with_the_same_bits(processes: int) -> None:
    hold(f"run of {processes}: killed at an operation", len(HOWS) * whole(processes)[1])


@pytest.mark.slow
def test_ten_minutes_of_attacks_find_nothing(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.attacks", "--seconds", "600", "--seed", "0", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert sum(kind[outcome] for kind in json.loads(figures.read_text())["kinds"].values() for outcome in BAD) == 0
