"""What is written whole or not at all leaves, where it is interrupted, what was there and nothing beside it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from unetgn import UNet
from unetgn.sampling import folder as samples
from unetgn.training import files
from unetgn.training.checkpoint import Checkpoint, checkpoint_path
from unetgn.training.data.encoding import Cache
from unetgn.training.data.latents import Manifest
from unetgn.training.files import delete, delete_unfinished, write_json, write_png, write_text, writing
from unetgn.training.manifest import read_manifest
from unetgn.training.pipeline import save_pipeline
from unetgn.training.preview import draw_loss
from unetgn.training.run_directory import RunDirectory

PICTURE = Image.new("L", (4, 4))
MANIFEST = Manifest(1, 1, (1, 2, 2), 1.0, 0.0, None, False, None, {}, {})


def checkpoint(folder: Path, version: int) -> None:
    """Write a checkpoint of one step, in two versions."""
    facts: dict[str, Any] = {"ema_step": version, "scaler": None, "window_sums": [], "window_steps": 0}
    tensors = {"model": {"w": torch.full((4,), float(version))}}
    made = Checkpoint(checkpoint_path(folder, 1), 1, 1, "images", **facts)
    made.write(tensors, config="", unet_config="{}", scheduler_config="{}")  # type: ignore[arg-type]


def pipeline(folder: Path, version: int) -> None:
    """Write a pipeline of a small network, in two versions."""
    torch.manual_seed(version)
    unet = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4})
    save_pipeline(unet, DDPMScheduler(), folder / "pipeline", cache=None)


def summary(folder: Path, version: int) -> None:
    """Write samples.csv, grid.png and samples.npz of one image."""
    Image.new("L", (4, 4), version).save(folder / "000000.png")
    samples.write_summary(folder, {0: samples.Subject(version)}, npz=True)


def resumed_logs(folder: Path, version: int) -> None:
    """Write the logs of a run up to a step."""
    log = folder / "validation.csv"
    if not log.exists():
        log.write_text("step,loss\n1,0.5\n2,0.4\n")
    RunDirectory(folder).resume_logs(version)


def cached(folder: Path, version: int) -> None:
    """Write a shard of a cache and the manifest that knows it."""
    Cache(folder, None, None)._write_tensors(MANIFEST, "latents-00000.safetensors", {"mean": torch.ones(version)})  # type: ignore[arg-type]


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "text": lambda folder, version: write_text(folder / "deep" / "a.txt", f"version {version}"),
    "JSON": lambda folder, version: write_json(folder / "a.json", {"version": version}),
    "a picture": lambda folder, version: write_png(folder / "a.png", Image.new("L", (4, 4), version)),
    "a checkpoint": checkpoint,
    "the status": lambda folder, version: RunDirectory(folder).write_status("running", version),
    "the logs": resumed_logs,
    "the loss curve": lambda folder, version: draw_loss(([1], [0.5 * version]), ([], []), folder / "loss.png"),
    "the pipeline": pipeline,
    "the manifest of a cache": lambda folder, version: MANIFEST.write(folder),
    "a shard of a cache": cached,
    "a request for samples": lambda folder, version: samples.claim(
        folder, samples.Request("network", "ddpm", version, 1.0, 8), {0: samples.Subject()}
    ),
    "the summary of samples": summary,
}


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below the folder, but the picture that a summary is made of."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "000000.png")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("moment", ["flush_all", "replace"])
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=["full disk", "signal"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_that_is_interrupted_leaves_what_was_there_before_and_nothing_beside(
    writer: str, error: BaseException, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[writer](tmp_path, 1)
    before = contents(tmp_path)

    def interrupt(*_: object) -> NoReturn:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files if moment == "flush_all" else Path, moment, interrupt)
        with pytest.raises(type(error)):
            WRITERS[writer](tmp_path, 2)
    assert not list(tmp_path.rglob(".tmp-*"))
    if moment == "flush_all" or writer not in ("a checkpoint", "the pipeline"):  # an old folder has to go first
        assert contents(tmp_path) == before
    WRITERS[writer](tmp_path, 2)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_what_is_written_is_flushed_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_flush, real_replace = files.flush, Path.replace
    monkeypatch.setattr(files, "flush", lambda path: (events.append(f"flush {path.name[-5:]}"), real_flush(path)))

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with writing(tmp_path / "whole") as unfinished:
        unfinished.mkdir()
        (unfinished / "inner").touch()
    assert events == ["flush inner", "flush whole", "rename", f"flush {tmp_path.name[-5:]}"]


def test_leftovers_of_a_killed_process_go_when_the_next_one_takes_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-a").write_text("half")
    (tmp_path / ".tmp-2-b").mkdir()
    (tmp_path / "kept").touch()
    delete_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / ".tmp-3-c").write_text("half")
    run = RunDirectory(tmp_path)
    run.lock()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "kept"]
    run.unlock()


def test_two_processes_that_write_one_file_do_not_meet_in_its_temporary_name(tmp_path: Path) -> None:
    with writing(tmp_path / "a") as unfinished:
        assert str(os.getpid()) in unfinished.name
        np.save(unfinished.open("wb"), np.zeros(1))


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "nothing"])
def test_a_link_to_elsewhere_is_deleted_and_replaced_and_what_it_leads_to_stays(there: bool, tmp_path: Path) -> None:
    """Checkpoints are put on another disk and linked to."""
    run, elsewhere = tmp_path / "run", tmp_path / "other disk"
    run.mkdir()
    checkpoint(run, 1)
    (run / "step-000001").rename(elsewhere)
    (run / "step-000001").symlink_to(elsewhere if there else tmp_path / "nowhere")
    checkpoint(run, 2)
    assert [path.name for path in run.iterdir()] == ["step-000001"]
    assert Checkpoint.read(run / "step-000001").ema_step == 2
    (run / "link").symlink_to(elsewhere)
    delete(run / "link")
    assert Checkpoint(elsewhere, **read_manifest(elsewhere)).ema_step == 1
