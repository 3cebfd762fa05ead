"""Kinds of files that attacks were found to get past: each is one line now, whatever its members look like."""

import contextlib
import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.attacks.damage import BOMB, TAGS
from tests.attacks.files import make_diffusers, make_judged, make_latents, make_pretrained, read_judged, read_latents
from unetgn.interop.files import read_checkpoint
from unetgn.sampling import classifier
from unetgn.sampling.sets import EvaluationError
from unetgn.training.config_files import load_config
from unetgn.training.errors import CheckpointError, ConfigError
from unetgn.training.network import load_network
from unetgn.training.power_averages import Snapshot
from unetgn.training.run_directory import COLUMNS, RunDirectory

PLACES = ["{}", "train: {}", "train: {{steps: {}}}", "model: {{channels: {}}}", "data: {{class_names: {}}}", "more: {}"]


def one_line(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("place", PLACES)
def test_yaml_that_unfolds_or_nests_without_end_is_one_line(place: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    deep = ["[" * 2000 + "]" * 2000, "{a: " * 2000 + "1" + "}" * 2000] if place == PLACES[-1] else []
    for value in ["*i", "&z [*z]", "&z {a: *z}", *deep]:
        file.write_text((BOMB if "*i" in value else "") + place.format(value))
        one_line(file)


@pytest.mark.parametrize(
    "text", [": :", "a: [", "a: b: c", "\0", "a: 2001-99-99", f"a: {'9' * 5000}", "a: 0b_", "'", "- a\nb"]
)
def test_what_is_no_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    one_line(tmp_path / "run.yaml")


def test_a_large_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: 1\n" * 10**6)
    one_line(tmp_path / "run.yaml")


MORE_TAGS = ["!!set [a, b]", "!!omap [a, b]", "!!pairs a", "!!map [a]", "!!python/object/new:os.system [true]",
             "!!python/object/apply:os.mkdir [ran]"]  # fmt: skip


@pytest.mark.parametrize("tag", [*TAGS, *MORE_TAGS])
def test_a_tag_in_a_configuration_runs_nothing(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"train:\n  steps: 5\n  learning_rate: {tag}\n")
    if tag == "1:30:00":  # a number to the base of 60, as YAML has them
        assert load_config(tmp_path / "run.yaml").train.learning_rate == 5400
        return
    one_line(tmp_path / "run.yaml")
    assert sorted(os.listdir(tmp_path)) == ["run.yaml"]


def logged(run: RunDirectory) -> list[str]:
    return [row["step"] for row in run.rows("metrics.csv")]


ROWS = [",".join([str(step), *["0.5"] * (len(COLUMNS["metrics.csv"]) - 1)]) for step in range(1, 6)]
HEADER = ",".join(COLUMNS["metrics.csv"])
LOGS = {
    "no header": ([*ROWS], "12345"),
    "a header with a flipped bit": ([HEADER.replace("o", "n", 1), *ROWS], "12345"),
    "a header cut short": ([HEADER[:9], *ROWS], "12345"),
    "a quote": ([HEADER, ROWS[0], '"' + ROWS[1][1:], *ROWS[2:]], "1345"),
    "a quote that is closed": ([HEADER, ROWS[0], '"' + ROWS[1][1:], ROWS[2][:-1] + '"', *ROWS[3:]], "1345"),
    "a long row": ([HEADER, ROWS[0], "2," + "9" * 200_000, *ROWS[2:]], "1345"),
    "a longer row": ([HEADER, ROWS[0], ROWS[1] + ",1", *ROWS[2:]], "1345"),
    "an empty row": ([HEADER, ROWS[0], "", *ROWS[2:]], "1345"),
    "noise": ([HEADER, ROWS[0], "\udcff\0\x1a,,;", *ROWS[2:]], "1345"),
    "nothing": ([], ""),
}


@pytest.mark.parametrize("log", LOGS)
def test_of_a_damaged_log_the_sound_rows_stay(log: str, tmp_path: Path) -> None:
    lines, steps = LOGS[log]
    (tmp_path / "metrics.csv").write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    run = RunDirectory(tmp_path)
    assert "".join(logged(run)) == steps
    assert run.losses("metrics.csv")[0] == [int(step) for step in steps]
    run.resume_logs(9)
    with (tmp_path / "metrics.csv").open(newline="") as rows:
        assert "".join(row["step"] for row in csv.DictReader(rows)) == steps


def test_a_log_of_an_older_version_keeps_its_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n1,0.1,0.5\n2,0.2,0.4\n")
    run = RunDirectory(tmp_path)
    run.resume_logs(1)
    assert run.losses("metrics.csv") == ([1], [0.5])


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself"])
def test_a_log_that_is_no_file_holds_nothing(kind: str, tmp_path: Path) -> None:
    put(kind, tmp_path / "metrics.csv")
    assert RunDirectory(tmp_path).rows("metrics.csv") == []


def put(kind: str, path: Path) -> None:
    """Put something that is no file where one is looked for."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link to nothing": "nowhere", "link to itself": path.name, "link to zeros": "/dev/zero"}[kind])


@pytest.mark.parametrize("make", [make_pretrained, make_diffusers])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself", "link to zeros"])
def test_weights_that_are_no_file_are_one_line(kind: str, make, tmp_path: Path) -> None:
    make(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    put(kind, weights)
    for load in (lambda: load_network(tmp_path), lambda: read_checkpoint(weights)):
        with pytest.raises((ValueError, OSError)) as caught:
            load()
        assert "\n" not in str(caught.value).strip()


EDITS = {
    "missing": lambda tensors, name: tensors.pop(name),
    "NaN": lambda tensors, name: tensors[name].flatten()[-1:].fill_(float("nan")),
    "infinite": lambda tensors, name: tensors[name].flatten()[:1].fill_(float("-inf")),
    "of another shape": lambda tensors, name: tensors.update({name: torch.zeros(7)}),
    "none at all": lambda tensors, name: tensors.clear(),
}


@pytest.mark.parametrize("make", [make_pretrained, make_diffusers])
@pytest.mark.parametrize("edit", EDITS)
def test_weights_that_are_missing_or_not_finite_are_no_network(edit: str, make, tmp_path: Path) -> None:
    make(tmp_path / "sound")
    for name in list(load_file(tmp_path / "sound" / "diffusion_pytorch_model.safetensors"))[:3]:
        folder = Path(shutil.copytree(tmp_path / "sound", tmp_path / name))
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        EDITS[edit](tensors, name)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        with pytest.raises((ValueError, OSError)):
            load_network(folder)


CONFIGS = [{"time": {"order": [None]}}, {"norm": []}, {"channels": {"a": 1}}, {"depth": "x"}, {"channels": [10**9]},
           {"time": 3}, {"num_classes": -1}, {"norm": {"num_groups": 10**30}}, {"spatial_dims": 9},
           {"_diffusers_version": []}]  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_configuration_of_other_types_is_no_network(changes: dict, tmp_path: Path) -> None:
    make_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | changes))
    if "_diffusers_version" in changes:
        load_network(tmp_path)
        return
    with pytest.raises((ValueError, OSError)):
        load_network(tmp_path)


READERS = {
    "a network": read_checkpoint,
    "a classifier": classifier.load,
    "averages": Snapshot.read,
    "latents": lambda file: read_latents(file.parent),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_header_of_any_length_is_a_short_line(reader: str, tmp_path: Path) -> None:
    """What safetensors says of a header repeats it."""
    make_latents(tmp_path)
    file = tmp_path / "latents-00000.safetensors"
    for header in ('{"a": "' + "x" * 100_000 + '"}', '{"a": {"dtype": "' + "y" * 100_000 + '"}}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
        with pytest.raises((ValueError, CheckpointError)) as caught:
            READERS[reader](file)
        assert len(str(caught.value)) < 2000
        assert "\n" not in str(caught.value)


def test_a_picture_of_samples_cut_or_flipped_anywhere_is_an_error_of_ours_or_a_picture(tmp_path: Path) -> None:
    make_judged(tmp_path)
    file = tmp_path / "000001.png"
    whole = file.read_bytes()
    for place in range(len(whole)):
        flipped = [bytes([whole[place] ^ 1 << bit]) for bit in range(8)]
        for damaged in (whole[:place], *(whole[:place] + byte + whole[place + 1 :] for byte in flipped)):
            file.write_bytes(damaged)
            with contextlib.suppress(EvaluationError):
                read_judged(tmp_path)
