"""Whatever ends the loop while the state is sound, the last whole step is saved first, as the unbroken run has it."""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.training.failures import ASIDE, KINDS, PLACES, Tracker, fail
from tests.training.runs import assert_equal_bits, rows, status
from training import loop as loop_module
from training import train
from training.checkpoint import Checkpoint, verify
from training.config import RunConfig
from training.config_files import load_config
from training.data.images import Digits
from training.data.samples import IndexedSamples
from training.errors import Failed
from training.loop import Loop
from training.objective import Objective
from training.preview import Conditions
from training.run_directory import RunDirectory
from training.signals import StopSignals
from training.step import TrainState

SIX_STEPS = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8], depth: 1, attention_levels: [],
        dropout: 0.1, norm: {num_groups: 4}}
data: {held_out: 0.01}
train: {steps: 6, batch_size: 4, learning_rate: 1e-3, log_every: 2, validate_every: 3, trackers: []}
ema: {decay: 0.9}
checkpoint: {every: 6, keep: 9}
preview: {every: 3, count: 1, steps: 1}
"""
FAILS_AFTER = 3  # steps; where the place is not come to then, its case names other keys


class Runs:
    """Makes runs of six steps in this process, of one configuration, in a fraction of a second each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loop = folder, None
        (folder / "tiny.yaml").write_text(SIX_STEPS)
        self.images = Digits()

    def run(self, name: str, *keys: str, resume: bool = False) -> Path:
        """Train to the end, or go on; the errors of train.train come out."""
        config = load_config(self.folder / "tiny.yaml", list(keys))
        output = RunDirectory(self.folder / name)
        output.lock()
        self.loop = self.make_loop(config, output)
        if resume:
            found = train.find_start(output, "auto")
            assert found is not None
            self.loop.restore(found)
        train.write_beginning(self.loop, None)
        train.train(self.loop)
        return output.path

    def make_loop(self, config: RunConfig, output: RunDirectory) -> Loop:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        network = train.make_network(config, None, None)
        state = TrainState(network, Objective(config.objective, None), config.train, config.ema, accelerator, 0)
        samples, held_out = (IndexedSamples(self.images, np.arange(*part), 0) for part in ((0, 99), (100, 104)))
        return Loop(config, state, samples, held_out, Conditions((1, 8, 8)), output, StopSignals(1))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    spare_time(monkeypatch.setattr)
    return Runs(tmp_path)


def spare_time(patch: Callable[..., object]) -> None:
    """Leave out what has nothing to do with the loop and takes most of its time."""
    patch(loop_module, "flops_per_image", lambda *_: 1)
    patch(train, "save_pipeline", lambda *_, **__: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a run that nothing interrupted, with a checkpoint of every step."""
    with pytest.MonkeyPatch.context() as patch:
        spare_time(patch.setattr)
        yield Runs(tmp_path_factory.mktemp("whole")).run("whole", "checkpoint.every=1")


def calls_out_of_the_loop() -> set[str]:
    """List what training/loop.py calls of other modules: functions that it imports, methods of what it holds."""
    tree = ast.parse(Path(loop_module.__file__).read_text())
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("training", "tqdm"))
        for name in node.names
    }
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    held = re.compile(r"(self\.(samples|run|state|window|batches|held_out)|bar|tracker|checkpoint)\.\w+")
    return {name for name in called if name in imported or held.fullmatch(name)} | {"next"}


# What is there before the first step, or only says something of memory.
NO_PLACES = {"Checkpoint", "Diverged", "Failed", "Faults", "Mishaps", "Preempted", "Restarting", "StepBatches",
             "Window", "checkpoint_path", "flops_per_image", "one_line", "preview_file", "self.state.restore",
             "self.state.scaler_state", "self.window.restore", "to_yaml", "bar.close"}  # fmt: skip


def test_every_call_out_of_the_loop_is_tried() -> None:
    assert calls_out_of_the_loop() - NO_PLACES == {place for place in PLACES if re.fullmatch(r"[\w.]+", place)}


# Every place with one of the kinds, in turn, and one place of each outcome with every kind.
CASES = {(place, list(KINDS)[number % len(KINDS)]) for number, place in enumerate(PLACES)}
CASES |= {(place, kind) for place in ("next", "draw_preview") for kind in KINDS}
RESUMED = {case for case in CASES if case[0] in ("the forward pass", "self.window.close")}
ALL = [(place, kind) for place in PLACES for kind in KINDS]


@pytest.mark.parametrize(
    ("place", "kind"),
    [case if case in CASES else pytest.param(*case, marks=pytest.mark.thorough) for case in ALL],
)
def test_what_fails_in_the_loop_costs_no_step(
    place: str,
    kind: str,
    runs: Runs,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run ends with its cause and its last step, or goes on with a warning; its bits are the unbroken run's."""
    outcome = PLACES[place][2]
    goes_on = outcome == ASIDE and (kind not in ("Ctrl-C", "exit"))
    keys = ["checkpoint.every=3", "train.log_every=1"]
    before = place in ("tqdm", "self.samples.loader")
    with monkeypatch.context() as patch:
        fail(patch.setattr, place, kind, lambda: runs.loop, step=0 if before else FAILS_AFTER, once=True)
        add_tracker(patch)
        if goes_on:
            runs.run("broken", *keys)
        else:
            with pytest.raises(Failed) as failure:
                runs.run("broken", *keys)
    run = runs.folder / "broken"
    if goes_on:
        assert any("the run goes on" in text for text in caplog.messages)
        assert status(run)["state"] == "completed"
    else:
        error = KINDS[kind]()
        assert (str(error) or type(error).__name__) in str(failure.value)
        step = runs.loop.state.step
        assert step == (0 if before else FAILS_AFTER)
        assert f"step {step} was saved" in str(failure.value) if step else "no step had been made" in str(failure.value)
        if place != "self.run.write_status":
            assert status(run) | {"state": "failed", "step": step, "error": str(failure.value)} == status(run)
        if step:
            assert verify(run / "checkpoints" / f"step-{step:06d}").step == step
            assert_equal_bits(whole, run, step)
            assert manifest_without_files(run, step) == manifest_without_files(whole, step)
        else:
            shutil.rmtree(run)
        if (place, kind) in CASES and (place, kind) not in RESUMED:
            return
        runs.run("broken", *keys, resume=step > 0)
    assert_equal_bits(whole, run, 6)
    assert [row["step"] for row in rows(run)] == list("123456")


def manifest_without_files(run: Path, step: int) -> dict:
    """Read what a checkpoint says beside its tensors; sums are those since the last row, which is another here."""
    found = vars(Checkpoint.read(run / "checkpoints" / f"step-{step:06d}"))
    return {key: value for key, value in found.items() if key not in ("path", "sha256") and "window" not in key}


def add_tracker(patch: pytest.MonkeyPatch) -> None:
    def start(loop: Loop) -> None:
        loop.accelerator.trackers = [Tracker()]

    patch.setattr(train, "start_trackers", start)
