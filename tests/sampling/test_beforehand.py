"""For every option of sample.py and evaluate.py: what contradicts it is said before anything is drawn or written."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unetgn.pipelines import UNetPipeline
from unetgn.sampling import evaluate, judge_options, options, sample
from unetgn.training.run_directory import OWN
from unetgn.training.train import main as train

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
data: {held_out: 0.1}
objective: {label_dropout: 0.2}
train: {steps: 2, batch_size: 4, trackers: []}
checkpoint: {every: 1}
preview: {every: 0}
"""
NO_USE = "leave it out"

# By option: more of the line ({} is a folder), and a part of what is said. The first is in CI, the others `-m slow`.
SAMPLE: dict[str, list[tuple[str, str]]] = {
    "--checkpoint": [("--checkpoint {}/nowhere", "nowhere is not there")],
    "--weights": [("--weights best", "invalid choice")],
    "--batch-size": [("--batch-size 0", "at least 1 is needed")],
    "--autoencoder": [("--autoencoder {}", NO_USE)],
    "--text-encoder": [("--text-encoder {}", NO_USE)],
    "--seeds": [("--seeds 3-1", "is not a list"), ("--seeds 0-99999999999", "of more than 10000000 numbers")],
    "--out": [("--out {}/grey.png", "is a file"), ("--out {}/grey.png/deeper", "is a file")],
    "--class-labels": [("--class-labels 10", "the classes 0 to 9"), ("--class-labels 1 1", "a class twice")],
    "--prompts": [("--prompts cat", NO_USE)],
    "--negative-prompt": [("--negative-prompt cat", "--guidance-scale is 1"),
                          ("--negative-prompt cat --guidance-scale 2", NO_USE)],
    "--guidance-scale": [("--guidance-scale nan", "not a finite number"), ("--guidance-scale x", "is not a number")],
    "--guidance-interval": [("--guidance-scale 2 --guidance-interval 1e8 1e9", "none of them in it: give another --g"),
                            ("--guidance-scale 2 --guidance-interval 4 1", "--guidance-interval is (4.0, 1.0)"),
                            ("--guidance-interval 0.3 4", "--guidance-scale is 1")],
    "--guidance-rescale": [("--guidance-rescale 0.5", "--guidance-scale is 1"),
                           ("--guidance-scale 2 --guidance-rescale 2", "--guidance-rescale is 2.0")],
    "--scheduler": [("--scheduler dpm", "is unknown"), ("--scheduler edm_euler", "does not fit"),
                    ("--scheduler LCMScheduler", "distilled")],
    "--steps": [("--steps 0", "steps is 0"), ("--scheduler ddim --steps 600", "divides 1000 nearly"),
                ("--steps 1001", "steps is 1001")],
    "--image-size": [("--image-size 8 16 --image {}/grey.png", "the same proportions, or give --image-size"),
                     ("--image-size 0", "at least 1"), ("--image-size 8 8 8", "it takes the height and the width"),
                     ("--image-size 70000", "--image-size is 70000; it must be from 1 to 65536")],
    "--image": [("--image {}/nowhere.png", "cannot be read"), ("--image {}/text.png", "cannot be read"),
                ("--image {}/wide.png", "--image is 16×8 pixels")],
    "--strength": [("--strength 0.5", "it is for --image FILE"), ("--image {}/grey.png --strength nan", "not a share")],
    "--mask": [("--image {}/grey.png --mask {}/grey.png", "--mask is black all over"),
               ("--image {}/grey.png --mask {}/wide.png", "--mask is 16×8 pixels"),
               ("--mask {}/grey.png", "it is for --image FILE")],
    "--precision": [("--precision fp8", "invalid choice")],
    "--interpolate": [("--interpolate 4", "give --scheduler ddim"),
                      ("--interpolate 1", "2 frames or more"), ("--interpolate 9999", "1000 at most"),
                      ("--interpolate 4 --image {}/grey.png", "begins with neither"),
                      ("--interpolate 4 --seeds 0", "two images or more"),
                      ("--interpolate 4 --scheduler sa_solver --steps 9", "sa_solver draws more noise")],
    "--animation": [("--animation gif", "without --strip"), ("--animation webp", "without --strip")],
}  # fmt: skip
EVALUATE: dict[str, list[tuple[str, str]]] = {
    "--samples": [("--samples {}/nowhere", "not allowed with"), ("@ --samples {}/nowhere", ": there is no such folder"),
                  ("@ --samples {}/colours", "0.png has the shape (C, H, W) (3, 8, 8)")],
    "--checkpoint": [("--checkpoint {}/nowhere", "nowhere is not there")],
    "--config": [("--config nowhere", "no such file"), ("--config cifar10_ddpm", "is not a folder")],
    "--real": [("--real {}/colours", "draws has the shape (C, H, W) (1, 8, 8), the real images have (3, 8, 8)"),
               ("--real {}/several --extractor digits", "1.png has the shape (C, H, W) (1, 9, 9)"),
               ("--real {}/several", "1.png has the shape (C, H, W) (1, 9, 9)"),
               ("--real {}/nowhere", ": there is no such folder"), ("--config x --real y", "not allowed with")],
    "--reference": [("--real {}/greys --reference all", "--reference is for --config"),
                    ("--config {}/all.yaml --reference held_out", "in its part held_out")],
    "--extractor": [("--extractor nowhere", "there is no extractor"), ("--extractor mnist5k", "fails on images")],
    "--out": [("--out {}", "is a folder"), ("--out {}/grey.png/x.json", "is a file"),
              ("@ --samples {}/greys --real {}/greys --out {}", "is a folder")],
    "--all-checkpoints": [("@ --samples {}/greys --all-checkpoints", "is for --checkpoint")],
    "--widths": [("--widths 0.1", "no snapshots of averages"), ("--widths 0.1 0.1", "one twice")],
    "--metric": [
        ("--all-checkpoints --metric fid --real {}/greys", "--metric fid needs an --extractor; without, there are fr"),
        ("--all-checkpoints --metric novelty --real {}/greys", "--metric novelty needs a --config with"),
        ("--all-checkpoints --metric label_agreement --real {}/greys", "--metric label_agreement needs samples of"),
        ("--metric kid", "--metric is for"), ("--all-checkpoints --metric psnr", "invalid choice"),
    ],
    **{name: SAMPLE[name] for name in ("--batch-size", "--weights", "--autoencoder", "--text-encoder", "--seeds",
                                       "--prompts", "--scheduler", "--steps", "--guidance-scale")},
}  # fmt: skip
EVALUATE["--seeds"] = [*EVALUATE["--seeds"], ("--seeds 0-2", "there are 3 samples; 4 or more are needed")]
NOTHING = {"--help", "--strip", "--webdataset", "--npz", "--cache"}  # contradicts these


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Have pictures of all kinds, and a run."""
    folder = tmp_path_factory.mktemp("beforehand")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "all.yaml").write_text(TINY.replace("held_out: 0.1", "held_out: 0.0"))
    assert train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    for name, shapes in (("greys", [(8, 8)] * 8), ("colours", [(8, 8, 3)] * 8), ("several", [(8, 8), (9, 9)] * 4)):
        (folder / name).mkdir()
        for number, shape in enumerate(shapes):
            pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    Image.new("L", (8, 8)).save(folder / "grey.png")
    Image.new("L", (16, 8)).save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    return folder


def contents(folder: Path) -> dict[str, int | None]:
    return {str(path): path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


def refused(main: Callable[[list[str]], int], line: str, folder: Path) -> None:
    """Check that a line ends with exit code 2, and changes nothing."""
    before = contents(folder)
    try:
        code: object = main(line.replace("{}", str(folder)).split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert contents(folder) == before


def cases(lines: dict[str, list[tuple[str, str]]]) -> list[Any]:
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if number else [])
        for each in lines.values()
        for number, case in enumerate(each)
    ]


@pytest.mark.parametrize(("line", "words"), cases(SAMPLE))
def test_what_cannot_be_drawn_is_said_before_the_first_step(
    line: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    refused(sample.main, f"--checkpoint {{}}/run --seeds 0-3 --steps 2 --out {{}}/out {line}", folder)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("line", "words"), cases(EVALUATE))
def test_what_cannot_be_judged_is_said_before_the_first_step(
    line: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    drawn = "--checkpoint {}/run --seeds 0-3 --steps 2 "
    refused(evaluate.main, line[2:] if line.startswith("@") else drawn + line, folder)
    said = capsys.readouterr().err
    assert words in said
    assert "sample.py" not in said.replace("sampling/sample.py", "")


@pytest.mark.parametrize(
    ("parser", "lines"),
    [(options.make_parser(), SAMPLE), (judge_options.make_parser(), EVALUATE)],
    ids=["sample", "evaluate"],
)
def test_every_option_is_among_these(parser: argparse.ArgumentParser, lines: dict[str, object]) -> None:
    there = {action.option_strings[-1] for action in parser._actions}
    assert set(lines) == there - NOTHING


def test_parts_of_another_place_have_a_folder_of_their_own(tmp_path: Path) -> None:
    from unetgn.sampling.drawn import Drawing

    names = {Drawing(autoencoder=part, text_encoder=other).name()
             for part in (None, tmp_path / "a", tmp_path / "b") for other in (None, tmp_path / "c")}  # fmt: skip
    assert len(names) == 6


@pytest.mark.parametrize("kind", ["torch's", "another"])
def test_too_little_memory_is_said_in_one_line_and_no_other_fault_is(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a CPU's memory torch has no error of its own."""
    line = f"--checkpoint {folder}/run --seeds 0 --steps 2 --out {tmp_path}/out".split()
    size = (2**50,) if kind == "torch's" else (-1,)
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: torch.empty(size))
    if kind == "another":
        with pytest.raises(RuntimeError, match="negative dimension"):
            sample.main(line)
        return
    assert sample.main(line) == 1
    assert "the memory does not hold so many images at a time: give a smaller --batch-size" in capsys.readouterr().err


DRAWN = "--checkpoint {}/run --seeds 0-3 --steps 2"
ALL = f"{DRAWN} --out {{}}/out --npz --webdataset --strip --interpolate 3 --animation webp --scheduler ddim"
PLACES = [*sample.names_of_files(options.parse_arguments(ALL.split())), "shards", "000001.png"]
JUDGED = f"{DRAWN} --real {{}}/greys --all-checkpoints --out {{}}/judged.json"


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-000001", "samples", "denoise/mine", "pipeline"])
def test_what_a_run_writes_is_not_drawn_into(place: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in (folder / "run").iterdir() if path.is_dir()} - {"evaluation"} <= {*OWN}
    refused(sample.main, f"--checkpoint {{}}/run --seeds 0-3 --steps 2 --out {{}}/run/{place}", folder)
    said = capsys.readouterr().err
    assert f"{folder / 'run' / place} is what a run writes; give a folder beside it, such as --out" in said


@pytest.mark.parametrize("name", PLACES)
def test_what_lies_where_a_file_is_to_be_written_is_named_before_the_first_step_and_stays(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(PLACES) == 11
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    place = folder / "out" / name
    if name == "shards":
        place.parent.mkdir()
        place.write_text("mine")
    else:
        (place / "mine").mkdir(parents=True)
    refused(sample.main, ALL, folder)
    said = capsys.readouterr().err
    assert str(place) in said
    assert "move it, or give another --out" in said
    shutil.rmtree(folder / "out")


@pytest.mark.parametrize("name", ["judged.json", "judged-frechet_distance.png", "run/evaluation/step-000002/{}"])
def test_what_lies_where_figures_are_to_be_written_is_named_before_the_first_step(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    place = folder / name.format("2-steps/evaluation.json")
    (place / "mine").mkdir(parents=True)
    refused(evaluate.main, JUDGED, folder)
    assert str(place) in capsys.readouterr().err
    shutil.rmtree(place)
