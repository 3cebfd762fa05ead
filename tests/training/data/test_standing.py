"""Where a reader of shards stood is where it goes on: the samples after a resume are those of the unbroken run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data.test_stream import KINDS, open_stream, seen
from tests.training.forked import succeed
from tests.training.launched import TWO
from tests.training.runs import assert_equal_bits
from tests.training.shards import write_shards
from unetgn.training.data.mixing import Pass, Standing
from unetgn.training.data.rows import Row, Wanted
from unetgn.training.data.samples import StepBatches
from unetgn.training.data.standing import check_states, standings_of
from unetgn.training.data.stream import ShardStream
from unetgn.training.errors import CheckpointError
from unetgn.training.train import main

KINDS_AND_GZ = (*KINDS, "tar.gz")


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_pass_goes_on_from_every_place_as_it_would_have_gone_on(size: int) -> None:
    """Shards of no, one and several rows (fixed counts, seed 0): all places, and nothing behind is read again."""
    counts, asked = [4, 0, 1, 7, 0], []

    def read(shard: int, wanted: Wanted) -> Iterator[Row]:
        for number in range(counts[shard]):
            if wanted(number, ""):
                asked.append((shard, number))
                yield Row(shard, number, "", {})

    def make(standing: Standing) -> Pass:
        return Pass([3, 1, 0, 4, 2], read, standing, size=size, random=np.random.Generator(np.random.Philox(0)))

    whole = make(Standing(0))
    order, standings = [], [Standing(0)]
    for row in whole:
        order.append((row.shard, row.number))
        standings.append(Standing(0, 0, whole.taken, tuple(whole.finished)))
    assert sorted(order) == [(shard, number) for shard, count in enumerate(counts) for number in range(count)]
    for taken, standing in enumerate(standings):
        asked.clear()
        assert [(row.shard, row.number) for row in make(standing)] == order[taken:]
        assert len(asked) <= len(order) - taken + (size if standing.finished else 0)


def batches_of(stream: ShardStream, which: StepBatches, num_workers: int) -> list[dict[str, torch.Tensor]]:
    return list(stream.loader(which, num_workers=num_workers, pin_memory=False))


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [(kind, 0) for kind in KINDS_AND_GZ]
    # With workers, one of those that are read by row and one of those that are read in sequence.
    + [pytest.param(kind, 2, marks=() if kind in ("parquet", "tar.gz") else pytest.mark.slow) for kind in KINDS_AND_GZ],
)
def test_samples_after_a_resume_are_those_of_the_unbroken_run(kind: str, num_workers: int, tmp_path: Path) -> None:
    """Two ranks, two batches a step, two and a half passes; broken off after each of the first steps, twice."""
    keys: dict[str, Any] = {"random_flip": True, "held_out": 0.2, "shuffle_buffer": 4}
    path = write_shards(tmp_path, kind, count=40, shards=8)
    steps = 5 if num_workers else 8
    wholes, states = [], {step: [] for step in range(1, steps)}
    for rank in range(2):
        stream = open_stream(path, **keys)
        whole = stream.loader(StepBatches(0, steps, 3, 2, rank, 2), num_workers=num_workers, pin_memory=False)
        taken: list[dict[str, torch.Tensor]] = []
        for step in range(1, steps):
            taken += [next(whole), next(whole)]
            states[step].append(json.loads(json.dumps(stream.state(step))))
        wholes.append([*taken, *whole])
    for rank in range(2):
        for step in (1, 2, 4) if num_workers else range(1, steps):
            broken = open_stream(path, **keys)
            broken.check_restore(states[step])
            broken.restore(step, check_states({"ranks": states[step]}))
            middle = min(step + 1, steps - 1)
            found = batches_of(broken, StepBatches(step, middle, 3, 2, rank, 2), num_workers)
            own = [broken.state(middle) if other == rank else state for other, state in enumerate(states[middle])]
            assert own == states[middle]
            again = open_stream(path, **keys)
            again.restore(middle, own)
            found += batches_of(again, StepBatches(middle, steps, 3, 2, rank, 2), num_workers)
            for one, other in zip(wholes[rank][2 * step :], found, strict=True):
                assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_state_is_of_the_step_whatever_was_read_ahead(tmp_path: Path) -> None:
    """Of three batches a step, and with all of the next step's read already."""
    path = write_shards(tmp_path, "tar")
    stream = open_stream(path)
    loader = stream.loader(StepBatches(0, 5, 2, 3, 0, 1), num_workers=0, pin_memory=False)
    first = [next(loader) for _ in range(3)]
    state = stream.state(1)
    ahead = [next(loader) for _ in range(3)]
    assert stream.state(1) == state != stream.state(2)
    stream.restore(1, [stream.state(1)])  # as where a loader has to be started anew
    again = batches_of(stream, StepBatches(1, 2, 2, 3, 0, 1), 0)
    assert seen(again) == seen(ahead) != seen(first)


TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], num_classes: 3,
        dropout: 0.1, norm: {num_groups: 4}}
data: {name: stream, image_size: 8, random_flip: true, shuffle_buffer: 5, held_out: 0.2, held_out_most: 3}
train: {steps: 6, batch_size: 2, gradient_accumulation: 2, log_every: 1, validate_every: 6, trackers: []}
checkpoint: {every: 3}
preview: {every: 0}
"""


def line(folder: Path, path: str, *keys: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    return ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--resume", "auto",
            f"data.path={path}", *keys]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "tar.gz"])
def test_a_run_over_shards_is_resumed_exactly(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_shards(tmp_path / "set", kind)
    assert main(line(tmp_path / "whole", path)) == 0
    assert main(line(tmp_path / "broken", path, "train.steps=4")) == 0
    assert main(line(tmp_path / "broken", path, "data.num_workers=1")) == 0
    assert "approximately" not in caplog.text
    assert_equal_bits(tmp_path / "whole" / "run", tmp_path / "broken" / "run", 6)
    one, other = ((tmp_path / name / "run" / "validation.csv").read_text() for name in ("whole", "broken"))
    assert one.splitlines()[-1] == other.splitlines()[-1]


def test_two_processes_over_shards_are_resumed_exactly(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "set", "tar", count=32, shards=4)
    for name, steps in (("whole", 6), ("broken", 3), ("broken", 6)):
        keys = [f"train.steps={steps}", "train.validate_every=0", "data.num_workers=1"]
        done = succeed(*line(tmp_path / name, path, *keys), launcher=TWO, processes=2)
        assert "approximately" not in done.stderr
        assert "steps over a stream of 4 shards" in done.stdout
    assert_equal_bits(tmp_path / "whole" / "run", tmp_path / "broken" / "run", 6)


def test_other_readers_go_on_approximately_and_say_how_many_there_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_shards(tmp_path / "set", "tar")
    assert main(line(tmp_path, path, "train.steps=3")) == 0
    assert main(line(tmp_path, path, "data.num_workers=2")) == 0
    assert "resumes approximately: step 4 begins a new pass over the shards" in caplog.text
    assert "1 readers (processes × workers) were at work, and now 2" in caplog.text


READER = {"begun": 0, "number": 0, "taken": 3, "finished": [6]}


@pytest.mark.parametrize(
    "state",
    [[], {"readers": []}, {"readers": [1]}, {"readers": [{**READER, "taken": -1}]}, {"readers": [{**READER, "x": 1}]},
     {"readers": [{**READER, "taken": 1e3}]}, {"readers": [{**READER, "finished": ["1"]}]}, {"readers": {"0": READER}},
     {"readers": [{**READER, "finished": 6}]}, {"readers": [{**READER, "begun": True}]}, {"images": 3}, None,
     {"images": 3, "parts": ["a"]}, {"images": 2, "parts": "a"}, {"readers": [{**READER, "number": 2**60}]}],
)  # fmt: skip
def test_what_is_no_state_is_refused(state: Any) -> None:
    for keys in ({"ranks": [state]}, {"ranks": state}, {"ranks": [{"readers": [READER]}], "more": state}):
        with pytest.raises(ValueError, match="it is not as it was written"):
            check_states(keys)


@pytest.mark.parametrize("kind", KINDS_AND_GZ)
@pytest.mark.parametrize(
    "change",
    [{"taken": 2**50}, {"taken": 2**52, "finished": [6, 6, 6, 6]}, {"finished": [2**50]}, {"finished": [6] * 9},
     {"taken": 1, "finished": [6, 6, 6]}, {"taken": 10**8, "finished": [6, 10**8, 6, 6]}],
)  # fmt: skip
def test_more_rows_than_a_shard_can_have_are_refused_before_they_are_counted(
    change: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    stream = open_stream(write_shards(tmp_path, kind))
    states = [{"readers": [{**READER, **change}]}]
    with pytest.raises(CheckpointError, match="said to have"):
        stream.check_restore(check_states({"ranks": states}))
    assert standings_of(states[0])[0].begun == 0


def test_states_of_images_as_an_older_version_wrote_them_are_read() -> None:
    """With 256 digests of many images each, which nothing is compared with."""
    (state,) = check_states({"ranks": [{"images": 7, "parts": ["0123456789abcdef"] * 256}]})
    assert state == {"images": 7, "parts": ""}
    with pytest.raises(ValueError, match="not as it was written"):
        check_states({"ranks": [{"images": 7, "parts": [3]}]})
