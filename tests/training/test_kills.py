"""Whatever kills a run, and whenever: started again with the same line, it ends with the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.checkpoint import newest_valid, verify

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train.py"
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
    return [sys.executable, str(SCRIPT), "--config", str(config), "--output", str(output), "--resume", "auto", *keys]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def final(run: Path, step: int) -> dict[str, torch.Tensor]:
    (folder,) = (run / "checkpoints").iterdir()  # keep: 1, and nothing temporary
    assert folder.name == f"step-{step:06d}"
    verify(folder)
    return {
        f"{name}.{key}": tensor
        for name in ("model", "ema", "optimizer")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def kill_again_and_again(config: Path, tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    keys = [f"train.steps={steps}"]
    finish(line(config, tmp_path / "whole", *keys))
    moment = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(line(config, tmp_path / "killed", *keys), stderr=subprocess.DEVNULL)
        begun = tmp_path / "killed" / "status.json"
        before = begun.read_text() if begun.exists() else ""
        while process.poll() is None and (not begun.exists() or begun.read_text() == before):
            time.sleep(0.02)  # until it trains: killing the imports proves nothing
        time.sleep(moment.uniform(0, 1.0))
        process.kill()
        process.wait()
    finish(line(config, tmp_path / "killed", *keys))
    whole, killed = final(tmp_path / "whole", steps), final(tmp_path / "killed", steps)
    assert [key for key in whole if not torch.equal(whole[key], killed[key])] == []
    logs = [[row.rsplit(",", 2)[0] for row in (tmp_path / run / "metrics.csv").read_text().splitlines()]
            for run in ("whole", "killed")]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_run_killed_twice_ends_with_the_same_bits(config: Path, tmp_path: Path) -> None:
    kill_again_and_again(config, tmp_path, kills=2, steps=100, seed=0)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_times_ends_with_the_same_bits(config: Path, tmp_path: Path) -> None:
    kill_again_and_again(config, tmp_path, kills=20, steps=600, seed=1)


DISKS = {
    # Two checkpoints of 700 KiB do not fit, and then they do. The disk is gone with its namespace: keep what was on it.
    "a small disk": """
        mount -t tmpfs -o size=1200k tmpfs $DISK && cd $DISK && $TRAIN train.steps=5 || exit 9
        $TRAIN 2> $OUT/error; echo $? > $OUT/code; cp -a run $OUT/full
        mount -o remount,size=64m $DISK && $TRAIN && cp -a run $OUT/after""",
    "a quota": """
        cd $DISK && $TRAIN train.steps=5 || exit 9
        (ulimit -f 200; exec $TRAIN 2> $OUT/error); echo $? > $OUT/code; cp -a run $OUT/full
        $TRAIN && cp -a run $OUT/after""",
}


@pytest.mark.parametrize("disk", DISKS)
def test_a_full_disk_is_said_spares_the_checkpoint_before_and_is_recovered_from(
    disk: str, config: Path, tmp_path: Path
) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"] if disk == "a small disk" else []
    if alone and subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk of their own")
    (tmp_path / "disk").mkdir()
    keys = ["checkpoint.every=5", "train.steps=10"]
    train = " ".join(line(config, Path("run"), *keys))
    names = {"DISK": str(tmp_path / "disk"), "OUT": str(tmp_path), "TRAIN": train}
    done = subprocess.run([*alone, "sh", "-c", DISKS[disk]], env=os.environ | names, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "code").read_text() == "1\n"
    (said,) = [row for row in (tmp_path / "error").read_text().splitlines() if row.startswith("train.py: ")]
    assert "could not be written" in said
    assert "what was saved before is as it was" in said
    assert json.loads((tmp_path / "full" / "status.json").read_text())["state"] == "failed"
    (before,) = (tmp_path / "full" / "checkpoints").iterdir()  # nothing unfinished beside it
    assert verify(before).step == 5
    assert verify(tmp_path / "after" / "checkpoints" / "step-000010").step == 10


KEYS = ["train.steps=10", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The end of a run of ten steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    finish(line(folder / "tiny.yaml", folder / "run", *KEYS))
    return final(folder / "run", 10)


@pytest.mark.parametrize(("moment", "newest"), [("save_file", 5), ("flush", 5), ("replace", 5), ("rmtree", 10)])
def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_newest_whole_checkpoint(
    moment: str, newest: int, config: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """With keep: 1, while the second checkpoint is written, flushed, renamed, and while the first one is deleted."""
    command = line(config, tmp_path / "run", *KEYS)
    killed = [command[0], str(Path(__file__).with_name("train_with_a_kill_in_a_save.py")), *command[2:]]
    done = subprocess.run(killed, env=os.environ | {"KILLED_AT": moment}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    assert list(checkpoints.glob(".tmp-*"))
    found = newest_valid(checkpoints)
    assert found is not None
    assert found.step == newest
    finish(command)
    again = final(tmp_path / "run", 10)
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
