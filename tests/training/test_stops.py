"""Whatever ends one rank, or the launcher, ends all, with nothing lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.training.launched import BAD_RANK, ROOT, command, logged, status, wait_until, weights


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_its_own(tiny: Path, tmp_path: Path) -> None:
    """The other rank sees it, too, in the gradient that both share."""
    line = ["--config", str(tiny), "--output", str(tmp_path / "a"), "preview.every=0"]
    bad = os.environ | {"BAD": "nan", "BAD_FROM": str(6 * 8)}  # of the seventh step
    done = subprocess.run(
        command(*line, script=BAD_RANK), env=bad, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert status(tmp_path / "a")["error"] == "the loss is not finite at step 7, rank 1"
    assert status(tmp_path / "a")["state"] == "diverged"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_one_rank_ends_the_other_ones_wait_for_its_loader(workers: int, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    line = ["--config", str(tiny), "--output", str(output), "preview.every=0", f"data.num_workers={workers}"]
    stuck = os.environ | {"BAD": "stuck", "BAD_FROM": str(6 * 8)}
    process = subprocess.Popen(
        command(*line, script=BAD_RANK), env=stuck, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: len(logged(output)) > 6)  # six steps and the header
        time.sleep(1)
        os.kill(status(output)["pid"], signal.SIGTERM)  # rank 0
        process.wait(timeout=30)
    finally:
        process.kill()
    assert status(output) | {"state": "preempted", "step": 6} == status(output)
    assert weights(output, 6)


def test_a_process_whose_launcher_died_while_it_was_starting_stops(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "orphan"
    line = ["--config", str(tiny), "--output", str(output), "train.steps=100000", "preview.every=0"]
    launcher = subprocess.Popen(command(*line, launcher=None), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    wait_until(lambda: bool(children.read_text()))
    process = int(children.read_text().split()[0])
    wait_until(lambda: "train.py" in Path(f"/proc/{process}/cmdline").read_text())
    time.sleep(0.5)  # the first line of train.py
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not Path(f"/proc/{process}").exists())
    assert status(output)["state"] in ("", "preempted")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_whose_launcher_died_saves_and_stops(end: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """A launcher of one process passes no signal on."""
    output = tmp_path / "orphan"
    line = ["--config", str(tiny), "--output", str(output), "train.steps=100000", "preview.every=0",
            "train.validate_every=0", "checkpoint.every=100000"]  # fmt: skip
    process = subprocess.Popen(command(*line, launcher=None), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: status(output)["state"] == "running")
    process.send_signal(end)
    process.wait()
    wait_until(lambda: status(output)["state"] == "preempted")
    assert list((output / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("keys", "code"), [((), 0), (("train.processes=3",), 2), (("data.held_out=0.9999",), 2)])
def test_no_process_group_is_left_to_the_exit(keys: Sequence[str], code: int, tiny: Path, tmp_path: Path) -> None:
    """Else C++ sometimes aborts: "terminate called without an active exception"."""
    script = """
import sys, torch
from training.train import main
code = main(sys.argv[1:])
assert not torch.distributed.is_initialized()
sys.exit(code)
"""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | rank | {"MASTER_PORT": str(29600 + os.getpid() % 300)}
    line = [sys.executable, "-c", script, "--config", str(tiny), "--output", str(tmp_path), "--dry-run", *keys]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr[-3000:]
