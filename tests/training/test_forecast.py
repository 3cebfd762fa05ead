"""Early in a run it is said how long it will take."""

from pathlib import Path

import pytest

from tests.training.loops import SIX_STEPS
from unetgn.training import forecast
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config
from unetgn.training.forecast import Forecast, in_words


def said(config: RunConfig, step: int, seconds: float, monkeypatch: pytest.MonkeyPatch, *, on_cpu: bool) -> list[str]:
    """What is said in a hundred steps that take so long each, the first one ten times as long."""
    clock = [0.0]
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: clock[0])
    told, lines = Forecast(config, step, on_cpu=on_cpu), list[str]()
    for number in range(100):
        told.begin_step()
        clock[0] += seconds if number else 10 * seconds
        if line := told.end_step():
            lines.append(f"{number + 1}: {line}")
        clock[0] += 1000  # a preview, a checkpoint
    return lines


@pytest.fixture
def my_images(tmp_path: Path) -> RunConfig:
    return load_config(Path("configs/my_images.yaml").resolve(), [f"data.path={tmp_path}"])


def test_a_step_is_measured_without_the_first_and_without_what_comes_between_steps(
    my_images: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = said(my_images, 0, 4.0, monkeypatch, on_cpu=False)
    # 4 steps have been made; the samples of step 50 are 46 · 4 s away, the end 49996 · 4 s.
    assert line == ("4: a step takes 4 s, the next samples (step 50) are 3 min away, the last step (50000) 2.3 days")
    (line,) = said(my_images, 700, 0.5, monkeypatch, on_cpu=False)
    assert line == ("21: a step takes 0.5 s, the next samples (step 800) are 40 s away, the last step (50000) 6.8 h")


def test_of_slow_steps_one_is_enough(my_images: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = said(my_images, 0, 80.0, monkeypatch, on_cpu=False)
    assert line.startswith("2: a step takes 80 s, the next samples (step 50) are 64 min away, ")


def test_a_long_run_on_a_cpu_is_told_what_is_quicker(my_images: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = said(my_images, 0, 4.0, monkeypatch, on_cpu=True)
    assert line.endswith("; on a CPU a smaller network and smaller images are quicker by far: --config my_images32")
    (line,) = said(my_images, 0, 0.5, monkeypatch, on_cpu=True)
    assert "my_images32" not in line  # seven hours


def test_nothing_is_said_of_previews_that_are_off_nor_of_a_run_that_is_over_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "six.yaml").write_text(SIX_STEPS)
    six = load_config(tmp_path / "six.yaml", ["preview.every=0"])
    assert said(six, 0, 4.0, monkeypatch, on_cpu=True) == ["4: a step takes 4 s, the last step (6) 8 s"]
    assert said(six, 0, 0.1, monkeypatch, on_cpu=True) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (40000, "11 h"),
        (129600, "1.5 days"),
    ],
)
def test_a_time_is_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
