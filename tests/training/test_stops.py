"""Whatever ends one rank, or the launcher, ends all, with nothing lost."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.training.forked import LAUNCHER, finish, start, succeed
from tests.training.launched import BAD_RANK, ROOT, TWO, launcher_line
from tests.training.runs import assert_equal_bits, logged, status, wait_until, weights
from tests.training.train_with_a_signal_at_the_end import PLACES

A_BAD_RANK = {"script": BAD_RANK, "launcher": TWO, "processes": 2}


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_its_own(tiny: Path, tmp_path: Path) -> None:
    """The other rank sees it, too, in the gradient that both share."""
    line = ["--config", str(tiny), "--output", str(tmp_path / "a"), "preview.every=0"]
    bad = {"BAD": "nan", "BAD_FROM": str(6 * 8)}  # of the seventh step
    done = finish(*line, **A_BAD_RANK, environment=bad)
    assert done.codes == [1, 1]
    assert done.stderr.count("train.py: the loss is not finite at step 7, rank 1; the last checkpoint is") == 1
    assert status(tmp_path / "a")["error"] == "the loss is not finite at step 7, rank 1"
    assert status(tmp_path / "a")["state"] == "diverged"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_one_rank_ends_the_other_ones_wait_for_its_loader(workers: int, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    line = ["--config", str(tiny), "--output", str(output), "preview.every=0", f"data.num_workers={workers}"]
    with start(*line, **A_BAD_RANK, environment={"BAD": "stuck", "BAD_FROM": str(6 * 8)}) as ranks:
        wait_until(lambda: len(logged(output)) > 6)  # six steps and the header
        time.sleep(1)
        os.kill(status(output)["pid"], signal.SIGTERM)  # rank 0
        done = ranks.wait(timeout=30)
    assert done.codes == [1, 1]
    assert done.stderr.count("train.py: stopped by a signal after step 6; go on with --resume auto") == 1
    assert status(output) | {"state": "preempted", "step": 6} == status(output)
    assert weights(output, 6)


@pytest.mark.thorough
def test_a_process_whose_launcher_died_while_it_was_starting_stops(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "orphan"
    line = ["--config", str(tiny), "--output", str(output), "train.steps=100000", "preview.every=0"]
    with start(*launcher_line(*line, launcher=None), script=LAUNCHER) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        wait_until(lambda: bool(children.read_text()))
        process = int(children.read_text().split()[0])
        wait_until(lambda: "train.py" in Path(f"/proc/{process}/cmdline").read_text())
        time.sleep(0.5)  # the first line of train.py
    wait_until(lambda: not Path(f"/proc/{process}").exists())
    assert status(output)["state"] in ("", "preempted")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),  # for the process it is the same
    ],
)
def test_a_process_whose_launcher_died_saves_and_stops(end: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """A launcher of one process passes no signal on."""
    output = tmp_path / "orphan"
    line = ["--config", str(tiny), "--output", str(output), "train.steps=100000", "preview.every=0",
            "train.validate_every=0", "checkpoint.every=100000"]  # fmt: skip
    with start(*launcher_line(*line, launcher=None), script=LAUNCHER) as launcher:
        wait_until(lambda: status(output)["state"] == "running")
        os.kill(launcher.pid, end)
        launcher.wait()
    wait_until(lambda: status(output)["state"] == "preempted")
    assert list((output / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("keys", "code"), [((), 0), (("train.processes=3",), 2), (("data.held_out=0.9999",), 2)])
def test_no_process_group_is_left_to_the_exit(keys: Sequence[str], code: int, tiny: Path, tmp_path: Path) -> None:
    """Else C++ sometimes aborts: "terminate called without an active exception"."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
    script = ROOT / "tests" / "training" / "train_and_look_for_a_process_group.py"
    line = ["--config", str(tiny), "--output", str(tmp_path), "--dry-run", *keys]
    done = finish(*line, script=script, launcher=TWO, environment=alone)
    assert done.code == code, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "a process group is left: False"


AT_THE_END = [(place, rank) for place in PLACES for rank in (0, 1)]
OFTEN = [("the last save", 1), ("the last status", 0)]


@pytest.mark.parametrize(
    ("place", "rank"), [pytest.param(*end, marks=() if end in OFTEN else pytest.mark.slow) for end in AT_THE_END]
)
def test_a_signal_in_the_last_step_or_after_it_loses_nothing(place: str, rank: int, tiny: Path, tmp_path: Path) -> None:
    keys = ["train.steps=3", "checkpoint.every=2", "preview.every=0"]
    at = {"SIGNAL_AT": place, "SIGNAL_ON": str(rank)}
    script = ROOT / "tests" / "training" / "train_with_a_signal_at_the_end.py"
    line = ["--config", str(tiny), "--resume", "auto", *keys, "--output"]
    done = finish(*line, str(tmp_path / "a"), script=script, environment=at, launcher=TWO, processes=2)
    assert status(tmp_path / "a")["step"] == 3
    if rank == 0 and place in ("the end", "the last status"):  # rank 1 may be there while rank 0 still writes
        assert status(tmp_path / "a")["state"] == "completed"
        assert done.codes == [0, 0]
    assert {*done.codes} <= {0, 1}
    for run in "ab":
        succeed(*line, str(tmp_path / run), launcher=TWO, processes=2)
    assert status(tmp_path / "a")["state"] == "completed"
    assert_equal_bits(tmp_path / "a", tmp_path / "b", 3)
    assert (tmp_path / "a" / "pipeline" / "model_index.json").is_file()
