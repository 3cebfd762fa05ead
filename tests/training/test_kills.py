"""Whatever kills a run, and whenever: started again with the same line, it ends with the same bits."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint
from training.checkpoint import verify

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train.py"
TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, dropout: 0.1, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
train: {steps: 300, batch_size: 8, learning_rate: 1e-3, warmup_steps: 2, log_every: 7, checkpoint_every: 5,
        sample_every: 0, trackers: []}
checkpoint: {keep: 1}
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


@pytest.mark.parametrize("moment", ["save_file", "flush", "rename"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_it(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill runs no handlers: the exception here is raised past every `except` by removing the clean-up too."""

    class Kill(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Kill

    tensors = {"model": {"w": torch.ones(8)}}
    good = checkpoint.write_checkpoint(tmp_path, 1, tensors, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        if moment == "save_file":
            patch.setattr(checkpoint.safetensors.torch, "save_file", killed)
        elif moment == "flush":
            patch.setattr(checkpoint, "flush", killed)
        else:
            patch.setattr(Path, "rename", killed)
        with pytest.raises(Kill):
            checkpoint.write_checkpoint(tmp_path, 2, tensors, {}, {})
    assert list(tmp_path.glob(".tmp-*"))
    assert checkpoint.newest_valid(tmp_path) == good
    again = checkpoint.write_checkpoint(tmp_path, 2, tensors, {}, {})
    checkpoint.delete_old(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [again]
