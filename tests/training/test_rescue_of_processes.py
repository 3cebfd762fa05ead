"""What ends a run that is a process, or several: a rank's error, a dead worker, a pipe that nobody reads, a signal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.forked import Finished, finish, succeed
from tests.training.launched import ROOT, TWO
from tests.training.runs import assert_equal_bits, status

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


def fail_on(rank: int, place: str, kind: str, config: Path, output: Path, *keys: str) -> Finished:
    """Run two processes of which one fails after three steps."""
    failing = {"FAILS_AT": place, "FAILS_WITH": kind, "FAILS_ON": str(rank), "FAILS_AFTER": "3"}
    line = ["--config", str(config), "--output", str(output), *KEYS, *keys]
    return finish(*line, script=FAILING, environment=failing, **PAIR)


@pytest.mark.parametrize(
    ("rank", "place", "kind", "keys"),
    [
        (1, "next", "device", []),  # all ranks learn of it at the next question
        (1, "the forward pass", "memory", []),  # the others are in the sum of gradients
        (0, "the backward pass", "bug", []),
        (0, "checkpoint.write", "full disk", ["checkpoint.every=3"]),
        pytest.param(1, "held_out_loss", "bug", [], marks=pytest.mark.thorough),
        pytest.param(0, "what is due", "exit", [], marks=pytest.mark.thorough),
        pytest.param(1, "self.window.close", "bug", ["train.log_every=1"], marks=pytest.mark.thorough),
        pytest.param(1, "next", "Ctrl-C", ["data.num_workers=0"], marks=pytest.mark.thorough),
        pytest.param(0, "tqdm", "pipe", [], marks=pytest.mark.thorough),
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
    if place == "tqdm":
        assert step == 0
        return
    assert step == 3
    assert "; step 3 was saved, go on with --resume auto" in status(output)["error"]
    assert f"train.py: {status(output)['error']}" in done.stderr
    assert_equal_bits(pair, output, 3)
    succeed("--config", str(tiny), "--output", str(output), *KEYS, *keys, "--resume", "auto", **PAIR)
    assert_equal_bits(pair, output, 6)
