"""The sampling script as its users start it."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.training.forked import succeed
from tests.training.launched import SAMPLE
from unetgn.pipelines import UNetPipeline
from unetgn.sampling import folder
from unetgn.sampling import sample as script
from unetgn.sampling.evaluate import main as evaluate
from unetgn.sampling.folder import SamplingError
from unetgn.sampling.sample import main, parse_classes, parse_numbers
from unetgn.training.train import main as train

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
data: {held_out: 0.1}
objective: {label_dropout: 0.2}
train: {steps: 30, learning_rate: 5e-3, batch_size: 8, trackers: []}
checkpoint: {every: 15}
preview: {every: 0}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    (folder / "tiny.yaml").write_text(TINY)
    assert train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def draw(run: Path, out: Path, *arguments: str) -> int:
    return main(["--checkpoint", str(run), "--out", str(out), "--steps", "5", *arguments])


def pixels(out: Path, seed: int) -> np.ndarray:
    return np.asarray(Image.open(out / f"{seed:06d}.png")).astype(int)


def test_it_writes_images_by_seed_a_grid_a_list_and_an_archive(run: Path, tmp_path: Path) -> None:
    assert draw(run, tmp_path, "--seeds", "0-4,12", "--class-labels", "3,5", "--npz") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"000000.png", "000012.png", "grid.png", "samples.csv", "samples.npz"}
    with (tmp_path / "samples.csv").open(newline="") as lines:
        rows = [tuple(row.values()) for row in csv.DictReader(lines)]
    assert rows[:3] == [("000000.png", "0", "3"), ("000001.png", "1", "5"), ("000002.png", "2", "3")]
    assert rows[-1] == ("000012.png", "12", "3")
    archive = np.load(tmp_path / "samples.npz")
    assert archive["arr_0"].shape == (6, 8, 8, 1)
    assert archive["arr_0"].dtype == np.uint8
    assert np.array_equal(archive["arr_0"][5, :, :, 0], pixels(tmp_path, 12))
    assert archive["seeds"].tolist() == [0, 1, 2, 3, 4, 12]
    assert archive["labels"].tolist() == [3, 5, 3, 5, 3, 3]


def test_an_image_depends_on_its_seed_alone(run: Path, tmp_path: Path) -> None:
    assert draw(run, tmp_path / "many", "--seeds", "0-6", "--batch-size", "4") == 0
    assert draw(run, tmp_path / "one", "--seeds", "5") == 0
    assert abs(pixels(tmp_path / "many", 5) - pixels(tmp_path / "one", 5)).max() <= 1  # a shade, by rounding
    assert abs(pixels(tmp_path / "many", 5) - pixels(tmp_path / "many", 6)).max() > 20


def test_what_is_there_is_not_made_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(run, tmp_path, "--seeds", "0-3") == 0
    (tmp_path / "000002.png").unlink()
    made: list[str] = []
    real = script.write_png

    def watch(path: Path, picture: Image.Image) -> None:
        made.append(path.name)
        real(path, picture)

    monkeypatch.setattr(script, "write_png", watch)
    assert draw(run, tmp_path, "--seeds", "0-5") == 0
    assert made == ["000002.png", "000004.png", "000005.png"]
    with (tmp_path / "samples.csv").open() as lines:
        assert len(lines.readlines()) == 7


def test_images_made_otherwise_are_not_mixed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(run, tmp_path, "--seeds", "0-1") == 0
    for more, message in (
        (["--scheduler", "ddim"], "scheduler was 'ddpm' and is 'ddim'"),
        (["--weights", "raw"], "network was '"),
        (["--class-labels", "7"], "the class of seed 0 was 0 and is 7"),
        (["--guidance-scale", "2"], "guidance_scale was 1.0 and is 2.0"),
    ):
        assert draw(run, tmp_path, "--seeds", "0-1", *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "give another folder, or delete it" in error


def test_images_from_elsewhere_are_not_taken_for_samples(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "000000.png")
    assert draw(run, tmp_path, "--seeds", "0-1") == 2
    assert "holds numbered images that were not made here" in capsys.readouterr().err


def test_a_request_that_no_image_was_made_of_is_forgotten_and_a_damaged_one_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_png", fail)
        assert draw(run, tmp_path, "--seeds", "0-1", "--scheduler", "ddim") == 1
    assert draw(run, tmp_path, "--seeds", "0-1") == 0
    for contents in ("{", "[]", '{"subjects": {"0": {}}}', "{}", '{"subjects": {"0": ["label", "prompt"]}}'):
        (tmp_path / "request.json").write_text(contents)
        assert draw(run, tmp_path, "--seeds", "0-1") == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'request.json'} is damaged (" in error
        assert "delete these, or give another --out" in error


def test_options_change_the_images(run: Path, tmp_path: Path) -> None:
    variants = {"plain": [], "guided": ["--guidance-scale", "3"], "raw": ["--weights", "raw"],
                "ddim": ["--scheduler", "ddim"], "class": ["--class-labels", "8"]}  # fmt: skip
    seen = []
    for name, more in variants.items():
        assert draw(run, tmp_path / name, "--seeds", "0", *more) == 0
        seen.append(pixels(tmp_path / name, 0).tobytes())
    assert len(set(seen)) == len(seen)


def test_a_larger_size_is_sampled_when_asked_for(run: Path, tmp_path: Path) -> None:
    assert draw(run, tmp_path, "--seeds", "0", "--image-size", "12") == 0
    assert pixels(tmp_path, 0).shape == (12, 12)


def test_a_checkpoint_is_taken_by_its_path(run: Path, tmp_path: Path) -> None:
    assert draw(run / "checkpoints" / "step-000015", tmp_path, "--seeds", "0") == 0
    weights = (run / "checkpoints" / "step-000015" / "ema.safetensors").read_bytes()
    assert json.loads((tmp_path / "request.json").read_text())["network"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-labels", "9-11"], "--class-labels [10, 11]: this network has the classes 0 to 9"),
        (["--steps", "0"], "--scheduler and --steps: steps is 0; the network was trained on 1000 noise levels"),
        (["--steps", "2000"], "--scheduler and --steps: steps is 2000; the network was trained on 1000 noise levels"),
        (["--checkpoint", "nowhere"], "nowhere is not there; give a run's folder"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(run, tmp_path / "out", "--seeds", "0", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "1-2-3", "-4", "1,0-3"])
def test_what_is_no_list_of_seeds_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--checkpoint", "x", "--out", "y", f"--seeds={text}"])
    assert exit_.value.code == 2
    assert "argument --seeds" in capsys.readouterr().err


NAMES = ["ant", "bee", "black, white", "3", "10", "sea lion", "x", "y", "z", "9"]


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (["ant"], [0]),
        (["ant,bee"], [0, 1]),
        (["ant", "sea lion"], [0, 5]),
        (["black, white"], [2]),
        (["black, white", "ant,x"], [2, 0, 6]),
        (["0-2,bee"], [0, 1, 2, 1]),
        (["3"], [3]),
        (["10"], [4]),
        (["number=4,5-6"], [4, 5, 6]),
    ],
)
def test_classes_are_given_by_name_or_by_number(given: list[str], numbers: list[int]) -> None:
    assert parse_classes(given, NAMES) == numbers


def test_what_is_the_name_of_one_class_and_the_number_of_another_is_asked_about() -> None:
    names = ["1", "10", "2"]
    with pytest.raises(SamplingError, match="1 is the name of class 0, and class 1 is '10': say which") as refused:
        parse_classes(["1"], names)
    advised = [part.rstrip(".") for part in str(refused.value).split() if part.startswith("number=")]
    assert [parse_classes([part], names) for part in advised] == [[0], [1]]
    assert parse_classes(["10"], names) == [1]  # there is no class 10


@pytest.mark.parametrize("given", ["cat", "bea", "1-", "-1", "sea", ""])
def test_what_is_no_class_is_refused_with_the_names(given: str) -> None:
    with pytest.raises(SamplingError, match="neither the name nor the number of a class; the names are ant, bee, "):
        parse_classes([given], NAMES)
    with pytest.raises(SamplingError, match="this run knows no names of its classes"):
        parse_classes([given], [])


def test_a_run_knows_its_classes_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["class_names"] == [str(digit) for digit in range(10)]
    names = [f"digit {digit}" for digit in range(10)]
    (tmp_path / "run" / "data.json").write_text(json.dumps(data | {"class_names": names}))
    assert draw(tmp_path / "run", tmp_path / "named", "--seeds", "0-1", "--class-labels", "digit 7", "digit 2") == 0
    assert draw(run, tmp_path / "numbered", "--seeds", "0-1", "--class-labels", "7,2") == 0
    assert (tmp_path / "named" / "samples.csv").read_text() == (tmp_path / "numbered" / "samples.csv").read_text()
    newest = tmp_path / "run" / "checkpoints" / "step-000030"
    assert draw(newest, tmp_path / "checkpoint", "--seeds", "0", "--class-labels", "digit 7") == 0
    assert draw(run, tmp_path / "out", "--seeds", "0", "--class-labels", "digit 7") == 2
    assert "the names are 0, 1, 2" in capsys.readouterr().err


def test_lists_of_numbers_are_read() -> None:
    assert parse_numbers("0-3,7, 9-9") == [0, 1, 2, 3, 7, 9]


def test_the_evaluation_writes_its_figures_as_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(run, tmp_path, "--seeds", "0-29") == 0
    assert evaluate(["--samples", str(tmp_path), "--config", str(run / "config.yaml")]) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["samples"] == 30
    assert 0 <= figures["label_agreement"] <= 1
    assert figures["frechet_distance"] > 1  # thirty steps of training make noise, far from every digit
    assert figures["novelty"] > 1
    assert "frechet_distance" in capsys.readouterr().out


def test_an_evaluation_against_latents_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(run, tmp_path, "--seeds", "0-2") == 0
    assert evaluate(["--samples", str(tmp_path), "--config", "latent256_ldm"]) == 2
    assert "latent256_ldm trains on latents: give as --config one whose keys data.* name" in capsys.readouterr().err


def test_an_evaluation_without_samples_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["--samples", str(tmp_path)]) == 2
    assert "holds no samples.csv: make samples with sampling/sample.py" in capsys.readouterr().err


def tree(out: Path) -> dict[str, bytes]:
    """Read every file of a folder of samples, by its path."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


MANY = ("--seeds", "0-29,990-1009,2500", "--batch-size", "8", "--npz", "--webdataset", "--scheduler", "euler_ancestral")


def test_a_killed_run_that_is_started_again_ends_with_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed amid a batch, with a file half-written, which is no file; made again is only what is missing."""
    batches: list[list[int]] = []
    call = UNetPipeline.__call__
    monkeypatch.setattr(
        UNetPipeline,
        "__call__",
        lambda self, seeds, **more: (batches.append(list(seeds)), call(self, seeds, **more))[1],
    )
    assert draw(run, tmp_path / "whole", *MANY) == 0
    whole_batches, written = batches.copy(), list[Path]()
    real = script.write_png

    def die(path: Path, picture: Image.Image) -> None:
        if len(written) == 21:
            (path.parent / f".tmp-0-{path.name}").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, picture)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_png", die)
        assert draw(run, tmp_path / "broken", *MANY) == 130
    before = {path: path.stat().st_mtime_ns for path in written}
    batches.clear()
    assert draw(run, tmp_path / "broken", *MANY) == 0
    assert batches == whole_batches[2:]  # those with 5 of 8 images, and what comes after, made of the same seeds
    assert {path: path.stat().st_mtime_ns for path in written} == before
    whole, broken = tree(tmp_path / "whole"), tree(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert [name for name in whole if whole[name] != broken[name]] == []
    assert {"000999.png", "001000/001009.png", "002000/002500.png", "shards/000000.tar"} <= whole.keys()
    listed = (tmp_path / "broken" / "samples.csv").read_text().splitlines()
    assert len(listed) == 52
    assert listed[-1].startswith("002000/002500.png,2500,")
    assert evaluate(["--samples", str(tmp_path / "broken"), "--config", str(run / "config.yaml")]) == 0


def test_shards_hold_what_webdataset_reads(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PER_SHARD", 4)
    assert draw(run, tmp_path, "--seeds", "0-5", "--class-labels", "3,8", "--webdataset") == 0
    found: dict[str, bytes] = {}
    for shard in sorted((tmp_path / "shards").iterdir()):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert found["000005.cls"] == b"8"
    assert found["000005.png"] == (tmp_path / "000005.png").read_bytes()
    assert len(found) == 12
    (tmp_path / "shards" / "mine.tar").write_text("")
    assert draw(run, tmp_path, "--seeds", "0-2", "--class-labels", "3,8", "--webdataset") == 0
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["000000.tar", "mine.tar"]


def test_two_of_it_in_one_folder_are_refused(run: Path, tmp_path: Path) -> None:
    held = tmp_path / "out"
    held.mkdir()
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, held / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert draw(run, held, "--seeds", "0-1") == 2
        assert [path.name for path in held.iterdir()] == [".lock"]
        other.communicate(b"\n")
    assert draw(run, held, "--seeds", "0-1") == 0


def test_what_the_disk_cannot_hold_or_the_folder_permits_not_is_refused_before_the_first_step(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UNetPipeline, "__call__", lambda *_, **__: pytest.fail("a step was made"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
        assert draw(run, tmp_path / "full", "--seeds", "0-49") == 2
    assert "these images take at least 0.0002 GB: make room, give another --out" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert draw(run, tmp_path / "file" / "out", "--seeds", "0") == 2
    assert "is a file; give another folder" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)  # which nothing denies to root
    assert draw(run, tmp_path / "denied", "--seeds", "0") == 2
    assert "permits it not; give another folder" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()
    assert not (tmp_path / "denied").exists()


def test_an_image_and_a_mask_are_begun_with(run: Path, tmp_path: Path) -> None:
    shades = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(shades).save(tmp_path / "image.png")
    Image.fromarray(np.repeat([[255] * 4 + [0] * 4], 8, axis=0).astype(np.uint8)).save(tmp_path / "mask.png")
    image, mask = ("--image", str(tmp_path / "image.png")), ("--mask", str(tmp_path / "mask.png"))
    assert draw(run, tmp_path / "masked", "--seeds", "0", *image, *mask) == 0
    assert np.array_equal(pixels(tmp_path / "masked", 0)[:, 4:], shades[:, 4:])
    assert not np.array_equal(pixels(tmp_path / "masked", 0)[:, :4], shades[:, :4])
    assert draw(run, tmp_path / "little", "--seeds", "0", *image, "--strength", "0.01", "--steps", "100") == 0
    assert abs(pixels(tmp_path / "little", 0) - shades).mean() < 15
    request = json.loads((tmp_path / "masked" / "request.json").read_text())
    assert request["mask"] == hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()
    assert request["strength"] == 1.0
    Image.fromarray(255 - shades).save(tmp_path / "image.png")
    assert draw(run, tmp_path / "masked", "--seeds", "0-1", *image, *mask) == 2


def test_strips_and_animations_show_the_way_from_noise_and_from_seed_to_seed(run: Path, tmp_path: Path) -> None:
    more = ("--strip", "--interpolate", "5", "--animation", "webp", "--scheduler", "ddim")
    assert draw(run, tmp_path, "--seeds", "0,1,2", "--class-labels", "4", *more) == 0
    assert Image.open(tmp_path / "denoise.png").size == (6 * 66, 3 * 66)  # from noise on, after each of five steps
    assert Image.open(tmp_path / "denoise.webp").n_frames == 6
    strip = np.asarray(Image.open(tmp_path / "interpolation.png"))
    assert strip.shape == (2 * 66, 5 * 66)  # a row from each seed to the next, both ends with it
    for row, column, seed in ((0, 0, 0), (0, 4, 1), (1, 0, 1), (1, 4, 2)):
        shown = strip[66 * row + 1 : 66 * row + 65 : 8, 66 * column + 1 : 66 * column + 65 : 8].astype(int)
        assert abs(shown - pixels(tmp_path, seed)).max() <= 1
    assert Image.open(tmp_path / "interpolation.webp").n_frames == 9
    assert draw(run, tmp_path / "long", "--seeds", "0,1,2", "--scheduler", "ddim", "--interpolate", "40") == 0
    assert Image.open(tmp_path / "long" / "interpolation.png").size == (16 * 66, 2 * 66)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "LCMScheduler"], "it is for networks that were distilled"),
        (["--scheduler", "dpm"], "scheduler 'dpm' is unknown; there are ddpm, ddim"),
        (["--strength", "0.5"], "it is for --image FILE"),
        (["--mask", "x.png"], "it is for --image FILE"),
        (["--image", "x.png", "--strength", "1.5"], "is not a share above 0 and up to 1"),
        (["--guidance-rescale", "0.5"], "--guidance-scale is 1, which is no guidance"),
        (["--guidance-scale", "2", "--guidance-interval", "3", "1"], "0 <= low < high"),
        (["--guidance-scale", "nan"], "is not a finite number"),
        (["--interpolate", "5"], "--seeds of two images or more"),
        (["--animation", "webp"], "there is none without --strip or --interpolate"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--checkpoint", "x", "--out", "y", "--seeds", "0", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["ddim", "sde-dpmsolver++"])
def test_two_processes_make_the_pictures_of_one(scheduler: str, run: Path, tmp_path: Path) -> None:
    line = ["--checkpoint", str(run), "--steps", "5", "--seeds", "0-8", "--scheduler", scheduler, "--batch-size", "2"]
    done = succeed(
        *line,
        "--out",
        str(tmp_path / "two"),
        script=SAMPLE,
        launcher=Path("configs/accelerate/cpu_2_processes.yaml"),
        processes=2,
    )
    assert "100%" in done.stderr
    assert "9 of 9 images" in done.stderr
    assert main([*line, "--out", str(tmp_path / "one")]) == 0
    for seed in range(9):
        assert abs(pixels(tmp_path / "one", seed) - pixels(tmp_path / "two", seed)).max() <= 1
    assert not list((tmp_path / "two").glob(".tmp-*"))


def test_a_strip_that_begins_with_a_picture_shows_what_comes_after(run: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "photo.png")
    more = ("--image", str(tmp_path / "photo.png"), "--strength", "0.6", "--strip", "--scheduler", "ddim")
    assert draw(run, tmp_path / "out", "--seeds", "0,1", "--class-labels", "4", *more) == 0
    assert (tmp_path / "out" / "denoise.png").is_file()
    assert (tmp_path / "out" / "samples.csv").is_file()


def test_a_strip_begins_with_the_noise_of_its_own_seeds(run: Path, tmp_path: Path) -> None:
    for seed in ("0", "100"):
        assert draw(run, tmp_path / seed, "--seeds", seed, "--class-labels", "4", "--strip", "--scheduler", "ddim") == 0
    first, other = (np.asarray(Image.open(tmp_path / seed / "denoise.png"))[:66, :66] for seed in ("0", "100"))
    assert not np.array_equal(first, other)


def test_a_strength_of_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "photo.png")
    with pytest.raises(SystemExit) as failure:
        draw(run, tmp_path / "out", "--seeds", "0", "--image", str(tmp_path / "photo.png"), "--strength", "0")
    assert failure.value.code == 2
