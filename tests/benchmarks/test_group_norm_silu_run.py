"""The whole program of the fused operator's benchmark on a made-up machine: what it writes, and where it goes on."""

import subprocess
import time
from collections import deque
from pathlib import Path

import pytest
import torch

from benchmarks.group_norm_silu import __main__ as program
from benchmarks.group_norm_silu import contenders, record, run
from benchmarks.group_norm_silu.timing import queue, rotations
from tests.benchmarks.made_up_machine import CASES, Pretended, results


def test_a_run_writes_every_pass_of_every_case_with_its_surroundings(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real compiler: its backward pass has rules of its own."""
    monkeypatch.setattr(contenders, "compiled", lambda: torch.compile(contenders.eager, backend="aot_eager"))
    assert program.main(["--output", str(tmp_path)]) == run.DONE
    found = results(tmp_path)
    assert (found["device"], found["commit"], found["copy_bandwidth"]) == ("Made Up 1", "abc", 1e12)
    assert {"driver", "torch", "triton", "host"} <= found.keys()
    described = [(row["shape"], row["dtype"], row["layout"], row["extras"], row["pass"]) for row in found["rows"]]
    assert described == [
        (list(c.shape), c.dtype, c.layout, c.extras, which) for c in CASES for which in ("forward", "backward")
    ]
    assert not [row for row in found["rows"] if "compiled_error" in row]
    for row in found["rows"]:
        assert row.keys() >= {"ours_us", "eager_us", "compiled_us", "copy_bandwidth", "bytes"}
        assert row["rotations"] == rotations(row["bytes_read"], machine.cache_bytes())
    assert found["rows"][0]["bytes_read"] * 2 == found["rows"][1]["bytes_read"] == 2 * 2048 * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "group_norm_silu_made_up_1.json"]


def test_each_call_reads_inputs_that_have_left_the_cache() -> None:
    assert rotations(2**20, 50 * 2**20) == 32  # at most: the queue of a round
    assert rotations(2**24, 50 * 2**20) == 10
    assert rotations(2**30, 50 * 2**20) == 2


def test_results_of_as_many_calls_as_there_are_inputs_are_alive_while_a_call_is_timed() -> None:
    """Else each would be handed the memory of the one before, and what it writes would stay in the cache."""
    kept: deque[torch.Tensor] = deque(maxlen=3)
    alive: list[int] = []

    def call() -> torch.Tensor:
        alive.append(len({result.data_ptr() for result in kept}))
        return torch.empty(1000)

    queue([call] * 3, kept)
    assert len(alive) == 32
    assert alive[3:] == [3] * 29


def test_a_second_run_goes_on_where_the_first_stopped(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 10))  # each look at the clock finds it 10 s later
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert program.main(["--seconds", "45"]) == run.DONE
    assert "The time is up with 4 of 6 cases left" in capsys.readouterr().out
    first = results(tmp_path)["rows"]
    assert len(first) == 4
    machine.timed = 1000
    assert program.main([]) == run.DONE
    assert results(tmp_path)["rows"][:4] == first
    assert len(results(tmp_path)["rows"]) == 12
    timed = machine.timed
    assert program.main([]) == run.DONE
    assert machine.timed == timed


def test_results_of_another_commit_are_neither_mixed_nor_overwritten(
    machine: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "cases", lambda **_: CASES[:1])
    assert program.main([]) == run.DONE
    before = results(tmp_path)
    assert program.main(["--commit", "def"]) == program.CANNOT_RUN
    assert "results of commit abc, and these are of def" in capsys.readouterr().err
    assert results(tmp_path) == before


def test_without_git_the_commit_must_be_given_before_anything_is_measured(
    machine: Pretended, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("UNETGN_COMMIT")
    monkeypatch.setattr(program, "commit_of", lambda _: None)
    assert program.main([]) == program.CANNOT_RUN
    assert "give --commit or set UNETGN_COMMIT" in capsys.readouterr().err
    assert machine.timed == 0


def test_git_tells_the_commit_inside_of_a_repository_only(tmp_path: Path) -> None:
    assert record.commit_of(tmp_path) is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-mm"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = record.commit_of(tmp_path)
    assert commit is not None
    assert len(commit) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1x2x3x4"], "none of the shapes: 32x256x64x64"),
        (["--part", "4/3"], "write k/n with 1 <= k <= n"),
        (["--dtype", "float64"], "invalid choice"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert message in capsys.readouterr().err


def test_options_choose_the_cases(machine: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(program, "cases", lambda **options: asked.update(options) or [])
    assert program.main(["--dtype", "float16", "--shape", "8x320x64x64", "--part", "2/3", "--quick"]) == run.DONE
    assert asked == {"dtypes": ["float16"], "shapes": [(8, 320, 64, 64)], "part": (2, 3), "quick": True}
