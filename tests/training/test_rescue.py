"""Whatever ends the loop while the state is sound, the last whole step is saved first, as the unbroken run has it."""

import ast
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers.training_utils import EMAModel

from tests.training.failures import ASIDE, KINDS, PLACES, Tracker, fail
from tests.training.loops import Runs
from tests.training.runs import assert_equal_bits, rows, status
from unetgn.training import looks as looks_module
from unetgn.training import loop as loop_module
from unetgn.training import rescue, train
from unetgn.training.checkpoint import Checkpoint, verify
from unetgn.training.errors import Diverged, Failed, Preempted
from unetgn.training.loop import Loop
from unetgn.training.signals import STOPS, StopSignals
from unetgn.training.step import TrainState

FAILS_AFTER = 3  # steps; where the place is not come to then, its case names other keys


def calls_out_of_the_loop() -> set[str]:
    """List what the loop and its rescue call of other modules: functions they import, methods of what they hold."""
    tree = ast.parse("".join(Path(module.__file__).read_text() for module in (loop_module, looks_module, rescue)))
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("unetgn.training")
        for name in node.names
    }
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    held = re.compile(r"(self\.(samples|run|state|window|batches|held_out)|bar|tracker|checkpoint)\.\w+")
    return {name for name in called if name in imported or held.fullmatch(name)} | {"next"}


# What is there before the first step, only says something of memory, comes after ten seconds, or is tried in
# test_evaluation.py.
NO_PLACES = {"Checkpoint", "Diverged", "Failed", "Faults", "Mishaps", "Preempted", "Restarting", "StepBatches",
             "Window", "checkpoint.samples", "checkpoint_path", "flops_per_image", "is_of", "one_line", "preview_file",
             "save_snapshot", "self.samples.restore", "self.start.tensors", "self.state.restore",
             "self.state.scaler_state", "self.window.restore", "snapshot_file", "to_yaml", "bar.close", "mark_best",
             "self.run.judged", "self.window.clear", "Profile", "Forecast", "bar.say"}  # fmt: skip


def test_every_call_out_of_the_loop_is_tried() -> None:
    assert calls_out_of_the_loop() - NO_PLACES == {place for place in PLACES if re.fullmatch(r"[\w.]+", place)}


# Every place with one of the kinds, in turn, and one place of each outcome with every kind.
CASES = {(place, list(KINDS)[number % len(KINDS)]) for number, place in enumerate(PLACES)}
CASES |= {(place, kind) for place in ("next", "draw_preview") for kind in KINDS}
SAVING = ("self.window.all_sums", "self.state.tensors", "not_finite", "self.samples.fingerprint", "self.samples.state",
          "checkpoint.write", "delete_old", "self.run.delete_left", "self.run.write_status")  # fmt: skip
RESUMED = {case for case in CASES if case[0] in ("the forward pass", "self.window.close")}
ALL = [(place, kind) for place in PLACES for kind in KINDS]


@pytest.mark.parametrize(
    ("place", "kind"),
    [case if case in CASES else pytest.param(*case, marks=pytest.mark.slow) for case in ALL],
)
def test_what_fails_in_the_loop_costs_no_step(
    place: str,
    kind: str,
    runs: Runs,
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run ends with its cause and its last step, or goes on with a warning; its bits are the unbroken run's."""
    outcome = PLACES[place][2]
    goes_on = outcome == ASIDE and (kind not in ("Ctrl-C", "exit"))
    keys = [f"checkpoint.every={3 if place in SAVING else 6}", "train.log_every=1"]
    before = place in ("Bar", "self.samples.loader")
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
            assert_equal_bits(unbroken, run, step)
            assert manifest_without_files(run, step) == manifest_without_files(unbroken, step)
        else:
            shutil.rmtree(run)
        if (place, kind) in CASES and (place, kind) not in RESUMED:
            return
        runs.run("broken", *keys, resume="auto" if step else "")
    assert_equal_bits(unbroken, run, 6)
    assert [row["step"] for row in rows(run)] == list("123456")


def manifest_without_files(run: Path, step: int) -> dict:
    """Read what a checkpoint says beside its tensors; sums are those since the last row, which is another here."""
    found = vars(Checkpoint.read(run / "checkpoints" / f"step-{step:06d}"))
    return {key: value for key, value in found.items() if key not in ("path", "sha256") and "window" not in key}


def add_tracker(patch: pytest.MonkeyPatch) -> None:
    def start(loop: Loop) -> None:
        loop.accelerator.trackers = [Tracker()]

    patch.setattr(train, "start_trackers", start)


@pytest.mark.parametrize("number", sorted(STOPS))
def test_every_signal_that_asks_to_stop_saves_the_step_and_a_second_one_does_no_harm(
    number: int, runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes while the step is saved."""
    for owner, name in ((TrainState, "run_step"), (Checkpoint, "write")):
        original = getattr(owner, name)

        def signalled(first: object, *arguments: object, original: Callable = original, **more: object) -> object:
            if runs.loop.state.step >= FAILS_AFTER - 1:
                signal.raise_signal(number)
            return original(first, *arguments, **more)

        monkeypatch.setattr(owner, name, signalled)
    with pytest.raises(Preempted, match="after step 3"):
        runs.run("stopped")
    assert status(runs.folder / "stopped")["state"] == "preempted"
    assert_equal_bits(unbroken, runs.folder / "stopped", 3)


def test_a_signal_that_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(1) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.stop_asked()
            signal.raise_signal(signal.SIGUSR1)
            assert signals.stop_asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_weights_that_are_not_finite_are_noticed_at_their_step_and_nothing_of_it_is_saved(
    runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a finite loss and gradient, by an overflow in the update; the steps before stay."""
    original = TrainState.run_step

    def overflow(state: TrainState, batches: object) -> object:
        if state.step == FAILS_AFTER:
            state.optimizer.param_groups[0]["weight_decay"] = 1e38
            next(state.unet.parameters()).data[0] = 1e36
            state.objective.losses = lambda *_: sum(p.sum() for p in state.unet.parameters())[None] * 1e-38
        return original(state, batches)

    monkeypatch.setattr(TrainState, "run_step", overflow)
    with pytest.raises(Diverged, match="the averaged weights are not finite after step 4"):
        runs.run(
            "diverged", "checkpoint.every=1", "train.learning_rate=1e4", "train.validate_every=0", "preview.every=0"
        )
    assert sorted(path.name for path in (runs.folder / "diverged" / "checkpoints").iterdir()) == [
        "step-000001", "step-000002", "step-000003"]  # fmt: skip


def test_a_failure_in_the_middle_of_an_update_saves_nothing_of_it(
    runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the next step with the average of the one before are no state."""
    original = EMAModel.step

    def fail_at_last(average: EMAModel, parameters: object) -> None:
        if average.optimization_step == FAILS_AFTER:
            raise MemoryError
        original(average, parameters)

    monkeypatch.setattr(EMAModel, "step", fail_at_last)
    with pytest.raises(Failed, match="MemoryError; what was saved before is as it was, and step 3 could not be saved"):
        runs.run("torn", "checkpoint.every=2", "preview.every=0", "train.validate_every=0")
    assert [path.name for path in (runs.folder / "torn" / "checkpoints").iterdir()] == ["step-000002"]
    assert_equal_bits(unbroken, runs.folder / "torn", 2)


def test_a_disk_that_is_full_when_the_step_is_to_be_saved_leaves_the_checkpoint_before_and_both_causes(
    runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch.setattr, "next", "bug", lambda: runs.loop, step=FAILS_AFTER, once=False)
    fail(monkeypatch.setattr, "checkpoint.write", "full disk", lambda: runs.loop, step=FAILS_AFTER, once=False)
    with pytest.raises(Failed) as failure:
        runs.run("full", "checkpoint.every=2")
    for words in (
        "a bug",
        "what was saved before is as it was, and step 3 could not be saved",
        "No space left on device",
    ):
        assert words in str(failure.value)
    assert_equal_bits(unbroken, runs.folder / "full", 2)


def test_a_cause_that_comes_again_is_warned_of_once_and_counted(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(looks_module, "draw_preview", lambda *arguments, **_: 1 / (arguments[5] - arguments[5]))
    runs.run("a", "preview.every=1", "train.validate_every=0")
    assert [text for text in caplog.messages if "preview" in text] == [
        "the preview failed: ZeroDivisionError: division by zero; the run goes on without, and says so once",
        "the preview failed 6 times: ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize("end", ["a bug", "a signal"])
def test_a_run_that_branched_off_and_ended_at_once_goes_on_from_where_it_did(
    end: str, runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that it began with is another run's: --resume auto would begin at step 0."""
    if end == "a bug":
        fail(monkeypatch.setattr, "next", "bug", lambda: runs.loop, step=3, once=True)
    else:
        monkeypatch.setattr(StopSignals, "__enter__", lambda signals: setattr(signals, "received", True) or signals)
    with pytest.raises((Failed, Preempted)):
        runs.run("branch", resume=str(unbroken / "checkpoints" / "step-000003"))
    assert_equal_bits(unbroken, runs.folder / "branch", 3)
