"""The trainer as its users start it: runs, resumes, refuses, and trains on a folder of images."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.utils.data import default_collate

from tests.training.forked import finish, start
from tests.training.launched import SIX_STEPS, TRAIN
from tests.training.runs import assert_equal_bits, assert_same_tensors, everything, losses, rows, status, wait_until
from unetgn import UNet
from unetgn.training import checkpoint, train
from unetgn.training.config_files import load_config
from unetgn.training.data.config import split
from unetgn.training.data.images import Digits
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.objective import ObjectiveConfig
from unetgn.training.train import main


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(SIX_STEPS)
    return file


def run(config: Path, output: Path, *arguments: str) -> int:
    return main(["--config", str(config), "--output", str(output), *arguments])


def test_a_run_leaves_everything_that_it_promises(config: Path, tmp_path: Path, loss_curves: None) -> None:
    output = tmp_path / "run"
    assert run(config, output, "train.trackers=[tensorboard]") == 0
    assert status(output)["state"] == "completed"
    assert [row[0] for row in losses(output)] == ["1", "2", "3", "4", "5", "6"]
    promised = """config.yaml loss.png samples/step-000003.png samples/step-000006.png denoise/step-000006.png
        checkpoints/step-000002/ema.safetensors checkpoints/step-000006/model.safetensors pipeline/model_index.json
        pipeline/unet/diffusion_pytorch_model.safetensors"""
    for name in promised.split():
        assert (output / name).is_file(), name
    assert list((output / "tb").rglob("events.*"))
    assert not list(output.rglob("*.bin")) + list(output.rglob("*.pt")) + list(output.rglob("*.pkl"))


def test_the_final_pipeline_loads_in_diffusers_with_the_averaged_weights(finished: Path) -> None:
    from diffusers import DiffusionPipeline, UNet2DModel

    folder = finished / "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert type(pipeline.unet) is UNet2DModel
    averaged = load_file(finished / "checkpoints" / "step-000006" / "ema.safetensors")
    assert_same_tensors(pipeline.unet.state_dict(), averaged)
    images = pipeline(seeds=[0, 1], class_labels=3, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    config: Path, finished: Path, tmp_path: Path
) -> None:
    for name, keys in (("b", []), ("c", ["seed=1"])):
        assert run(config, tmp_path / name, "preview.every=0", *keys) == 0
    assert_equal_bits(finished, tmp_path / "b", 6)
    one, other = everything(finished, 6), everything(tmp_path / "c", 6)
    assert not torch.equal(one["model.conv_in.weight"], other["model.conv_in.weight"])


@pytest.mark.parametrize(
    "keys",
    [
        ["train.log_every=3", "train.mixed_precision=bf16"],
        ["train.channels_last=true", "train.gradient_accumulation=2", "data.num_workers=2"],
    ],
)
def test_a_run_stopped_by_a_signal_and_resumed_is_the_unbroken_run(
    config: Path, tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*keys, "checkpoint.every=100"]
    assert run(config, tmp_path / "whole", *keys) == 0
    real_step = train.TrainState.run_step

    def interrupt(state: train.TrainState, batches: object) -> object:
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real_step(state, batches)

    monkeypatch.setattr(train.TrainState, "run_step", interrupt)
    broken = tmp_path / "broken"
    assert run(config, broken, *keys) == 1
    assert status(broken) | {"state": "preempted", "step": 4} == status(broken)
    assert not multiprocessing.active_children()  # of the loader
    monkeypatch.undo()
    assert run(config, broken, "--resume", "auto", *keys) == 0
    assert_equal_bits(tmp_path / "whole", broken, 6)
    assert losses(broken) == losses(tmp_path / "whole")


def test_a_signal_while_the_loader_is_slow_saves_at_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_item = IndexedSamples.__getitem__

    def stuck(stream: IndexedSamples, counter: int) -> object:
        if counter >= 3 * 8:  # the fourth step's first sample never comes
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
            time.sleep(60)
        return real_item(stream, counter)

    monkeypatch.setattr(IndexedSamples, "__getitem__", stuck)
    began = time.monotonic()
    assert run(config, tmp_path / "a") == 1
    assert time.monotonic() - began < 30
    assert status(tmp_path / "a") | {"state": "preempted", "step": 3} == status(tmp_path / "a")
    assert (tmp_path / "a" / "checkpoints" / "step-000003").is_dir()


def test_a_signal_while_sampling_saves_at_once(
    config: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_forward = UNet.forward

    def signalled(unet: UNet, *arguments: object, **more: object) -> object:
        if not unet.training:
            signal.raise_signal(signal.SIGTERM)
        return real_forward(unet, *arguments, **more)

    monkeypatch.setattr(UNet, "forward", signalled)
    assert run(config, tmp_path / "a", "preview.steps=1000") == 1
    assert status(tmp_path / "a") | {"state": "preempted", "step": 3} == status(tmp_path / "a")
    monkeypatch.undo()
    assert run(config, tmp_path / "a", "--resume", "auto") == 0
    assert_equal_bits(finished, tmp_path / "a", 6)


def test_what_a_signal_cut_short_is_made_up_for(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the very last preview: the run is not completed until it has been drawn."""
    real_forward = UNet.forward

    def signalled(unet: UNet, *arguments: object, **more: object) -> object:
        if not unet.training:
            signal.raise_signal(signal.SIGTERM)
        return real_forward(unet, *arguments, **more)

    monkeypatch.setattr(UNet, "forward", signalled)
    keys = ["preview.every=6", "train.validate_every=6", "data.held_out=0.01"]
    assert run(config, tmp_path / "a", *keys) == 1
    assert status(tmp_path / "a")["state"] == "preempted"
    monkeypatch.undo()
    assert run(config, tmp_path / "a", "--resume", "auto", *keys) == 0
    assert (tmp_path / "a" / "samples" / "step-000006.png").is_file()
    assert len((tmp_path / "a" / "validation.csv").read_text().splitlines()) == 2
    assert status(tmp_path / "a")["state"] == "completed"


def test_going_on_from_an_older_checkpoint_leaves_one_history(config: Path, finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "a")
    older = output / "checkpoints" / "step-000002"
    assert run(config, output, "--resume", str(older), "checkpoint.every=4") == 0
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-000002", "step-000004", "step-000006"]  # fmt: skip
    assert [row[0] for row in losses(output)] == ["1", "2", "3", "4", "5", "6"]
    assert_equal_bits(finished, output, 6)


def test_other_images_and_too_few_steps_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "a", "--overfit", "16") == 0
    assert run(config, tmp_path / "a", "--resume", "auto", "train.steps=9") == 2
    assert "was made with other images than are here now (1797 images;" in capsys.readouterr().err
    assert run(config, tmp_path / "a", "--resume", "auto", "--overfit", "16", "train.steps=3") == 2
    assert "is at step 6, beyond train.steps, which is 3" in capsys.readouterr().err
    assert run(config, tmp_path / "b", "--overfit", "9999") == 2
    assert "--overfit 9999: there are only 1797 images" in capsys.readouterr().err


def test_a_signal_to_the_whole_process_group_saves(config: Path, tmp_path: Path) -> None:
    """As schedulers of clusters send it: to the trainer and to the workers of its loader."""
    output = tmp_path / "a"
    keys = ["train.steps=100000", "preview.every=0", "data.num_workers=2", "checkpoint.every=5"]
    with start("--config", str(config), "--output", str(output), *keys, new_session=True) as process:
        wait_until(lambda: bool(list(output.glob("checkpoints/step-*"))))
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60).code == 1
    assert status(output)["state"] == "preempted"


def test_resuming_from_a_path_branches_off_into_a_new_folder(config: Path, finished: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "b", "--resume", str(finished / "checkpoints" / "step-000002")) == 0
    assert_equal_bits(finished, tmp_path / "b", 6)


def test_a_second_run_into_the_same_folder_is_refused_and_a_finished_one_stays(
    config: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "a")
    assert run(config, tmp_path / "a") == 2
    assert "already holds a run: go on with --resume auto, or give another --output" in capsys.readouterr().err
    assert run(config, tmp_path / "a", "--resume", "auto") == 0
    assert_equal_bits(finished, tmp_path / "a", 6)


def test_auto_begins_where_nothing_was_and_refuses_where_all_is_damaged(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "a", "--resume", "auto") == 0
    for file in (tmp_path / "a" / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(b"")
    assert run(config, tmp_path / "a", "--resume", "auto") == 2
    assert "all 3 checkpoints" in capsys.readouterr().err


def test_a_path_that_is_not_there_is_an_error(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, tmp_path / "a", "--resume", str(tmp_path / "nowhere")) == 2
    assert "nowhere is not there" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_resuming_with_a_key_that_decides_the_weights_changed_is_refused(
    config: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "a")
    assert run(config, tmp_path / "a", "--resume", "auto", "train.learning_rate=5e-4", "preview.count=2") == 2
    message = capsys.readouterr().err
    assert "train.learning_rate was 0.001 and is 0.0005" in message
    assert "preview" not in message
    assert run(config, tmp_path / "a", "--resume", "auto", "train.steps=8") == 0
    assert "train.steps was 6 and is 8" in caplog.text
    assert status(tmp_path / "a")["step"] == 8


@pytest.mark.parametrize("bad", [1, 2, 3, 6])  # steps 2, 4 and 6 make a checkpoint
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    bad: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_losses = train.Objective.losses
    calls = []

    def poisoned(self: train.Objective, model: torch.nn.Module, batch: object) -> torch.Tensor:
        calls.append(1)
        return real_losses(self, model, batch) * (float("nan") if len(calls) == bad else 1)

    monkeypatch.setattr(train.Objective, "losses", poisoned)
    assert run(config, tmp_path / "a", "preview.every=0") == 1
    assert f"not finite at step {bad}, rank 0" in capsys.readouterr().err
    assert status(tmp_path / "a")["state"] == "diverged"
    last = (bad - 1) // 2 * 2
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").glob("*")) == [
        f"step-{step:06d}" for step in range(2, last + 1, 2)
    ]
    assert all(tensor.isfinite().all() for tensor in (everything(tmp_path / "a", last) if last else {}).values())


def test_the_held_out_loss_is_that_of_the_averaged_weights_on_the_held_out_images(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "a", "data.held_out=0.02", "train.validate_every=3") == 0
    validated = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path / "a", "validation.csv")]
    assert [step for step, _ in validated] == [3, 6]
    unet = UNet.from_unet_config(load_config(config).model)
    unet.load_state_dict(load_file(tmp_path / "a" / "checkpoints" / "step-000006" / "ema.safetensors"))
    images = Digits()
    held_out = IndexedSamples(images, split(len(images), 0.02)[1], seed=0)
    assert len(held_out.indices) == 36
    objective = train.Objective(ObjectiveConfig(label_dropout=0.2), 10)
    with torch.no_grad():
        losses = objective.losses(unet.eval(), objective.prepare(default_collate([held_out[i] for i in range(36)])))
    assert validated[1][1] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_a_full_disk_is_said_and_spares_the_checkpoint_before(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_save = checkpoint.save_file
    saved: list[str] = []

    def full(contents: dict, path: Path) -> None:
        saved.append(path.name)
        if len(saved) > 5:  # in the second checkpoint, its last file
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(contents, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run(config, tmp_path / "a") == 1
    assert (
        "No space left on device; what was saved before is as it was, and step 4 could not be saved"
        in capsys.readouterr().err
    )
    assert status(tmp_path / "a")["state"] == "failed"
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert run(config, tmp_path / "a", "--resume", "auto") == 0


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "a", "--dry-run", "--resume", str(tmp_path / "nowhere")) == 2
    assert run(config, tmp_path / "a", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "8 images a step" in said
    assert "over 1797 images" in said
    assert "parameters" in said
    assert not (tmp_path / "a").exists()


def test_overfit_trains_on_the_first_images_alone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "a", "--dry-run", "--overfit", "16") == 0
    assert "over 16 images" in capsys.readouterr().out


def write_digits(folder: Path, count: int) -> None:
    data = load_digits()
    for i in range(count):
        file = folder / f"digit {data.target[i]}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15.9).astype("uint8")).resize((16, 16)).save(file)


def test_a_folder_of_images_trains(config: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "images", 60)
    folder = ["data.name=folder", f"data.path={tmp_path / 'images'}"]
    keys = [*folder, "model.sample_size=12", "data.image_size=12", "model.in_channels=3", "model.out_channels=3"]
    assert run(config, tmp_path / "a", *keys) == 0
    assert status(tmp_path / "a")["state"] == "completed"
    with Image.open(tmp_path / "a" / "samples" / "step-000006.png") as picture:
        assert picture.mode == "RGB"


def test_classes_that_contradict_the_images_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "a", "model.num_classes=7") == 2
    said = capsys.readouterr().err
    assert "model.num_classes is 7, but the images have 10 classes (0, 1, 2" in said
    assert "set model.num_classes=10" in said
    write_digits(tmp_path / "images", 3)
    assert run(config, tmp_path / "a", "data.name=folder", f"data.path={tmp_path / 'images'}") == 2
    assert "but the images have 3 classes" in capsys.readouterr().err
    assert run(config, tmp_path / "a", "data.name=folder", f"data.path={tmp_path}/nowhere") == 2
    assert "nowhere' is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_network_trains(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "a", "train.compile=true", "train.steps=3") == 0
    assert status(tmp_path / "a")["state"] == "completed"


@pytest.mark.parametrize("extra", [["train.mixed_precision=fp16"], ["objective.prediction_type=v_prediction",
    "objective.schedule=zero_terminal_snr", "objective.weighting=min_snr"]])  # fmt: skip
def test_switches_train(config: Path, tmp_path: Path, extra: list[str]) -> None:
    assert run(config, tmp_path / "a", *extra) == 0
    assert status(tmp_path / "a")["state"] == "completed"


def test_the_script_runs_from_any_folder_and_survives_being_killed(config: Path, tmp_path: Path) -> None:
    keys = ["train.steps=400", "preview.every=0", "checkpoint.every=5"]
    line = ["--config", str(config), "--output", "here", "--resume", "auto", *keys]
    process = subprocess.Popen([sys.executable, str(TRAIN), *line], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "here" / "checkpoints" / "step-000005").exists)
    second = finish(*line, cwd=tmp_path)
    assert second.code == 2
    assert "is in use by another run" in second.stderr
    process.kill()
    process.wait()
    assert status(tmp_path / "here")["state"] == "running"
    last = int(sorted((tmp_path / "here" / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
    assert run(config, tmp_path / "here", "--resume", "auto", "preview.every=0", f"train.steps={last + 3}") == 0
    assert status(tmp_path / "here") | {"state": "completed", "step": last + 3} == status(tmp_path / "here")
