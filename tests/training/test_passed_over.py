"""A checkpoint that no run can go on from is passed over and named, however right its sums are."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.training.runs import assert_equal_bits
from tests.training.test_checkpoint import change_manifest
from tests.training.test_hostile_checkpoints import CONTENTS, EDITS, PLACES, seal
from tests.training.test_train import run
from unetgn.training import soundness
from unetgn.training.checkpoint import CONFIGS, TENSORS, put_aside
from unetgn.training.data.images import Digits
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.errors import CheckpointError
from unetgn.training.resume import find_start
from unetgn.training.run_directory import RunDirectory
from unetgn.training.soundness import check_sound

SAMPLES = IndexedSamples(Digits(), np.arange(10), 0)
Edit = Callable[[Path], object]


def contents(name: str, content: bytes) -> Edit:
    """Write a file's contents, and the sum that is right for them."""
    return lambda path: ((path / name).write_bytes(content), seal(path, name))


def tensors(place: str, edit: str) -> Edit:
    def change(path: Path) -> None:
        kind = place.partition(",")[0]
        held = load_file(path / f"{kind}.safetensors")
        EDITS[edit](
            held, next(key for key in held if key.endswith(PLACES[place]) or (kind != "optimizer" and "norm" in key))
        )
        save_file(held, path / f"{kind}.safetensors")
        seal(path, f"{kind}.safetensors")

    return change


def keys(name: str, changes: dict[str, Any]) -> Edit:
    """Change keys of config.json, or of the model in config.yaml."""

    def change(path: Path) -> None:
        read, file = yaml.safe_load((path / name).read_text()), path / name
        (read["model"] if name == "config.yaml" else read).update(changes)
        file.write_text(json.dumps(read))
        seal(path, name)

    return change


def sums(keep: Callable[[str], bool]) -> Edit:
    def change(path: Path) -> None:
        known = json.loads((path / "manifest.json").read_text())["sha256"]
        change_manifest(path, sha256={name: digest for name, digest in known.items() if keep(name)})

    return change


FILES = [*CONFIGS, *(f"{name}.safetensors" for name in TENSORS)]
NESTED = json.loads('{"num_groups": 4, "a": ' + "[" * 60 + "]" * 60 + "}")
CHANGES: list[dict[str, Any]] = [{"channels": [10**9]}, {"depth": 10**6}, {"in_channels": -1}, {"channels": [8, 24]},
                                 {"norm": NESTED}, {"dropout": 10**400}]  # fmt: skip
READERS = {"begun": 0, "number": 0, "taken": 0, "finished": []}
STATES = {
    "of no rank": {"ranks": []},
    "of two ranks": {"ranks": [{}, {}]},
    "deep": {"ranks": [{"readers": [{**READERS, "finished": json.loads("[" * 200 + "]" * 200)}]}]},
    "negative": {"ranks": [{"readers": [{**READERS, "taken": -1}]}]},
}
HOSTILE: dict[str, Edit] = {
    "no sums": sums(lambda name: False),
    **{f"no sum of {file}": sums(lambda name, file=file: name != file) for file in FILES},  # type: ignore[misc]
    **{f"config.yaml with {content}": contents("config.yaml", CONTENTS[content]) for content in CONTENTS},
    **{f"{name} with {content}": contents(name, CONTENTS[content])
       for name, content in (("config.json", "a list"), ("config.json", "no keys"), ("scheduler_config.json", "deep"))},
    # Each file, and each edit: test_hostile_checkpoints.py has all pairs.
    **{f"{place}: {edit}": tensors(place, edit)
       for edit, place in zip(EDITS, cycle(PLACES), strict=False) if edit != "negative"},
    **{f"{name} says {str(changes)[:40]}": keys(name, changes) for name in ("config.yaml", "config.json")
       for changes in CHANGES},
    "config.yaml with a key without end": keys("config.yaml", {"x" * 2**18: 1}),
    **{f"samples {name}": contents("samples.json", json.dumps(state).encode()) for name, state in STATES.items()},
    "samples of many lists": contents("samples.json", b'{"ranks": [{"readers": [[' + b"[]," * 2**19 + b"[]]]}]}"),
    "a scale of half a step": lambda path: change_manifest(path, scaler={
        "scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 0.5, "_growth_tracker": 0}),
    "a scale beyond float32": lambda path: change_manifest(path, scaler={
        "scale": 1e300, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0}),
}  # fmt: skip


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> RunDirectory:
    """Return a run whose newest checkpoints are of the steps 4 and 6."""
    for name in ("step-000004", "step-000006"):
        shutil.copytree(finished / "checkpoints" / name, tmp_path / "run" / "checkpoints" / name)
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_no_run_can_go_on_from_is_passed_over_in_one_line(
    hostile: str, output: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    HOSTILE[hostile](output.checkpoints / "step-000006")
    with caplog.at_level(logging.WARNING):
        found = find_start(output, "auto", lambda checkpoint: check_sound(checkpoint, SAMPLES))
    assert found is not None
    assert found.step == 4
    (said,) = [record.getMessage() for record in caplog.records if "passing over" in record.getMessage()]
    assert "step-000006" in said
    assert "\n" not in said
    assert len(said) < 2500


@pytest.mark.parametrize(("hostile", "why"), [("no sums", "damaged"), ("model: missing", "damaged"), (None, "left")])
def test_what_is_put_aside_is_called_what_it_is(hostile: str | None, why: str, output: RunDirectory) -> None:
    if hostile is not None:
        HOSTILE[hostile](output.checkpoints / "step-000006")
    put_aside(output.checkpoints, 4, lambda checkpoint: check_sound(checkpoint, SAMPLES))
    assert sorted(path.name for path in output.checkpoints.iterdir()) == ["step-000004", f"step-000006.{why}"]


@pytest.mark.parametrize("hostile", ["no sums", "optimizer, squares: integers"])
def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_end(hostile: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    HOSTILE[hostile](tmp_path / "run" / "checkpoints" / "step-000006")
    assert run(tmp_path / "run" / "config.yaml", tmp_path / "run", "--resume", "auto") == 0
    assert_equal_bits(finished, tmp_path / "run", 6)


def test_what_a_newer_version_wrote_and_this_one_cannot_read_is_not_passed_over(
    output: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on from an older one and delete it."""
    newest = output.checkpoints / "step-000006"
    text = (newest / "config.yaml").read_text()
    (newest / "config.yaml").write_text(text.replace("train:\n", "train:\n  new_key: 1\n"))
    seal(newest, "config.yaml")
    change_manifest(newest, unetgn_version="99.1")
    with pytest.raises(CheckpointError, match=r"new_key.* \(unetgn 99\.1 wrote it, and this is "):
        find_start(output, "auto", lambda checkpoint: check_sound(checkpoint, SAMPLES))
    put_aside(output.checkpoints, 4, lambda checkpoint: check_sound(checkpoint, SAMPLES))
    assert (output.checkpoints / "step-000006.other-version").is_dir()


def test_a_configuration_that_cannot_be_read_this_time_is_no_damage(
    output: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise soundness.ConfigError("cannot be read") from OSError(5, "Input/output error")

    monkeypatch.setattr(soundness, "load_config", fail)
    with pytest.raises(OSError, match=re.escape("[Errno 5] Input/output error")):
        find_start(output, "auto", lambda checkpoint: check_sound(checkpoint, SAMPLES))
