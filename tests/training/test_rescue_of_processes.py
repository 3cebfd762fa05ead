"""What ends a run that is a process, or several: a rank's error, a dead worker, a pipe that nobody reads, a signal."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.forked import Finished, finish, succeed
from tests.training.launched import FSDP2, ON_CPUS, ROOT, TWO
from tests.training.runs import assert_equal_bits, logged_without_speed, status
from unetgn.training.checkpoint import verify

FAILING = ROOT / "tests" / "training" / "train_with_a_failure.py"
PAIR: Mapping[str, Any] = {"launcher": TWO, "processes": 2}
KEYS = ["train.steps=6", "checkpoint.every=6", "preview.every=3", "preview.count=1", "train.validate_every=3",
        "data.held_out=0.01", "train.log_every=2"]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two processes that nothing interrupted, with a checkpoint of every step."""
    output = tmp_path_factory.mktemp("pair") / "run"
    succeed("--config", str(tiny), "--output", str(output), *KEYS, "checkpoint.every=1", "checkpoint.keep=9", **PAIR)
    return output


def fail_on(rank: int, place: str, kind: str, config: Path, output: Path, *keys: str, after: int = 3) -> Finished:
    """Run two processes of which one fails after some steps."""
    failing = {"FAILS_AT": place, "FAILS_WITH": kind, "FAILS_ON": str(rank), "FAILS_AFTER": str(after)}
    line = ["--config", str(config), "--output", str(output), *KEYS, *keys]
    return finish(*line, script=FAILING, environment=failing, **PAIR)


@pytest.mark.parametrize(
    ("rank", "place", "kind", "keys"),
    [
        (1, "next", "device", []),  # all ranks learn of it at the next question
        (1, "the forward pass", "memory", []),  # the others are in the sum of gradients
        pytest.param(0, "the backward pass", "bug", [], marks=pytest.mark.slow),
        pytest.param(0, "checkpoint.write", "full disk", ["checkpoint.every=3"], marks=pytest.mark.thorough),
        pytest.param(1, "held_out_loss", "bug", [], marks=pytest.mark.slow),
        pytest.param(0, "what is due", "exit", [], marks=pytest.mark.slow),
        pytest.param(1, "self.window.close", "bug", ["train.log_every=1"], marks=pytest.mark.slow),
        pytest.param(1, "next", "Ctrl-C", ["data.num_workers=0"], marks=pytest.mark.slow),
        pytest.param(0, "bar.update", "pipe", [], marks=pytest.mark.slow),
    ],
)
def test_what_fails_on_one_of_two_ranks_costs_no_step(
    rank: int, place: str, kind: str, keys: list[str], tiny: Path, pair: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    done = fail_on(rank, place, kind, tiny, output, *keys)
    assert done.codes == [1, 1], done.stderr[-3000:]
    step = status(output)["step"]
    assert status(output)["state"] == "failed"
    assert status(output)["error"].startswith(f"rank {rank}: ")
    assert step == 3
    assert "; step 3 was saved, go on with --resume auto" in status(output)["error"]
    assert f"train.py: {status(output)['error']}" in done.stderr
    assert_equal_bits(pair, output, 3)
    succeed("--config", str(tiny), "--output", str(output), *KEYS, *keys, "--resume", "auto", **PAIR)
    assert_equal_bits(pair, output, 6)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_left_of_two_ranks_saves_the_step_when_one_is_killed(
    rank: int, tiny: Path, pair: Path, tmp_path: Path
) -> None:
    """As the system kills a process for lack of memory."""
    done = fail_on(rank, "the forward pass", "SIGKILL", tiny, tmp_path / "a")
    assert done.codes[rank] == -signal.SIGKILL
    assert done.codes[1 - rank] == 1
    assert "; step 3 was saved, go on with --resume auto" in done.stderr
    assert_equal_bits(pair, tmp_path / "a", 3)


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["self.run.log", "bar.set_postfix_str"])
def test_a_row_that_the_main_process_was_killed_for_is_written_when_the_run_goes_on(
    place: str, tiny: Path, pair: Path, tmp_path: Path
) -> None:
    """Before it is in the log, or after: all ranks have added up its numbers."""
    done = fail_on(0, place, "SIGKILL", tiny, tmp_path / "a", after=4)
    assert done.codes == [-signal.SIGKILL, 1]
    assert "; step 4 was saved, go on with --resume auto" in done.stderr
    assert len(logged_without_speed(tmp_path / "a")) == (3 if place == "bar.set_postfix_str" else 2)
    succeed("--config", str(tiny), "--output", str(tmp_path / "a"), *KEYS, "--resume", "auto", **PAIR)
    assert logged_without_speed(tmp_path / "a") == logged_without_speed(pair)
    assert_equal_bits(pair, tmp_path / "a", 6)


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        pytest.param("next", True, marks=pytest.mark.slow),
        pytest.param("checkpoint.write", True, marks=pytest.mark.thorough),
        pytest.param("the forward pass", False, marks=pytest.mark.thorough),
    ],
)
def test_with_fsdp2_a_step_is_saved_where_all_ranks_can_be_asked(
    place: str, saved: bool, tiny: Path, tmp_path: Path
) -> None:
    """In the middle of a step the others cannot give their parts: then the checkpoint before is as it was."""
    failing = {"FAILS_AT": place, "FAILS_WITH": "bug", "FAILS_ON": "0", "FAILS_AFTER": "3"}
    every = f"checkpoint.every={3 if place == 'checkpoint.write' else 2}"
    line = ["--config", str(tiny), "--output", str(tmp_path / "a"), *KEYS, every, "preview.every=0",
            "train.validate_every=0"]  # fmt: skip
    done = finish(*line, script=ON_CPUS, environment=failing, launcher=FSDP2, processes=2)
    assert done.codes == [1, 1], done.stderr[-3000:]
    assert ("each process has a part of it" in done.stderr) != saved
    assert max((tmp_path / "a" / "checkpoints").iterdir()).name == f"step-00000{3 if saved else 2}"


def fail_alone(place: str, finished: Path, output: Path, *keys: str, **more: str) -> Finished:
    """Run one process that fails after three steps."""
    line = ["--config", str(finished.parent / "tiny.yaml"), "--output", str(output), "preview.every=0", *keys]
    return finish(*line, script=FAILING, environment={"FAILS_AT": place, "FAILS_AFTER": "3", **more})


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_is_started_anew_once(deaths: int, finished: Path, tmp_path: Path) -> None:
    """The images are the same, and so are the bits; a second death at the same image ends the run, saved."""
    output, marks = tmp_path / "a", tmp_path / "marks"
    marks.mkdir()
    failing = {"FAILS_OFTEN": str(deaths), "FAILS_MARKS": str(marks)}
    done = fail_alone("a worker is killed", finished, output, "data.num_workers=1", **failing)
    assert "a loader's worker died" in done.stderr
    if deaths == 1:
        assert done.code == 0, done.stderr[-3000:]
        assert_equal_bits(finished, output, 6)
        assert logged_without_speed(finished) == logged_without_speed(output)
    else:
        assert done.code == 1
        step = status(output)["step"]
        assert step in (2, 3)  # the worker is one image ahead
        assert f"; step {step} was saved" in done.stderr
        assert_equal_bits(finished, output, 2)
        assert verify(output / "checkpoints" / f"step-{step:06d}").step == step


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_nobody_reads_any_more_ends_a_run_with_its_step_saved(
    stream: str, finished: Path, tmp_path: Path
) -> None:
    done = fail_alone(f"{stream} is closed", finished, tmp_path / "a", "checkpoint.every=9")
    if stream == "stdout":  # on which a run says nothing before its last line
        assert done.code == 0
        return
    assert done.code == 1
    error = "BrokenPipeError: [Errno 32] Broken pipe; step 4 was saved, go on with --resume auto"
    assert status(tmp_path / "a") | {"state": "failed", "step": 4, "error": error} == status(tmp_path / "a")
    assert_equal_bits(finished, tmp_path / "a", 4)


def test_a_run_that_is_started_without_a_terminal_writes_to_none_of_its_files_what_is_for_one(
    finished: Path, tmp_path: Path
) -> None:
    assert fail_alone("no descriptor is open", finished, tmp_path / "a").code == 0
    assert_equal_bits(finished, tmp_path / "a", 6)
    assert logged_without_speed(finished) == logged_without_speed(tmp_path / "a")
