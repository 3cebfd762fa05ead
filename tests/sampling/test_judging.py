"""Evaluation as its users start it: what the figures say of known samples, straight from a run, over processes."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.forked import succeed
from tests.training.launched import ROOT, TWO
from unetgn.sampling.evaluate import main
from unetgn.sampling.extractors import open_extractor
from unetgn.sampling.metrics import measure
from unetgn.training.data.config import split
from unetgn.training.data.images import Digits
from unetgn.training.train import main as train

EVALUATE = ROOT / "sampling" / "evaluate.py"
TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
data: {held_out: 0.1}
train: {steps: 3, batch_size: 8, trackers: []}
checkpoint: {every: 1}
preview: {every: 0}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    (folder / "tiny.yaml").write_text(TINY.replace("every: 1", "every: 1, keep: 9"))
    assert train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def digits(which: str) -> np.ndarray:
    """Return digits of the configuration digits8_ddpm, (N, 8, 8, 1) uint8, in one of the ways that samples can be."""
    images = Digits()
    training, held_out = split(len(images), 0.1)
    pixels = np.stack([((images.image(i)[0, ..., None] + 1) * 127.5).round() for i in range(len(images))])
    random = np.random.default_rng(0)
    chosen = training[3::10][:150]
    return (
        {
            "real": pixels[chosen],
            "copies of the reference": pixels[held_out[:150]],
            "noise": random.integers(0, 256, (150, 8, 8, 1)),
            "one digit": pixels[chosen][[0] * 150] + random.integers(0, 4, (150, 8, 8, 1)),
        }[which]
        .clip(0, 255)
        .astype(np.uint8)
    )


def evaluate(path: Path, *arguments: str) -> dict:
    assert main(["--samples", str(path), *arguments]) == 0
    return json.loads(next(path.parent.glob("*evaluation.json")).read_text())


@pytest.mark.parametrize("which", ["real", "copies of the reference", "noise", "one digit"])
def test_the_figures_tell_good_samples_from_bad(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "set.npz", arr_0=digits(which))
    figures = evaluate(tmp_path / "set.npz")
    said = capsys.readouterr().out
    assert f"{figures['fid']:.4g}" in said
    assert "150 samples: " in said.splitlines()[-2]
    far = figures["fid"] / figures["fid_of_real"]
    assert figures["images_of_real"] == 150
    if which == "real":
        assert 0.4 < far < 2
        assert min(figures["precision"], figures["recall"]) > 0.75
        assert abs(figures["kid"]) < 5 * figures["kid_std"]
    elif which == "copies of the reference":
        assert far < 0.5
        assert figures["precision"] == 1
        assert figures["recall"] > 0.95
    elif which == "noise":
        assert far > 10
        assert max(figures["precision"], figures["recall"]) < 0.1
        assert figures["kid"] > 20 * figures["kid_std"]
    else:
        assert far > 10
        assert figures["recall"] < 0.1


def test_the_figures_are_the_metrics_of_the_features_that_are_named(tmp_path: Path) -> None:
    samples = digits("real")
    np.savez(tmp_path / "set.npz", arr_0=samples)
    figures = evaluate(tmp_path / "set.npz")
    extractor = open_extractor("digits")

    def features(images: np.ndarray) -> np.ndarray:
        return extractor(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    images = Digits()
    _, held_out = split(len(images), 0.1)
    real = np.stack([((images.image(i)[0, ..., None] + 1) * 127.5).round() for i in held_out]).astype(np.uint8)
    expected = measure(features(samples), features(real))
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert figures["extractor"] == {"name": "digits", "sha256": extractor.digest, "features": 224}
    facts = figures["reference"]
    assert (facts["source"], facts["part"], facts["images"]) == ("digits8_ddpm", "held_out", len(held_out))


@pytest.mark.parametrize("part", ["held_out", "training", "all"])
def test_each_part_of_the_images_can_be_the_reference(part: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", arr_0=digits("real"))
    figures = evaluate(tmp_path / "set.npz", "--reference", part)
    counts = {"held_out": (180, 150), "training": (1617, 150), "all": (1797, None)}
    assert (figures["reference"]["images"], figures.get("images_of_real")) == counts[part]


def test_real_images_are_a_set_too_and_colour_is_judged_by_the_users_network(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    real = tmp_path / "real"
    real.mkdir()
    for number, image in enumerate(random.integers(0, 256, (12, 10, 10, 3), dtype=np.uint8)):
        Image.fromarray(image).save(real / f"{number}.png")
    np.savez(tmp_path / "set.npz", arr_0=random.integers(0, 99, (9, 10, 10, 3), dtype=np.uint8))
    figures = evaluate(tmp_path / "set.npz", "--real", str(real), "--extractor", "tests.sampling.test_extractors:Half")
    assert figures["reference"]["source"] == str(real)
    assert figures["fid"] > 1
    assert figures["extractor"]["features"] == 6
    assert not {"novelty", "fid_of_real"} & figures.keys()


def test_without_an_extractor_the_pixels_are_judged_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez(tmp_path / "set.npz", arr_0=digits("real"))
    figures = evaluate(tmp_path / "set.npz", "--real", str(tmp_path / "set.npz"))
    assert figures["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert "fid" not in figures
    assert 'left out: the extractor inception is in the package torch-fidelity: pip install -e ".[train,fid]"' in (
        capsys.readouterr().err
    )
    assert main(["--samples", str(tmp_path / "set.npz"), "--extractor", "inception"]) == 2
    assert "error: --extractor: the extractor inception is in the package" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--samples x --seeds 0-9", "--seeds is for --checkpoint"),
        ("--samples x --steps 0", "--steps is for --checkpoint"),
        ("--samples x --weights raw", "--weights is for --checkpoint"),
        ("--samples x --all-checkpoints", "--all-checkpoints is for --checkpoint"),
        ("--checkpoint x --metric kid", "--metric is for --all-checkpoints and --widths"),
        ("--samples x --widths 0.1", "--widths is for --checkpoint"),
        ("--checkpoint x --widths 0.1 --weights raw", "--weights raw is for a checkpoint's own weights"),
        ("--checkpoint x --widths 0.1 0.1", "--widths 0.1 0.1 has one twice"),
        ("--samples x --real y --reference all", "--reference is for --config"),
        ("--samples x --real y --config z", "not allowed with"),
        ("--samples x --checkpoint y", "not allowed with"),
        ("--config x", "one of the arguments --samples --checkpoint is required"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--extractor", "nothing"], "--extractor: there is no extractor 'nothing'"),
        (["--extractor", "mnist5k"], "the extractor mnist5k fails on images"),
        (["--config", "missing"], "missing"),
    ],
)
def test_what_cannot_be_judged_is_said(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "set.npz", arr_0=digits("real"))
    assert main(["--samples", str(tmp_path / "set.npz"), *arguments]) == 2
    assert words in capsys.readouterr().err
    np.savez(tmp_path / "few.npz", arr_0=digits("real")[:3])
    assert main(["--samples", str(tmp_path / "few.npz")]) == 2
    assert "there are 3 samples; 4 or more are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--extractor mnist5k", "the extractor mnist5k fails on images"),
        ("--seeds 0-2", "there are 3 samples; 4 or more are needed"),
        ("--reference held_out --config {}", "images in its part held_out: give another --reference"),
        ("--guidance-scale 2", "guidance needs a network that was trained with classes"),
        ("--prompts cat", "this network reads no text"),
    ],
)
def test_what_could_not_be_judged_is_not_drawn(
    arguments: str, words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.yaml").write_text(TINY.replace("held_out: 0.1", "held_out: 0.001"))
    line = ["--checkpoint", str(run), "--seeds", "0-9", *arguments.replace("{}", str(tmp_path / "few.yaml")).split()]
    before = set(run.rglob("*"))
    assert main(line) == 2
    assert words in capsys.readouterr().err
    assert set(run.rglob("*")) == before


def test_a_checkpoint_is_judged_by_what_it_draws_and_all_of_them_make_a_curve(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = ["--seeds", "0-9", "--steps", "2", "--scheduler", "ddim"]
    assert main(["--checkpoint", str(run), *drawing]) == 0
    folder = run / "evaluation" / "step-000003" / "ddim-2-steps"
    alone = json.loads((folder / "evaluation.json").read_text())
    assert (alone["samples"], alone["step"]) == (10, 3)
    assert len(list(folder.rglob("0*.png"))) == 10
    shutil.copytree(run / "checkpoints" / "step-000002", run / "checkpoints" / "step-000009")  # one that is damaged
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("0*.png")}
    capsys.readouterr()
    assert main(["--checkpoint", str(run), "--all-checkpoints", "--metric", "precision", *drawing]) == 0
    said = capsys.readouterr()
    assert "passing over a checkpoint" in said.err
    assert "step 1: 10 samples: " in said.out
    found = json.loads((run / "evaluation" / "ddim-2-steps.json").read_text())
    assert found["metric"] == "precision"
    assert [row["step"] for row in found["checkpoints"]] == [1, 2, 3]
    assert found["checkpoints"][-1] == alone
    assert Image.open(run / "evaluation" / "ddim-2-steps-precision.png").width > 100
    assert {path: path.stat().st_mtime_ns for path in made} == made  # what was drawn stays
    assert main(["--checkpoint", str(run), "--all-checkpoints", "--metric", "novelty", "--real",
                 str(folder), "--extractor", "digits", *drawing]) == 2  # fmt: skip
    assert "--metric novelty needs a --config with real images that are held out" in capsys.readouterr().err


def test_averages_of_widths_are_judged_and_their_curve_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = tmp_path / "run"
    line = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(run), "preview.every=0", "train.steps=4"]
    assert train([*line, "checkpoint.every=2", "ema.power_widths=[0.05,0.1]"]) == 0
    ask = ["--checkpoint", str(run), "--seeds", "0-9", "--scheduler", "ddim", "--steps", "2"]
    assert main([*ask, "--widths", "0.2", "0.06", "--all-checkpoints", "--metric", "precision"]) == 0
    assert "step 2, width 0.2: 10 samples: " in capsys.readouterr().out
    found = json.loads((run / "evaluation" / "ddim-2-steps-widths.json").read_text())
    rows = [(row["step"], row["width"]) for row in found["checkpoints"]]
    assert rows == [(2, 0.2), (2, 0.06), (4, 0.2), (4, 0.06)]
    assert Image.open(run / "evaluation" / "ddim-2-steps-widths-precision.png").width > 100
    drawn = [run / "averages" / f"width-{width}" / "evaluation" / "step-000004" for width in (0.2, 0.06)]
    requests = [json.loads((folder / "ddim-2-steps" / "request.json").read_text()) for folder in drawn]
    assert requests[0]["network"] != requests[1]["network"]
    assert main([*ask, "--widths", "0.1"]) == 0  # of the newest alone; what others were found to be worth stays
    again = json.loads((run / "evaluation" / "ddim-2-steps-widths.json").read_text())["checkpoints"]
    assert [(row["step"], row["width"]) for row in again] == [(2, 0.06), (2, 0.2), (4, 0.1), (4, 0.06), (4, 0.2)]
    assert all(row in again for row in found["checkpoints"])
    capsys.readouterr()
    assert main([*ask, "--widths", "0.2", "--reference", "all"]) == 0  # figures that cannot be compared stay apart
    other = json.loads((run / "evaluation" / "ddim-2-steps-widths.json").read_text())["checkpoints"]
    assert [(row["step"], row["width"]) for row in other] == [(4, 0.2)]
    assert capsys.readouterr().err.count("is left out, for it was judged by other reference") == 4
    assert main([*ask, "--widths", "0.7"]) == 2
    assert "--widths: an average of width 0.7 is none" in capsys.readouterr().err
    shutil.rmtree(run / "averages")
    assert main([*ask, "--widths", "0.2"]) == 2
    assert "holds no snapshots of averages" in capsys.readouterr().err


@pytest.mark.thorough
def test_two_processes_say_what_one_does(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", arr_0=digits("real")[:31])
    line = ["--samples", str(tmp_path / "set.npz")]
    one = evaluate(tmp_path / "set.npz")
    done = succeed(*line, "--cache", str(tmp_path / "other"), "--out", str(tmp_path / "two.json"), script=EVALUATE,
                   launcher=TWO, processes=2)  # fmt: skip
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.pop("extractor") == one.pop("extractor")
    assert two.pop("reference") == one.pop("reference")
    assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert done.stdout.count("written to") == 1
