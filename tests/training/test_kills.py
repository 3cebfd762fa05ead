"""Whatever kills a run, and whenever: started again with the same line, it ends with the same bits."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training.forked import finish, start, succeed
from tests.training.launched import ROOT
from tests.training.runs import assert_same_tensors, everything, logged_without_speed, status
from unetgn.training.checkpoint import newest_valid, verify

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, dropout: 0.1, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
train: {steps: 300, batch_size: 8, learning_rate: 1e-3, warmup_steps: 2, log_every: 7, trackers: []}
checkpoint: {every: 5, keep: 1}
preview: {every: 0}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


def line(config: Path, output: Path, *keys: str) -> list[str]:
    return ["--config", str(config), "--output", str(output), "--resume", "auto", *keys]


def final(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Read the tensors of the one checkpoint that is left, keep: 1, with nothing temporary beside it."""
    (folder,) = (run / "checkpoints").iterdir()
    assert folder.name == f"step-{step:06d}"
    verify(folder)
    return everything(run, step)


def kill_again_and_again(config: Path, tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    """Kill a run at random moments of its training, and compare its end with that of a run that nobody killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    keys = [f"train.steps={steps}"]
    succeed(*line(config, whole, *keys))
    moment = random.Random(seed)
    for _ in range(kills):
        before = status(killed)
        with start(*line(config, killed, *keys)) as process:
            while process.running() and status(killed) == before:
                time.sleep(0.02)  # until it trains: a kill before that proves nothing
            time.sleep(moment.uniform(0, 1.0))
        assert status(killed)["state"] == "running"
    succeed(*line(config, killed, *keys))
    assert_same_tensors(final(whole, steps), final(killed, steps))
    assert logged_without_speed(whole) == logged_without_speed(killed)


def test_a_run_killed_twice_ends_with_the_same_bits(config: Path, tmp_path: Path) -> None:
    kill_again_and_again(config, tmp_path, kills=2, steps=60, seed=0)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_times_ends_with_the_same_bits(config: Path, tmp_path: Path) -> None:
    kill_again_and_again(config, tmp_path, kills=20, steps=600, seed=1)


@pytest.mark.parametrize("disk", ["a small disk", "a quota"])
def test_a_full_disk_is_said_spares_the_checkpoint_before_and_is_recovered_from(
    disk: str, config: Path, tmp_path: Path
) -> None:
    keys = ["checkpoint.every=5", "train.steps=10"]
    script = ROOT / "tests" / "training" / "train_on_a_full_disk.py"
    done = finish(disk, str(tmp_path), *line(config, Path("run"), *keys), script=script)
    if disk == "a small disk" and done.code == 77:
        pytest.skip("this system lets nobody mount a small disk of their own")
    assert done.code == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "codes: 0 1 0"
    (said,) = [row for row in done.stderr.splitlines() if row.startswith("train.py: ")]
    assert "could not be written" in said
    assert "what was saved before is as it was" in said
    assert status(tmp_path / "full")["state"] == "failed"
    (before,) = (tmp_path / "full" / "checkpoints").iterdir()  # nothing unfinished beside it
    assert verify(before).step == 5
    assert verify(tmp_path / "after" / "checkpoints" / "step-000010").step == 10


KEYS = ["train.steps=10", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the end of a run of ten steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    succeed(*line(folder / "tiny.yaml", folder / "run", *KEYS))
    return final(folder / "run", 10)


@pytest.mark.parametrize(("moment", "newest"), [("save_file", 5), ("flush", 5), ("replace", 5), ("rmtree", 10)])
def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_newest_whole_checkpoint(
    moment: str, newest: int, config: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """With keep: 1, while the second checkpoint is written, flushed, renamed, and while the first one is deleted."""
    command = line(config, tmp_path / "run", *KEYS)
    script = ROOT / "tests" / "training" / "train_with_a_kill_in_a_save.py"
    assert finish(*command, script=script, environment={"KILLED_AT": moment}).code == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    assert list(checkpoints.glob(".tmp-*"))
    assert newest_valid(checkpoints).path == checkpoints / f"step-{newest:06d}"
    succeed(*command)
    assert_same_tensors(whole, final(tmp_path / "run", 10))
