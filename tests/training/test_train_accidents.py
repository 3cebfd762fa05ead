"""What goes wrong around the training itself: logs cut short, trackers that fail, a folder that another run holds."""

import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.training.launched import SIX_STEPS
from tests.training.runs import assert_equal_bits, losses, status
from tests.training.test_train import run
from unetgn.training import train
from unetgn.training.run_directory import RunDirectory


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(SIX_STEPS)
    return file


@pytest.mark.parametrize("cut", ["5", "5,0.0", "5,0.01,", "5,0.01,0.7,0.1,0.3,\0\0\0", "\0" * 20])
def test_a_log_whose_last_row_was_cut_short_is_mended(
    cut: str, finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk or a loss of power leaves it."""
    shutil.copytree(finished, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-000006")
    log = tmp_path / "a" / "metrics.csv"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rows[:5]) + cut)  # the header and steps 1 to 4
    assert run(config, tmp_path / "a", "--resume", "auto") == 0
    assert losses(tmp_path / "a") == losses(finished)


def test_trackers_that_cannot_start_are_said_and_the_status_tells(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tb").write_text("a file where TensorBoard wants a folder")
    assert run(config, tmp_path / "a", "train.trackers=[tensorboard]") == 1
    assert "Not a directory" in capsys.readouterr().err
    assert status(tmp_path / "a")["state"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_pipeline_is_written_preempts_and_is_made_up_for(
    number: signal.Signals, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*arguments: object, **more: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("went on writing")

    monkeypatch.setattr(train, "save_pipeline", signalled)
    assert run(config, tmp_path / "a") == 1
    assert status(tmp_path / "a") | {"state": "preempted", "step": 6} == status(tmp_path / "a")
    monkeypatch.undo()
    assert run(config, tmp_path / "a", "--resume", "auto") == 0
    assert status(tmp_path / "a")["state"] == "completed"
    assert (tmp_path / "a" / "pipeline" / "model_index.json").is_file()


def test_the_folder_is_taken_before_it_is_looked_into(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that saves its last step between the two would find that step deleted."""
    shutil.copytree(finished, tmp_path / "a")
    original = train.find_start
    held = []

    def look(output: RunDirectory, *more: str) -> Path | None:
        # A record lock stops other processes only.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            held.append(pool.apply(is_held, [output.path]))
        return original(output, *more)

    monkeypatch.setattr(train, "find_start", look)
    assert run(config, tmp_path / "a", "--resume", "auto") == 0
    assert held == [True]


def is_held(folder: Path) -> bool:
    try:
        RunDirectory(folder).lock()
    except train.RunDirectoryError:
        return True
    return False


def test_a_group_that_is_left_out_on_resuming_is_a_change(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(SIX_STEPS.replace("norm:", "attention: {norm: {eps: 0.1, num_groups: 4}}, norm:"))
    assert run(config, tmp_path / "a", "train.steps=2") == 0
    assert run(config, tmp_path / "a", "--resume", "auto", "model.attention.norm=null") == 2
    assert "model.attention.norm.eps was 0.1 and is left out" in capsys.readouterr().err


def test_a_refused_start_leaves_no_folder_and_a_dry_run_tries_the_folder(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "new", "--resume", str(finished), "train.learning_rate=1") == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for line in ([], ["--dry-run"]):
        assert run(config, tmp_path / "file" / "a", *line) == 2
        assert f"{tmp_path / 'file'} is a file; give another folder" in capsys.readouterr().err


def test_of_a_key_that_is_given_twice_the_last_one_counts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "a", "--dry-run", "train.steps=5", "--train.steps=7") == 0
    assert "7 steps over" in capsys.readouterr().out


def test_float16_goes_on_exactly_and_stops_when_the_loss_scale_runs_away(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(config, tmp_path / "whole", "train.mixed_precision=fp16") == 0
    middle = str(tmp_path / "whole" / "checkpoints" / "step-000004")
    assert run(config, tmp_path / "a", "train.mixed_precision=fp16", "--resume", middle) == 0
    assert_equal_bits(tmp_path / "whole", tmp_path / "a", 6)
    original = train.Objective.losses

    def with_infinite_gradient(*arguments: object) -> torch.Tensor:
        losses = original(*arguments)
        losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(train.Objective, "losses", with_infinite_gradient)
    assert run(config, tmp_path / "b", "train.mixed_precision=fp16", "train.steps=100", "preview.every=0") == 1
    assert status(tmp_path / "b")["state"] == "diverged"
    assert "the gradient is not finite at step" in status(tmp_path / "b")["error"]
