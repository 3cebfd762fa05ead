"""Where a run lies: on two disks, behind links, in a folder that it is not to have, under a terminal of few letters."""

import ast
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.training.launched import ROOT, TRAIN
from tests.training.loops import Runs
from tests.training.runs import assert_equal_bits, status
from tests.training.test_train import run
from unetgn.training import rescue, train
from unetgn.training.checkpoint import Checkpoint, list_checkpoints, run_of
from unetgn.training.errors import CheckpointError, ConfigError, RunDirectoryError
from unetgn.training.run_directory import LOCK, RunDirectory


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder of another file system, to which nothing can be renamed."""
    folder = Path("/dev/shm") / f"unetgn-{os.getpid()}-{tmp_path.name}"
    if not folder.parent.is_dir() or folder.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this system has no second disk")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("moved", ["checkpoints", "checkpoints/step-000003", "."])
@pytest.mark.parametrize("resume", ["auto", "checkpoints/step-000003", "latest"])
def test_a_run_that_lies_on_two_disks_goes_on_as_one_that_does_not(
    moved: str, resume: str, runs: Runs, unbroken: Path, tmp_path: Path, other_disk: Path
) -> None:
    output = shutil.copytree(unbroken, tmp_path / "broken")
    for step in (4, 5, 6):
        shutil.rmtree(output / "checkpoints" / f"step-00000{step}")
    shutil.move(output / moved, other_disk / "moved")
    (output / moved).symlink_to(other_disk / "moved")
    (tmp_path / "latest").symlink_to(output / "checkpoints" / "step-000003")
    there = {"auto": "auto", "latest": str(tmp_path / "latest")}.get(resume, str(output / resume))
    runs.run("broken", "checkpoint.every=2", "checkpoint.keep=1", resume=there)
    assert_equal_bits(unbroken, output, 6)
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step-000006"]
    assert run_of(Checkpoint.read(output / "checkpoints" / "step-000006")).resolve() == output.resolve()
    assert (output / moved).is_symlink() == ("step" not in moved)
    if "step" in moved:  # the link is deleted; what lies elsewhere is not ours
        assert (other_disk / "moved" / "model.safetensors").is_file()


@pytest.mark.parametrize("gone", ["broken", "broken/checkpoints", "broken/checkpoints/step-000006"])
def test_a_disk_that_is_not_there_is_said_and_nothing_is_changed(
    gone: str, runs: Runs, unbroken: Path, tmp_path: Path
) -> None:
    """Else a run would begin anew, or from an older step, and at last delete the link."""
    output = shutil.copytree(unbroken, tmp_path / "broken")
    shutil.move(tmp_path / gone, tmp_path / "unmounted")
    (tmp_path / gone).symlink_to(tmp_path / "mount")
    with pytest.raises((RunDirectoryError, OSError), match=r"is a link to .*, which is not there"):
        runs.run("broken", resume="auto")
    assert (tmp_path / gone).is_symlink()
    if gone.endswith("6"):
        assert len(list(output.glob("checkpoints/*"))) == 6


@pytest.mark.parametrize("folder", ["run", "not/there/run", "there"])
@pytest.mark.parametrize("refusal", ["find_start", "load_initial_weights", "TrainState", "put_aside", "print"])
def test_a_start_that_is_refused_leaves_everything_as_it_was(
    refusal: str, folder: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever refuses it, and whether the folder was there."""
    (tmp_path / "there").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise BrokenPipeError if refusal == "print" else ConfigError("no")

    monkeypatch.setattr(train, refusal, refuse, raising=False)
    assert run(finished.parent / "tiny.yaml", tmp_path / folder) == (1 if refusal == "print" else 2)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_resume_that_is_refused_puts_nothing_aside(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(finished, tmp_path / "a")

    def refuse(*_: object) -> None:
        raise CheckpointError("of another network")

    monkeypatch.setattr(train.TrainState, "restore", refuse)
    older = str(output / "checkpoints" / "step-000002")
    assert run(finished.parent / "tiny.yaml", output, "--resume", older) == 2
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == [
        f"step-00000{step}" for step in (2, 4, 6)
    ]
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_a_lock_that_a_refused_start_took_away_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its opening and its locking: two runs would hold two files of one name."""
    real, first = fcntl.lockf, []

    def lockf(file: object, how: int) -> None:
        if not first:
            first.append(file)
            (tmp_path / "a" / LOCK).unlink()
        real(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "lockf", lockf)
    run_directory = RunDirectory(tmp_path / "a")
    run_directory.lock()
    assert run_directory._lock is not first[0]
    assert os.path.samestat((tmp_path / "a" / LOCK).stat(), os.fstat(run_directory._lock.fileno()))
    run_directory.unlock()


@pytest.mark.parametrize("file", sorted((ROOT / "unetgn/training").glob("*.py")), ids=lambda file: file.name)
def test_every_text_file_of_a_run_is_in_utf_8(file: Path) -> None:
    """Whatever the terminal's letters are."""
    for node in ast.walk(ast.parse(file.read_text())):
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if name in ("read_text", "write_text") or (name == "open" and "b" not in mode(node)):
            assert any(word.arg == "encoding" for word in node.keywords), ast.unparse(node)


def mode(call: ast.Call) -> str:
    """Return the mode in which a call of a path's `open` opens it; of os.open, which knows none, "b"."""
    if ast.unparse(call.func) == "os.open":
        return "b"
    return next((str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)), "")


@pytest.mark.thorough
def test_a_terminal_that_knows_ascii_only_is_spoken_to(finished: Path, tmp_path: Path) -> None:
    """What it has no letters for is written with others; the files are what they are elsewhere."""
    output = tmp_path / "ähnlich"
    given = ["--config", str(finished.parent / "tiny.yaml"), "--output", str(output), "preview.every=0"]
    program = """
import runpy, sys
script, *given = sys.argv[1:]
for arguments in (["--help"], given):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end
"""
    few = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = os.environ | few | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(TRAIN), *given], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"key=value" in done.stdout
    assert b"8 ? 1 accumulated" in done.stdout
    assert status(output)["state"] == "completed"
    assert_equal_bits(finished, output, 6)


@pytest.mark.parametrize("kind", ["a link to a file", "a pipe", "a folder"])
def test_a_lock_that_is_no_file_is_refused_and_nothing_behind_it_is_changed(kind: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text("somebody's")
    if kind == "a pipe":
        os.mkfifo(run / LOCK)
    elif kind == "a folder":
        (run / LOCK).mkdir()
    else:
        (run / LOCK).symlink_to(other)
    with pytest.raises(RunDirectoryError, match=r"cannot be written .*; remove .*/\.lock, which has to be a file, or"):
        RunDirectory(run).lock()
    assert other.read_text() == "somebody's"


def test_several_ranks_that_lost_the_others_write_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one writes; the others go on once it is there, and say so where it never comes."""
    path = tmp_path / "checkpoints" / "step-000003"
    assert rescue.may_write(path)
    monkeypatch.setattr(rescue, "LONGEST_SAVE", 0.1)
    assert not rescue.may_write(path)
    monkeypatch.setattr(rescue, "LONGEST_SAVE", 60.0)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(rescue.may_write, path) for _ in range(3)]
        path.mkdir()
        assert all(other.result(timeout=10) for other in others)


@pytest.mark.parametrize("name", ["step-²", "step-٣", "step-", "step-x"])
def test_a_folder_whose_name_has_no_number_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
