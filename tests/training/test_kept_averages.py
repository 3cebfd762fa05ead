"""The power-function averages that training keeps, against their definition over the steps of the run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.forked import succeed
from tests.training.launched import FSDP2, ON_CPUS, TWO
from tests.training.loops import Runs, spare_time
from tests.training.runs import assert_equal_bits, assert_same_tensors, weights
from unetgn.training.average import main as average
from unetgn.training.checkpoint import checkpoint_path, verify
from unetgn.training.config import EMAConfig
from unetgn.training.errors import CheckpointError, Failed
from unetgn.training.loop import Loop
from unetgn.training.power_averages import Snapshot, gamma_of, list_snapshots
from unetgn.training.resume import check_same_run, dry_run_words
from unetgn.training.run_directory import RunDirectory

WIDTHS = (0.05, 0.2)
KEEP = ("ema.power_widths=[0.05,0.2]", "preview.every=0", "train.validate_every=0")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    spare_time(monkeypatch.setattr)
    return Runs(tmp_path)


def assert_definition(run: Path, steps: Sequence[int]) -> None:
    """Compare with ∫ τ^γ of the weights after each step, in float64; the run has a checkpoint of each."""
    for step in steps:
        snapshot = Snapshot.read(run / "averages" / f"step-{step:06d}.safetensors")
        assert snapshot.widths == list(WIDTHS)
        for width in WIDTHS:
            shares = np.diff((np.arange(step + 1) / step) ** (gamma_of(width) + 1))
            expected = {}
            for number, share in enumerate(shares, start=1):
                for name, tensor in weights(run, number).items():
                    expected[name] = expected.get(name, 0) + float(share) * tensor.double()
            for name, tensor in snapshot.tensors(width).items():
                torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def snapshots(run: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of all snapshots."""
    files = sorted((run / "averages").glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_what_a_run_keeps_is_the_integral_over_its_steps(runs: Runs) -> None:
    run = runs.run("run", *KEEP, "checkpoint.every=1")
    assert_definition(run, [1, 3, 6])
    assert_same_tensors(weights(run, 6, "averages"), load_file(run / "averages" / "step-000006.safetensors"))
    assert average(["--run", str(run), "--width", "0.05"]) == 0
    made = verify(checkpoint_path(run / "averages" / "width-0.05" / "checkpoints", 6)).tensors("ema")
    kept = list_snapshots(run / "averages")[-1].tensors(0.05)
    for name, tensor in kept.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_keeps_what_the_unbroken_one_does(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure at another step than one that is due, and from a path, into another folder."""
    whole = runs.run("whole", *KEEP, "checkpoint.every=3")
    elsewhere = runs.run("other", *KEEP, "checkpoint.every=3", resume=str(whole / "checkpoints" / "step-000003"))
    read = Loop.read_batches
    monkeypatch.setattr(Loop, "read_batches", lambda self: self.fail() if self.state.step == 4 else read(self))
    monkeypatch.setattr(Loop, "fail", lambda _: 1 / 0, raising=False)
    with pytest.raises(Failed, match="step 4 was saved"):
        runs.run("broken", *KEEP, "checkpoint.every=3")
    monkeypatch.setattr(Loop, "read_batches", read)
    assert [each.step for each in list_snapshots(runs.folder / "broken" / "averages")] == [3]
    broken = runs.run("broken", *KEEP, "checkpoint.every=3", resume="auto")
    for run in (elsewhere, broken):
        assert_equal_bits(whole, run, 6)
        assert_same_tensors(weights(whole, 6, "averages"), weights(run, 6, "averages"))
    assert_same_tensors(snapshots(whole), snapshots(broken))


def test_going_on_from_an_older_checkpoint_leaves_one_history(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.run("run", *KEEP, "checkpoint.every=2")
    before = snapshots(run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    said = dry_run_words(runs.loop.config, RunDirectory(run), verify(run / "checkpoints" / "step-000002"))
    assert all(f"step-00000{step}.safetensors (after step 2; " in said for step in (4, 6))
    (run / "averages" / "step-000002.safetensors").unlink()  # as of a run that was killed between the two writes
    (run / "averages" / "step-000099.safetensors").write_text("of a longer run")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "next_step", lambda _: 1 / 0)
        patch.setattr(Loop, "rescue", lambda self, words, save: words)
        with pytest.raises(Failed):
            runs.run("run", *KEEP, "checkpoint.every=2", resume="auto")
    left = [run / "averages" / f"step-0000{step}.safetensors.left" for step in ("04", "06", "99")]
    assert all(file.is_file() for file in left)  # until the run has saved
    runs.run("run", *KEEP, "checkpoint.every=2", resume="auto")
    assert not any(file.exists() for file in left)
    assert_same_tensors(before, snapshots(run))


def test_a_run_without_them_writes_none_and_does_not_go_on_with_them(runs: Runs) -> None:
    run = runs.run("run", "preview.every=0", "checkpoint.every=3")
    assert not (run / "averages").exists()
    checkpoint = verify(run / "checkpoints" / "step-000003")
    assert not (checkpoint.path / "averages.safetensors").exists()
    config = runs.loop.config
    changed = type(config)(**{**vars(config), "ema": EMAConfig(decay=config.ema.decay, power_widths=WIDTHS)})
    with pytest.raises(CheckpointError, match=r"ema\.power_widths was \(\) and is \(0\.05, 0\.2\)"):
        check_same_run(changed, runs.loop.samples, checkpoint, 1)


def test_a_damaged_average_is_found_before_the_run_goes_on(runs: Runs) -> None:
    run = runs.run("run", *KEEP, "checkpoint.every=6")
    file = run / "checkpoints" / "step-000006" / "averages.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"averages\.safetensors is not what was written"):
        verify(file.parent)


@pytest.mark.parametrize(
    ("widths", "words"),
    [((0.5,), "none of a power function"), ((0.0,), "none of a power function"), ((0.1, 0.1), "has one twice")],
)
def test_widths_that_cannot_be_kept_are_refused(widths: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=rf"ema\.power_widths is .*{words}"):
        EMAConfig(power_widths=widths)


@pytest.mark.thorough
@pytest.mark.parametrize("how", [{"launcher": TWO}, {"launcher": FSDP2, "script": ON_CPUS}], ids=["DDP", "FSDP2"])
def test_two_processes_keep_them_and_go_on_exactly(how: dict, tiny: Path, tmp_path: Path) -> None:
    line = ["--config", str(tiny), *KEEP, "train.steps=4", "checkpoint.every=1", "checkpoint.keep=9"]
    succeed(*line, "--output", str(tmp_path / "run"), processes=2, **how)
    assert_definition(tmp_path / "run", [2, 4])
    middle = tmp_path / "run" / "checkpoints" / "step-000002"
    succeed(*line, "--output", str(tmp_path / "again"), "--resume", str(middle), processes=2, **how)
    assert_same_tensors(weights(tmp_path / "run", 4, "averages"), weights(tmp_path / "again", 4, "averages"))
