"""The profile of some steps is written, and costs the run nothing, even where it fails."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.training.loops import Runs
from tests.training.runs import assert_equal_bits
from unetgn.training.step import TrainConfig

QUICK = ("train.validate_every=0", "preview.every=0")


@pytest.mark.parametrize("steps", [1, 3])
def test_as_many_steps_as_were_asked_for_are_recorded(steps: int, runs: Runs, unbroken: Path) -> None:
    """To the end of the run, too, where nothing comes after the last of them."""
    run = runs.run("a", f"train.profile={steps}", *QUICK)
    events = json.loads((run / "profile" / "rank-0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == steps
    assert_equal_bits(run, unbroken, 6)


def test_no_profile_is_made_where_none_is_asked_for(unbroken: Path) -> None:
    assert not (unbroken / "profile").exists()


@pytest.mark.parametrize("place", ["profile", "export"])
def test_a_profile_that_fails_costs_the_run_nothing(
    place: str, runs: Runs, unbroken: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no profiler here")

    if place == "profile":
        monkeypatch.setattr(Accelerator, "profile", fail)
    else:
        monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fail)
    run = runs.run("a", "train.profile=2", *QUICK)
    assert "the profile failed: RuntimeError: no profiler here; the run goes on without, and says so once" in (
        caplog.messages
    )
    assert_equal_bits(run, unbroken, 6)


@pytest.mark.parametrize(("profile", "words"), [(-1, "must not be negative"), (4, r"train\.steps is 6: at least 7")])
def test_a_profile_that_cannot_be_is_refused(profile: int, words: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.profile is {profile}.*{words}"):
        TrainConfig(steps=6, profile=profile)
