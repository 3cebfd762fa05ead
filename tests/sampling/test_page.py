"""What stands behind the page: who draws, within which bounds, and what is seen of a run."""

import inspect
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.sampling.page_run import make_run
from unetgn.pipelines.schedulers import EDM_SCHEDULERS, SCHEDULERS
from unetgn.sampling.app import find_run, fitting, main
from unetgn.sampling.folder import SamplingError
from unetgn.sampling.page.artist import Artist, LeftError, Look
from unetgn.sampling.page.asked import IN_TURN, MOST_IMAGES, MOST_SIDE, MOST_STEPS, NO_CLASS, Asked, Choices, read_asked
from unetgn.sampling.page.watching import GONE, KEPT, Watcher, ago
from unetgn.sampling.trained import load_trained, open_pipeline
from unetgn.training.checkpoint import find_checkpoint
from unetgn.training.edm import EDMConfig
from unetgn.training.errors import CheckpointError, RunDirectoryError
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS: dict[str, Any] = {
    "seeds": "0-3",
    "subject": IN_TURN,
    "prompt": None,
    "negative_prompt": None,
    "scheduler": "ddim",
    "steps": 5,
    "guidance_scale": 1,
    "size": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page"))


@pytest.fixture
def artist(run: Path) -> Iterator[Artist]:
    artist = Artist(run, batch_size=3)
    yield artist
    artist.close()


def ask(**more: Any) -> Asked:
    return read_asked(**FIELDS | more)


def last(looks: Iterator[Look]) -> Look:
    *_, look = looks
    return look


def tiles(grid: Image.Image, columns: int) -> np.ndarray:
    """Take the images (N, 8, 8) of a grid apart; each pixel is eight wide, and a white line is around each image."""
    pixels = np.asarray(grid).astype(int)
    rows = pixels.shape[0] // 66
    return pixels.reshape(rows, 66, columns, 66)[:, 1:65:8, :, 1:65:8].swapaxes(1, 2).reshape(-1, 8, 8)


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"seeds": "0-3,7"}, [0, 1, 2, 3, 7]),
        ({"seeds": "1-4", "subject": "7", "guidance_scale": 3}, [7, 7, 7, 7]),
        ({"seeds": "5", "subject": NO_CLASS, "scheduler": "heun"}, None),
    ],
    ids=str,
)
def test_the_images_are_the_pipelines(
    run: Path, artist: Artist, more: dict[str, Any], labels: list[int] | None
) -> None:
    """Whatever was drawn before, with whichever scheduler."""
    last(artist.draw(ask(scheduler="pndm", steps=20)))
    asked = ask(**more)
    look = last(artist.draw(asked))
    pipeline = open_pipeline(load_trained(find_checkpoint(run), "ema"))
    pipeline.use_scheduler(asked.scheduler)
    wanted = pipeline(
        asked.seeds, class_labels=labels, num_inference_steps=5, guidance_scale=asked.guidance_scale
    ).images
    assert look.grid is not None
    found = tiles(look.grid, -(-look.grid.width // 66))[: len(wanted)]
    assert abs(found - np.stack([np.asarray(image).astype(int) for image in wanted])).max() <= 1
    assert look.settings is not None


def test_the_file_says_what_made_it(run: Path, artist: Artist, tmp_path: Path) -> None:
    look = last(artist.draw(ask(seeds="4,9", guidance_scale=2)))
    assert look.grid is not None
    look.grid.save(tmp_path / "samples.png", pnginfo=look.settings)
    written = json.loads(Image.open(tmp_path / "samples.png").text["unetgn"])  # type: ignore[attr-defined]
    assert (written["seeds"], written["guidance_scale"], written["scheduler"]) == ([4, 9], 2, "ddim")
    assert written["network"] == find_checkpoint(run).digest("ema")


@pytest.mark.parametrize("scheduler", ["ddpm", "heun"])
def test_the_strip_comes_to_be_from_the_left_and_ends_with_the_images(artist: Artist, scheduler: str) -> None:
    looks = [look for look in artist.draw(ask(seeds="0-1", steps=20, scheduler=scheduler)) if look.strip is not None]
    filled = []
    for look in looks:
        assert look.strip is not None
        columns = tiles(look.strip, 10).reshape(2, 10, 64)
        blank = (columns == 255).all((0, 2))
        filled.append(10 - int(blank.sum()))
        assert not blank[: filled[-1]].any()
    assert filled == sorted(filled)
    assert filled[-1] == 10
    assert len(set(filled)) > 3
    strip, grid = looks[-1].strip, looks[-1].grid
    assert strip is not None and grid is not None  # noqa: PT018
    assert abs(tiles(strip, 10)[9::10] - tiles(grid, 2)).max() <= 1


@pytest.mark.thorough  # which imports Gradio
@pytest.mark.parametrize("reads_text", [False, True])
def test_texts_are_asked_for_where_a_network_reads_them(
    reads_text: bool, run: Path, artist: Artist, tmp_path: Path
) -> None:
    layout = pytest.importorskip("unetgn.sampling.page.layout", exc_type=ImportError)
    choices = Choices("run", [], True, reads_text, ["ddim"])
    page = layout.lay_out(choices, artist, Watcher(run, tmp_path, steps=20))
    components = {part["id"]: part["props"] for part in page.config["components"]}
    shown = {props.get("label"): props["visible"] for props in components.values() if "visible" in props}
    assert (shown["Prompt"], shown["Negative prompt"]) == (reads_text, reads_text)
    (taken,) = [event["inputs"] for event in page.config["dependencies"] if event["inputs"]]
    wanted = list(inspect.signature(read_asked).parameters)
    labels = {"Class": "subject", "Guidance": "guidance_scale", "Negative prompt": "negative_prompt"}
    assert [labels.get(name := components[part]["label"], name.lower()) for part in taken] == wanted


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seeds": f"0-{MOST_IMAGES}"}, f"more than {MOST_IMAGES}"),
        ({"seeds": f"1,0-{10**30}"}, f"more than {MOST_IMAGES}"),  # and not after a list of so many was made
        ({"seeds": "9" * 5000}, "5000 characters"),
        ({"seeds": "²"}, "not a list of numbers"),
        ({"seeds": ""}, "not a list of numbers"),
        ({"seeds": None}, "not a list of numbers"),
        ({"seeds": "-1"}, "not a list of numbers"),
        ({"seeds": str(2**63)}, "2**63"),
        ({"steps": MOST_STEPS + 1}, f"steps is {MOST_STEPS + 1}"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": None}, "steps is missing"),
        ({"steps": float("nan")}, "steps is nan"),
        ({"steps": float("inf")}, "steps is inf"),
        ({"size": str(MOST_SIDE + 1)}, f"size is {MOST_SIDE + 1}"),
        ({"size": "0"}, "size is 0"),
        ({"size": "8.5"}, "size is '8.5'"),
        ({"size": "9" * 1999}, "size is"),
        ({"prompt": "x" * 5000}, "prompt has 5000 characters"),
        ({"negative_prompt": "x" * 5000}, "negative prompt has 5000 characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_too_much_or_no_number_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError) as refused:
        ask(**more)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"size": "17"}, "size is 17"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": 2, "subject": NO_CLASS}, "no class_labels"),
        ({"subject": "10"}, "classes are the numbers 0 to 9"),
        ({"prompt": "a digit"}, "reads no text"),
        ({"negative_prompt": "a digit", "guidance_scale": 2}, "reads no text"),
        ({"scheduler": "edm_euler"}, "edm_euler"),
        ({"scheduler": "DPMSolverSDEScheduler"}, "torchsde"),
        ({"scheduler": ""}, "is unknown"),
        ({"steps": 700}, "700"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_network_is_refused_in_its_words_and_the_next_is_drawn(
    artist: Artist, more: dict[str, Any], message: str
) -> None:
    with pytest.raises((SamplingError, ValueError)) as refused:
        last(artist.draw(ask(**more)))
    assert message in str(refused.value)
    assert last(artist.draw(ask(steps=1))).grid is not None


def test_who_leaves_does_not_keep_others_waiting(artist: Artist, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two visitors the first one leaves within a drawing of a thousand steps."""
    ends: list[BaseException] = []
    draw = artist._draw

    def noting(*arguments: Any) -> None:
        try:
            draw(*arguments)
        except LeftError as error:
            ends.append(error)
            raise

    monkeypatch.setattr(artist, "_draw", noting)
    first = artist.draw(ask(steps=1000, seeds="0-63"))
    next(look for look in first if look.strip is not None)
    second = artist.draw(ask())
    assert next(second).grid is None
    first.close()
    assert last(second).grid is not None
    assert len(ends) == 1


def test_closing_ends_what_is_being_drawn(run: Path) -> None:
    artist = Artist(run)
    looks = artist.draw(ask(steps=1000, seeds="0-63"))
    next(look for look in looks if look.strip is not None)
    threading.Thread(target=artist.close).start()
    with pytest.raises(LeftError):
        last(looks)


def test_the_newest_checkpoint_draws_and_without_one_a_run_can_be_watched(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    shutil.copytree(run, young, ignore=shutil.ignore_patterns("step-*"))
    watcher, artist = Watcher(young, tmp_path, steps=20), Artist(young)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        last(artist.draw(ask()))
    assert watcher.look().facts["newest checkpoint"] == "none yet"
    for step in (10, 20):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(run / name, young / name)
        assert f"of step {step} " in last(artist.draw(ask())).words
        assert watcher.look().facts["newest checkpoint"] == f"step {step}"
    artist.close()


def test_watching_tells_how_a_run_stands_and_writes_nothing_there(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}
    sight = Watcher(run, tmp_path, steps=20).look()
    assert {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))} == before
    assert (sight.facts["state"], sight.facts["step"]) == ("completed", "20 of 20")
    assert sight.facts["held-out loss"].endswith("step 20")
    for shown, name in ((sight.samples, "samples"), (sight.strip, "denoise")):
        assert shown is not None
        assert shown.read_bytes() == (run / name / "step-000020.png").read_bytes()
    assert sight.loss is not None
    assert Image.open(sight.loss).size == (840, 480)


def hold(run: Path, told: Any) -> None:
    """Be a run that goes on, until it is killed."""
    directory = RunDirectory(run)
    directory.lock()
    directory.write_status("running", 10)
    told.set()
    time.sleep(60)


def test_a_run_that_was_killed_is_not_said_to_be_running(run: Path, tmp_path: Path) -> None:
    young, context = tmp_path / "young", multiprocessing.get_context("fork")
    shutil.copytree(run, young)
    watcher, told = Watcher(young, tmp_path, steps=20), context.Event()
    assert watcher.facts()["state"] == "completed"
    held = context.Process(target=hold, args=(young, told))
    held.start()
    try:
        assert told.wait(30)
        for _ in range(3):  # looking takes nothing away
            assert watcher.facts()["state"] == "running"
            assert RunDirectory(young).is_held() is True
            with pytest.raises(RunDirectoryError, match="in use by another run"):
                RunDirectory(young).lock()
    finally:
        held.kill()
        held.join()
    assert watcher.facts()["state"] == GONE
    again = RunDirectory(young)
    again.lock()  # nor does it keep others out
    again.unlock()
    (young / ".lock").unlink(missing_ok=True)
    assert watcher.facts()["state"] == "running"  # a copy of a run, of which nothing else is known
    (young / ".lock").symlink_to(run / ".lock")
    assert watcher.facts()["state"] == "running"


def test_a_row_of_steps_that_nobody_timed_is_shown_without_a_speed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, young := tmp_path / "young")
    directory = RunDirectory(young)
    assert "images a second" in Watcher(young, tmp_path, steps=20).facts()
    directory.log("metrics.csv", {"step": 20, "epoch": 1.0, "loss": 0.5, "learning_rate": 1e-3, "gradient_norm": 1.0})
    facts = Watcher(young, tmp_path, steps=20).facts()
    assert (facts["loss"], "images a second" in facts) == ("0.5", False)


@pytest.mark.parametrize(
    ("more", "columns"),
    [({"seeds": "0-19"}, 10), ({"seeds": "0-8"}, 3), ({"seeds": "0-19", "subject": "7"}, 5)],
    ids=str,
)
def test_a_class_has_a_column_where_all_come_in_turn(artist: Artist, more: dict[str, Any], columns: int) -> None:
    look = last(artist.draw(ask(steps=1, **more)))
    assert look.grid is not None
    assert look.grid.width == 64 * columns + 2 * columns


def test_watching_follows_a_run(run: Path, tmp_path: Path) -> None:
    """From a folder that has a configuration alone, by rows, previews and a status that was cut short, to the end."""
    young, out = tmp_path / "young", tmp_path / "out"
    young.mkdir(), out.mkdir()
    watcher = Watcher(young, out, steps=20)
    sight = watcher.look()
    assert (sight.facts["state"], sight.loss, sight.samples) == ("not started yet", None, None)
    header, *rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
    pictures = []
    for count in range(1, len(rows) + 1):
        (young / "metrics.csv").write_text(header + "".join(rows[:count]) + "99,0.")
        (young / "status.json").write_text('{"state": "runn')
        sight = watcher.look()
        assert sight.facts["step"] == f"{rows[count - 1].split(',')[0]} of 20"
        assert "status.json cannot be read" in sight.facts["state"]
        assert sight.loss is not None
        assert sight.loss == watcher.look().loss  # nothing has changed
        pictures.append((sight.loss, sight.loss.read_bytes()))
    assert len({contents for _, contents in pictures}) == len(rows)
    for path, contents in pictures[-KEPT:]:
        assert path.read_bytes() == contents  # whoever reads it meanwhile reads a whole one
    assert len(list(out.glob("loss-*"))) == KEPT
    for step in (10, 20):
        (young / "samples").mkdir(exist_ok=True)
        shutil.copy(run / "samples" / f"step-{step:06d}.png", young / "samples")
        sight = watcher.look()
        assert sight.samples is not None
        assert sight.samples.name.endswith(f"{step}.png")
    assert len(list(out.glob("samples-*"))) == 2


def test_a_long_run_is_drawn_in_as_many_points_as_a_picture_has(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[int], list[float]]] = []
    monkeypatch.setattr(
        "unetgn.sampling.page.watching.draw_loss", lambda training, held_out, path: drawn.append(training)
    )
    header, row = (run / "metrics.csv").read_text().splitlines()[:2]
    lines = [f"{step},{row.partition(',')[2]}" for step in range(30_001)]
    (tmp_path / "metrics.csv").write_text("\n".join([header, *lines, ""]))
    Watcher(tmp_path, tmp_path, steps=1).look()
    assert 1000 < len(drawn[0][0]) <= 2000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s ago"), (59, "59 s ago"), (150, "2 min ago"), (4 * 3600, "4 h ago"), (1e6, "12 d ago")],
)
def test_how_long_ago_is_said_in_words(seconds: float, words: str) -> None:
    assert ago(seconds) == words


@pytest.mark.parametrize("name", [".", "checkpoints", "checkpoints/step-000010"])
def test_a_run_is_found_by_each_of_its_folders(run: Path, name: str) -> None:
    found, file = find_run(run / name)
    assert found.resolve() == run.resolve()
    assert file.is_file()


def test_what_is_no_run_and_what_cannot_be_served_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(run), "--port", "70000"])
    assert "70000" in capsys.readouterr().err
    assert main(["--checkpoint", str(run), "--host", "192.0.2.1"]) == 1  # nobody's (RFC 5737)
    said = capsys.readouterr().err
    assert "192.0.2.1 cannot be served" in said
    assert len(said.splitlines()) == 1


@pytest.mark.thorough  # which imports Gradio
@pytest.mark.parametrize(
    ("objective", "wanted"),
    [(ObjectiveConfig(), "dpmsolver++"), (ObjectiveConfig(edm=EDMConfig()), "edm_dpmsolver++")],
    ids=["DDPM", "EDM"],
)
def test_the_page_begins_with_a_scheduler_of_few_steps(objective: ObjectiveConfig, wanted: str) -> None:
    layout = pytest.importorskip("unetgn.sampling.page.layout", exc_type=ImportError)
    assert layout.prefer(layout.QUICK, fitting(make_scheduler(objective))) == wanted


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine"])
def test_the_schedulers_that_fit_are_offered(schedule: Any) -> None:
    names = fitting(make_scheduler(ObjectiveConfig(schedule=schedule)))
    assert set(names) <= set(SCHEDULERS)
    assert not set(names) & set(EDM_SCHEDULERS)
    assert {"ddpm", "ddim", "dpmsolver++", "heun"} <= set(names)
