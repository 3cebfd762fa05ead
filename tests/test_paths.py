"""Every path that a program writes to is looked at before its work begins, whichever program it is."""

import argparse
import ast
import importlib
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.structure.imports import ROOT, modules
from unetgn.programs.paths import check_file, check_folder, file_to_write, folder_to_write, user_path
from unetgn.training.train import main as train

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8], depth: 1, attention_levels: [],
        norm: {num_groups: 4}}
train: {steps: 1, batch_size: 4, trackers: []}
checkpoint: {every: 1}
preview: {every: 0}
"""
OPTIONS = {"--out", "--output", "out"}

# By module: the line before the path, whether the path is a file or a folder, and what must not be called.
PROGRAMS: dict[str, tuple[str, str, str]] = {
    "unetgn.training.train": ("--config digits8_ddpm --output", "folder", "prepare_samples"),
    "unetgn.training.average": ("--run nowhere --width 0.1 --out", "folder", "average"),
    "unetgn.training.cache_latents": ("--autoencoder nowhere --out", "folder", "open_source"),
    "unetgn.interop.convert_files": ("nowhere", "folder", "read"),
    "unetgn.sampling.options": ("--checkpoint RUN --seeds 0 --steps 2 --out", "folder", "make_images"),
    "unetgn.sampling.judge_options": ("--checkpoint nowhere --out", "file", "make_judge"),
    "unetgn.sampling.train_classifier": ("--config digits8_ddpm --out", "file", "train_classifier"),
    "benchmarks.cpu_core": ("--out", "file", "measure"),
    "benchmarks.host_overhead": ("--out", "file", "measure"),
    "benchmarks.host_triton": ("--out", "file", "pretend"),
    "benchmarks.normalization": ("--out", "file", "train"),
    "benchmarks.unet_step": ("--out", "file", "measure"),
    "benchmarks.train": ("--out", "file", "prepare"),
    "benchmarks.sample": ("--out", "file", "compare"),
    "benchmarks.memory": ("--out", "file", "measure"),
    "benchmarks.startup": ("--out", "file", "measure"),
    "benchmarks.reach": ("nowhere --output", "file", "judge"),
    "benchmarks.group_norm_silu.__main__": ("--commit abc --output", "folder", "find_gpu"),
    "benchmarks.gpu.__main__": ("--out", "folder", "Supervisor"),
    "examples.captions": ("--out", "file", "main"),
    "examples.fuse_diffusers": ("--out", "folder", "main"),
    "examples.segment_2d": ("--out", "file", "main"),
    "examples.signals_1d": ("--out", "file", "main"),
    "examples.sweep": ("--config digits8_ddpm train.steps=1 --out", "folder", "main"),
    "examples.volumes_3d": ("--out", "file", "main"),
}
RUN_BY = {
    "unetgn.sampling.options": "unetgn.sampling.sample",
    "unetgn.sampling.judge_options": "unetgn.sampling.evaluate",
}
SHARED = "benchmarks.record"  # adds the option for the programs that call its `add_out`
# What writes where a constant says: what must not be called where no file can be written there.
FIXED = {
    "benchmarks.fuse_coverage": "coverage",
    "benchmarks.fuse_libraries": "count_apart",
    "benchmarks.kernel_counts": "launches",
}


def with_outputs() -> set[str]:
    """Find the modules that add an option for a path to write to."""
    found = set()
    for name, file in modules().items():
        if name == SHARED or not {"add_argument", "add_out"} & set(re.findall(r"\w+", text := file.read_text())):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                names = {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
                found |= {f"{name}.__main__" if file.stem == "__init__" else name} if names & OPTIONS else set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_out":
                found.add(name)
    return found


def test_every_program_that_writes_is_among_these() -> None:
    assert with_outputs() == set(PROGRAMS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY)
    assert train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def wrong_places(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """Make what no file, or no folder, can be written at."""
    (folder / "folder").mkdir()
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "not mounted")
    below = (folder / "file" / "deeper", "is a file")
    return {
        "file": [(folder / "folder", "is a folder"), below, (folder / "pipe", "is no file"),
                 (folder / "link" / "x.json", "which is not there")],
        "folder": [(folder / "file", "is a file"), below, (folder / "link", "which is not there")],
    }  # fmt: skip


def start(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, work: str) -> int:
    """Run a program whose work fails the test; return its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name.startswith("examples."):  # whose work begins after the arguments are read
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"{name.replace('.', '/')}.py"), run_name="__main__")
        return int(ended.value.code or 0)
    program: Any = importlib.import_module(RUN_BY.get(name, name))
    monkeypatch.setattr(program, work, lambda *_, **__: pytest.fail("the work began"))
    try:
        return int(program.main(arguments) or 0)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_cannot_be_written_is_said_before_the_work_begins(
    name: str, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, kind, work = PROGRAMS[name]
    before = line.replace("RUN", str(run)).split()
    places = wrong_places(tmp_path)[kind]
    there = sorted(tmp_path.rglob("*"))
    for path, words in places:
        assert start(name, [*before, str(path)], monkeypatch, work) == 2, path
        said = capsys.readouterr().err
        assert words in said or (name == "benchmarks.gpu.__main__" and "is no folder" in said)
        assert str(tmp_path) in said
    monkeypatch.setattr("os.access", lambda *_: False)  # which nothing denies to root
    assert start(name, [*before, str(tmp_path / "new" / "place")], monkeypatch, work) == 2
    assert "permits it not" in capsys.readouterr().err
    if name == "benchmarks.gpu.__main__":
        there += [tmp_path / "new", tmp_path / "new" / "place"]
    assert sorted(tmp_path.rglob("*")) == sorted(there)


@pytest.mark.parametrize("name", FIXED)
def test_a_file_that_a_constant_names_is_looked_at_before_the_work_begins(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert start(name, [], monkeypatch, FIXED[name]) == 2
    assert "permits it not" in capsys.readouterr().err


class Begun(Exception):
    """Ends a program whose work has begun."""


def begin(*_: Any, **__: Any) -> None:
    """Be the work."""
    raise Begun


WORKS = {name: work for name, (_, _, work) in PROGRAMS.items()} | FIXED
LINES = {
    (f"{module}.__main__" if f"{module}.__main__" in WORKS else module, *arguments.split())
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    if document.name != "CHANGELOG.md"  # which names what was
    for module, arguments in re.findall(r"`python -m (benchmarks\.\w+)([^`]*)`", document.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("line", sorted(line for line in LINES if line[0] in WORKS), ids=" ".join)
def test_a_line_of_a_benchmark_in_a_document_has_what_the_program_asks_for(
    line: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those within a sentence; tests/test_readme.py runs what stands in blocks."""
    (tmp_path / "CONFIGS").write_text('[{"name": "", "class": "", "config": {}}]')
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)
    name, *arguments = line
    program: Any = importlib.import_module(name)
    monkeypatch.setattr(program, WORKS[name], begin)
    with pytest.raises(Begun):
        program.main(arguments)


@pytest.mark.parametrize("parse", [file_to_write, folder_to_write])
def test_what_can_be_written_is_taken_and_nothing_is_made(parse: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "new", tmp_path / "there" / "new", tmp_path / "many" / "new" / "ones"):
        assert parse(str(path)) == path
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(argparse.ArgumentTypeError, match="the path is empty"):
        parse("")


@pytest.mark.parametrize("parse", [user_path, file_to_write, folder_to_write])
def test_an_empty_path_is_refused_in_words(parse: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", type=parse)
    with pytest.raises(SystemExit):
        parser.parse_args(["--path", ""])
    assert "argument --path: the path is empty; the current folder is ." in capsys.readouterr().err


def test_a_file_or_a_folder_that_is_there_is_taken_again_and_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_file(tmp_path / "file")
    check_folder(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="a name of 300 bytes: give one of 230"):
        file_to_write(str(tmp_path / ("x" * 300)))
