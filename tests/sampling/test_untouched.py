"""What sampling refuses it refuses before it makes, takes or changes the folder for the images."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from unetgn import UNet
from unetgn.pipelines import UNetPipeline
from unetgn.sampling.sample import main
from unetgn.training.train import main as train

MODEL = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        norm: {num_groups: 4}}
data: {held_out: 0.1}
train: {steps: 1, batch_size: 4, trackers: []}
preview: {every: 0}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train for a moment: with classes, and by EDM's objective from weights that know none."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(MODEL)
    UNet(**yaml.safe_load(MODEL)["model"]).save_pretrained(folder / "weights")
    keys = {
        "classes": ["model.num_classes=10"],
        "edm": ["objective.edm.sigma_data=0.5", f"train.initial_weights={folder / 'weights'}"],
    }
    for name, more in keys.items():
        assert train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / name), *more]) == 0
    wide = Image.fromarray(np.zeros((8, 16), np.uint8))
    wide.save(folder / "wide.png")
    Image.new("L", (8, 8)).save(folder / "grey.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(folder / "palette.png")
    (folder / "text.png").write_text("no picture")
    return {name: folder / name for name in keys}


LINES = [
    ("edm", "--guidance-scale 2"),
    ("classes", "--guidance-scale 2"),
    ("edm", "--guidance-scale 0"),
    ("classes", "--class-labels 10"),
    ("classes", "--class-labels 3,3"),
    ("edm", "--class-labels 3"),
    ("classes", "--prompts cat"),
    ("classes", "--autoencoder {}"),
    ("classes", "--steps 0"),
    ("edm", "--steps 1"),
    ("edm", "--scheduler ddim"),
    ("classes", "--scheduler edm_euler"),
    ("classes", "--scheduler ddim --steps 600"),
    ("classes", "--image {}/missing.png"),
    ("classes", "--image {}/text.png"),
    ("classes", "--image {}/wide.png"),
    ("classes", "--image {}/grey.png --mask {}/wide.png"),
    ("classes", "--image {}/grey.png --mask {}/palette.png"),
    ("classes", "--checkpoint {}/missing"),
]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("run", "line"), LINES)
def test_what_cannot_be_drawn_leaves_the_folder_as_it_was(
    run: str, line: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    (tmp_path / "used").mkdir()
    for name in (".tmp-1-000000.png", "request.json", "notes.txt"):  # as an earlier request left it
        (tmp_path / "used" / name).write_text("{}")
    before = contents(tmp_path)
    out = tmp_path / ("used", "new/deeper")[LINES.index((run, line)) % 2]
    arguments = ["--checkpoint", str(runs[run]), "--seeds", "0-1", "--out", str(out)]
    assert main([*arguments, *line.replace("{}", str(runs[run].parent)).split()]) == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["other settings", "other class", "no request", "damaged request", "a full disk"])
def test_images_that_are_there_stay_as_they_were(
    what: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--checkpoint", str(runs["classes"]), "--out", str(tmp_path), "--seeds", "0-1", "--steps", "1"]
    assert main(line) == 0
    request = json.loads((tmp_path / "request.json").read_text())
    (tmp_path / ".lock").unlink()
    (tmp_path / ".tmp-1-000002.png").write_text("half")
    more = {"other settings": ["--scheduler", "euler"], "other class": ["--class-labels", "7"]}.get(what, [])
    if what == "no request":
        (tmp_path / "request.json").unlink()
    if what == "damaged request":
        (tmp_path / "request.json").write_text(json.dumps(request)[:-9])
    if what == "a full disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))
        more = ["--webdataset"]
    before = contents(tmp_path)
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    assert main([*line, *more]) == 2
    assert contents(tmp_path) == before
