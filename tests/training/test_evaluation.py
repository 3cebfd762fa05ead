"""A run is judged while it trains, by what judges it afterwards; its best checkpoint stays and is found by name."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.training.loops import CPU, Runs
from tests.training.runs import assert_equal_bits, rows
from unetgn import UNet
from unetgn.sampling.evaluate import open_real
from unetgn.sampling.features import compute_features
from unetgn.sampling.metrics import measure
from unetgn.training import train
from unetgn.training.checkpoint import best, delete_old, find_checkpoint, mark_best
from unetgn.training.config_files import load_config
from unetgn.training.data.images import Digits
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.errors import CheckpointError, ConfigError
from unetgn.training.evaluation import EvaluateConfig, Evaluator
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.preview import BATCH, Conditions, PreviewConfig, draw_images
from unetgn.training.run_directory import RunDirectory

KEYS = ("evaluate.every=1", "evaluate.count=4", "train.validate_every=0", "preview.every=0")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Return a function that says what FID each step is judged to have."""

    def say(values: list[float]) -> None:
        def judge(self: Evaluator, unet: UNet, scheduler: Any, *, on_step: Callable[[], None]) -> dict[str, float]:
            on_step()
            fid = values[int(unet_step())]
            return {"fid": fid, "kid": -fid, "precision": 0.5, "recall": 0.5}

        monkeypatch.setattr(Evaluator, "judge", judge)

    unet_step: Callable[[], int] = lambda: holder[0].loop.state.step  # noqa: E731
    holder: list[Runs] = []
    say.holder = holder  # type: ignore[attr-defined]
    return say


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_features_and_figures_are_those_of_the_evaluation_afterwards() -> None:
    real = open_real("digits8_ddpm").held_out.part(slice(0, 20))
    held_out, conditions = IndexedSamples(Digits(), np.asarray(real.numbers), 0), Conditions((1, 8, 8))
    preview, config = PreviewConfig(steps=2), EvaluateConfig(every=1, count=70)
    evaluator = Evaluator(config, preview, held_out, conditions, data="digits", device=CPU)
    expected = compute_features(evaluator.extractor, real, Accelerator(cpu=True))
    assert np.array_equal(evaluator.real, expected)
    torch.manual_seed(0)
    unet = UNet(
        in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4}
    ).eval()
    asked: list[None] = []
    scheduler = make_scheduler(ObjectiveConfig())
    found = evaluator.judge(unet, scheduler, on_step=lambda: asked.append(None))
    assert len(asked) == 2 * 2  # two batches of two steps
    drawn = draw_images(unet, scheduler, conditions, PreviewConfig(steps=2, count=70), on_step=lambda: None)
    assert found.items() <= measure(evaluator.features(torch.cat(drawn)), expected).items()


def test_the_best_checkpoint_stays_and_has_a_name(runs: Runs, unbroken: Path, figures: Any) -> None:
    """It is saved where none was due, and not deleted for newer ones."""
    figures.holder.append(runs)
    figures([0, 5, 4, 1, 3, 2, 9])
    run = runs.run("a", *KEYS, "checkpoint.every=5", "checkpoint.keep=1")
    assert [(row["step"], float(row["fid"])) for row in rows(run, "evaluation.csv")] == [
        ("1", 5), ("2", 4), ("3", 1), ("4", 3), ("5", 2), ("6", 9)]  # fmt: skip
    assert names(run) == ["step-000003", "step-000006"]
    assert best(run / "checkpoints") == run / "checkpoints" / "step-000003"
    assert find_checkpoint(run / "checkpoints" / "best").path == run / "checkpoints" / "step-000003"
    assert_equal_bits(run, unbroken, 3)
    assert_equal_bits(run, unbroken, 6)


def test_what_was_the_best_before_does_not_stay(runs: Runs, figures: Any) -> None:
    figures.holder.append(runs)
    figures([0, 6, 5, 4, 3, 2, 1])
    run = runs.run("a", *KEYS, "checkpoint.every=5", "checkpoint.keep=1")
    assert names(run) == ["step-000006"]


def test_the_metric_says_which_is_best(runs: Runs, figures: Any) -> None:
    figures.holder.append(runs)
    figures([0, 1, 2, 3, 2, 1, 1])
    run = runs.run("a", *KEYS, "evaluate.metric=kid", "checkpoint.keep=9")
    assert find_checkpoint(run / "checkpoints" / "best").step == 3


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_goes_on_is_judged_as_the_unbroken_one(step: int, runs: Runs, figures: Any) -> None:
    figures.holder.append(runs)
    figures([0, 5, 4, 1, 3, 0.5, 9])
    keys = (*KEYS, "checkpoint.every=1", "checkpoint.keep=9")
    whole = runs.run("a", *keys)
    before = (whole / "evaluation.csv").read_text()
    runs.run("a", *keys, "train.steps=6", resume=str(whole / "checkpoints" / f"step-{step:06d}"))
    assert (whole / "evaluation.csv").read_text() == before
    assert find_checkpoint(whole / "checkpoints" / "best").step == 5


def test_a_run_that_goes_back_before_its_best_step_has_the_best_of_those_that_are_left(
    runs: Runs, figures: Any
) -> None:
    figures.holder.append(runs)
    figures([0, 5, 4, 1, 3, 0.5, 9])
    keys = (*KEYS, "checkpoint.every=1", "checkpoint.keep=9")
    whole = runs.run("a", *keys)
    runs.run("a", *keys, "train.steps=4", resume=str(whole / "checkpoints" / "step-000004"))
    assert find_checkpoint(whole / "checkpoints" / "best").step == 3


def test_a_judgement_that_was_cut_short_is_made_up_for(runs: Runs, figures: Any) -> None:
    figures.holder.append(runs)
    figures([0, 5, 4, 1, 3, 2, 9])
    run = runs.run("a", *KEYS, "checkpoint.every=6")
    lines = (run / "evaluation.csv").read_text().splitlines()
    (run / "evaluation.csv").write_text("\n".join(lines[:-1]) + "\n")  # the last step's
    runs.run("a", *KEYS, "checkpoint.every=6", resume="auto")
    assert (run / "evaluation.csv").read_text().splitlines() == lines


def test_a_judgement_that_fails_costs_the_run_nothing(
    runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Evaluator, "judge", lambda *_, **__: 1 / 0)
    run = runs.run("a", *KEYS)
    assert_equal_bits(run, unbroken, 6)
    assert rows(run, "evaluation.csv") == []
    assert "the evaluation failed 6 times: ZeroDivisionError: division by zero" in caplog.messages


def test_a_run_that_was_not_judged_may_begin_to_be(runs: Runs, figures: Any) -> None:
    """By any number of images, and any extractor; but one run's figures have to compare."""
    figures.holder.append(runs)
    figures([0, 5, 4, 1, 3, 2, 9])
    run = runs.run("a", "train.trackers=[]")

    def go_on(*keys: str) -> None:
        config = load_config(runs.folder / "tiny.yaml", ["train.steps=8", *keys])
        line = Namespace(dry_run=True, resume="auto")
        assert train.take_output(config, RunDirectory(run), runs.loop.samples, 1, line).step == 6

    go_on("evaluate.every=2", "evaluate.count=4", "evaluate.extractor=mine:net")
    runs.run("a", *KEYS, "evaluate.count=7", "train.steps=6", resume="auto")
    alike = ("evaluate.every=2", "evaluate.count=7", "preview.count=3", "preview.every=9", "preview.steps=1")
    go_on(*alike, "evaluate.metric=kid")
    go_on("evaluate.every=0", "preview.steps=5")
    for key, was in (("evaluate.count=4", 7), ("evaluate.extractor=mine:net", None), ("preview.steps=5", 1)):
        name, _, value = key.partition("=")
        with pytest.raises(
            CheckpointError, match=f"evaluation.csv has figures .*: {name} was {was} and is {value}. Set"
        ):
            go_on(*alike, key)


def test_images_are_read_a_batch_at_a_time() -> None:
    """Else all that are held out would lie in memory at once, as numbers of 32 bits."""
    held_out, config = IndexedSamples(Digits(), np.arange(8), 0), EvaluateConfig(every=1)
    evaluator = Evaluator(config, PreviewConfig(), held_out, Conditions((1, 8, 8)), data="digits", device=CPU)
    read, seen, extractor = 0, [], evaluator.extractor

    def images() -> Iterator[np.ndarray]:
        nonlocal read
        for number in range(BATCH + 6):
            read += 1
            yield np.full((1, 8, 8), number / BATCH - 1, np.float32)

    def look(pixels: torch.Tensor) -> torch.Tensor:
        seen.append((read, len(pixels)))
        return extractor(pixels)

    evaluator.extractor = look
    assert len(evaluator.features(images())) == BATCH + 6
    assert seen == [(BATCH, BATCH), (BATCH + 6, 6)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["evaluate.every=5", "data.held_out=0"], r"evaluate\.every is 5 and data\.held_out 0"),
     (["evaluate.every=5", "data.name=latents", "data.path=x", "data.held_out=0.1", "objective.clip_sample=false"],
      r"evaluate\.every is 5 and data\.name latents"),
     (["evaluate.every=-1"], r"evaluate\.every is -1"),
     (["evaluate.count=3"], r"evaluate\.count is 3; at least 4")],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(keys: list[str], words: str, runs: Runs) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(runs.folder / "tiny.yaml", keys)


def test_an_extractor_that_is_not_there_is_named_before_the_first_step(runs: Runs) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluate\.every is 1, .*evaluate\.extractor is nobody.*there is no extractor"
    ):
        runs.run("a", *KEYS, "evaluate.extractor=nobody")


def test_too_few_images_to_compare_with_are_refused() -> None:
    held_out = IndexedSamples(Digits(), np.arange(3), 0)
    with pytest.raises(ConfigError, match=r"evaluate\.every is 1, but data\.held_out leaves 3 images"):
        Evaluator(EvaluateConfig(every=1), PreviewConfig(), held_out, Conditions((1, 8, 8)), data="digits", device=CPU)


def checkpoints(folder: Path) -> Path:
    """Make folders with the names of three checkpoints."""
    for step in (1, 2, 3):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    return folder / "checkpoints"


def test_a_folder_that_is_called_best_stays(tmp_path: Path) -> None:
    """Such as a copy of a run has, where links were followed, or a user has made."""
    folder = checkpoints(tmp_path)
    (folder / "best").mkdir()
    (folder / "best" / "precious").write_text("mine")
    mark_best(folder, folder / "step-000002")
    assert best(folder) == folder / "step-000002"
    assert (folder / "best.in-the-way" / "precious").read_text() == "mine"


@pytest.mark.parametrize("link", ["step-000001", "./step-000001", "../checkpoints/step-000001", "ABSOLUTE"])
def test_the_best_checkpoint_stays_whatever_way_the_link_takes(
    link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = checkpoints(Path())
    (folder / "best").symlink_to(tmp_path / folder / "step-000001" if link == "ABSOLUTE" else link)
    delete_old(folder, 1)
    assert names(Path()) == ["step-000001", "step-000003"]


@pytest.mark.parametrize("link", ["best", "nowhere", "/nowhere"])
def test_a_link_that_leads_nowhere_is_replaced(link: str, tmp_path: Path) -> None:
    folder = checkpoints(tmp_path)
    (folder / "best").symlink_to(link)
    delete_old(folder, 1)
    mark_best(folder, folder / "step-000003")
    assert best(folder) == folder / "step-000003"
    assert names(tmp_path) == ["step-000003"]


def test_a_figure_that_is_none_is_not_judged_by(tmp_path: Path) -> None:
    """As a bad disk leaves it; the others count as before."""
    (tmp_path / "evaluation.csv").write_text("step,fid,kid,precision,recall\n1,2,1e,1,1\n2,3,0.5,1,1\n3,nan,0.1,1,1\n")
    assert [RunDirectory(tmp_path).judged(metric) for metric in ("fid", "kid")] == [[1, 2], [3, 2]]
