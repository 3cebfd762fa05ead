"""A process that ends before the first checkpoint stands: the others end, too, within bounds, and say so in a line."""

import signal
from datetime import timedelta
from pathlib import Path

import pytest

from tests.training.forked import Finished, finish, succeed
from tests.training.launched import ROOT, TWO
from tests.training.runs import assert_equal_bits
from tests.training.test_starts import free_port
from tests.training.train_with_a_death_at_start import BY_MAIN, PLACES
from unetgn.training import meeting

SCRIPT = ROOT / "tests" / "training" / "train_with_a_death_at_start.py"
DEATHS = [(place, rank) for place in PLACES for rank in ((0,) if place in BY_MAIN else (0, 1))]
OFTEN = [("the process group", 1)]


def die(place: str, rank: int, how: str, config: Path, output: Path, **more: str) -> Finished:
    """Start two processes, one of which ends at a place."""
    line = ["--config", str(config), "--output", str(output), "train.steps=3", "checkpoint.every=2", "preview.every=0"]
    dying = {"DIES_AT": place, "DIES_ON": str(rank), "DIES_BY": how, **more}
    return finish(*line, script=SCRIPT, environment=dying, launcher=TWO, processes=2)


@pytest.mark.parametrize(
    ("place", "rank"),
    [pytest.param(*death, marks=() if death in OFTEN else pytest.mark.slow) for death in DEATHS],
)
def test_a_process_that_is_killed_ends_the_others_in_a_line(place: str, rank: int, tiny: Path, tmp_path: Path) -> None:
    done = die(place, rank, "SIGKILL", tiny, tmp_path / "a")
    assert done.codes[rank] == -signal.SIGKILL
    assert done.codes[1 - rank] == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "Traceback" not in done.stderr
    if place == "the meeting":
        assert f"rank {rank} of 2 has not come within" in said
    saved = place in ("the first save", "the first checkpoint")
    assert ("; step 2 was saved, go on with --resume auto" in said) == saved


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), DEATHS)
def test_a_process_that_fails_ends_the_others(place: str, rank: int, tiny: Path, tmp_path: Path) -> None:
    done = die(place, rank, "an error", tiny, tmp_path / "a")
    assert done.codes == [1, 1]
    assert "can't start new thread" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), [("the average", 1), ("the first checkpoint", 0), ("the beginning", 0)])
def test_after_such_a_death_the_run_goes_on_as_one_that_nobody_ended(
    place: str, rank: int, tiny: Path, tmp_path: Path
) -> None:
    die(place, rank, "SIGKILL", tiny, tmp_path / "a")
    for run in "ab":
        line = ["--config", str(tiny), "--output", str(tmp_path / run), "train.steps=3", "preview.every=0"]
        succeed(*line, "--resume", "auto", launcher=TWO, processes=2)
    assert_equal_bits(tmp_path / "a", tmp_path / "b", 3)


@pytest.mark.slow
def test_a_main_process_that_takes_longer_to_begin_than_to_connect_is_waited_for(tiny: Path, tmp_path: Path) -> None:
    assert die("nowhere", 0, "", tiny, tmp_path / "a").codes == [0, 0]


@pytest.mark.slow
def test_where_no_launcher_keeps_the_meeting_place_rank_0_does(tiny: Path, tmp_path: Path) -> None:
    alone = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": free_port()}
    assert die("nowhere", 0, "", tiny, tmp_path / "a", **alone).codes == [0, 0]


def test_a_main_process_that_is_not_there_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "LONGEST_MEETING", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match=f"rank 0, which is to be at 127.0.0.1:{place['MASTER_PORT']}, cannot"):
        meeting.meet()


def test_ranks_that_have_not_come_are_named_and_a_process_alone_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with meeting.connecting() as timeout:
        assert timeout == meeting.LONGEST_WAIT
    place = {"RANK": "0", "WORLD_SIZE": "14", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "LONGEST_MEETING", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match=r"^rank 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more of 14 has not come"):
        meeting.meet()
