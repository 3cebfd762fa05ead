"""What a resume would take from a run's folder is there until the run has saved anew; what is no file of ours stays."""

import shutil
from pathlib import Path

import pytest

from tests.traced import peak_of
from tests.training.runs import assert_equal_bits, losses, rows
from tests.training.test_train import run
from unetgn.training import run_directory
from unetgn.training.files import delete, writing
from unetgn.training.loop import Loop
from unetgn.training.run_directory import LONGEST_ROW, RunDirectory


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("links", [True, False])
def test_rows_after_a_resume_stay_beside_the_log_until_the_run_has_saved(
    links: bool, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    if not links:  # as some disks have none
        monkeypatch.setattr(run_directory.os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "none")))
    line = folder / "config.yaml", folder, "--resume", str(folder / "checkpoints" / "step-000002")
    before = (folder / "metrics.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "next_step", stop)
        patch.setattr(Loop, "rescue", lambda self, words, save: words)
        for _ in range(2):  # the second time there is one already
            assert run(*line) == 1
            assert (folder / "metrics.csv.left").read_bytes() == before
            assert [row["step"] for row in rows(folder)] == ["1", "2"]
            assert sorted(path.name for path in (folder / "checkpoints").iterdir())[1:] == [
                "step-000004.left", "step-000006.left"]  # fmt: skip
    assert run(*line) == 0
    assert not list(folder.glob("*.left*")) + list(folder.glob("checkpoints/*.left*"))
    assert losses(folder) == losses(finished)
    assert_equal_bits(folder, finished, 6)


def test_a_run_that_was_killed_after_its_last_save_deletes_what_that_save_would_have(
    finished: Path, tmp_path: Path
) -> None:
    """What lies beside it of steps that it has not made anew stays: nobody has saved since."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    checkpoints, averages = folder / "checkpoints", folder / "averages"
    for name in ("step-000001", "step-000006.damaged", "step-000004.left1", "step-000008.left"):
        shutil.copytree(checkpoints / "step-000002", checkpoints / name)
    averages.mkdir()
    for pictures in ("samples", "denoise", "averages", "checkpoints"):  # what a kill in the middle of a write leaves
        (folder / pictures / ".tmp-1-a.png").write_text("half")
    for number in (4, 8):
        (averages / f"step-00000{number}.safetensors.left").touch()
    header = ",".join(run_directory.COLUMNS["validation.csv"])
    (folder / "metrics.csv.left").write_bytes((folder / "metrics.csv").read_bytes())
    (folder / "validation.csv.left").write_text(f"{header}\n6,0.5\n8,0.5\n")
    assert run(folder / "config.yaml", folder, "--resume", "auto", "checkpoint.keep=2") == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000004", "step-000006", "step-000008.left"]
    assert [path.name for path in averages.iterdir()] == ["step-000008.safetensors.left"]
    assert not [*folder.rglob(".tmp-*")]
    assert [path.name for path in folder.glob("*.left")] == ["validation.csv.left"]


def test_rows_of_levels_come_again_with_the_row_that_a_kill_kept_from_validation(tmp_path: Path) -> None:
    names = {name: ",".join(run_directory.COLUMNS[name]) for name in ("levels.csv", "validation.csv")}
    (tmp_path / "validation.csv").write_text(f"{names['validation.csv']}\n3,0.5\n")
    (tmp_path / "levels.csv").write_text(f"{names['levels.csv']}\n3,0.5{',0.5' * 10}\n6,0.25{',0.25' * 10}\n")
    RunDirectory(tmp_path).resume_logs(6)
    assert [row["step"] for row in rows(tmp_path, "levels.csv")] == ["3"]


END = "5,0.1,0.5,0.1,0.1,9.0,0.1,0.1"


@pytest.mark.parametrize("more", [0, 1, LONGEST_ROW, LONGEST_ROW + 1, 2 * LONGEST_ROW + 1, 3 * LONGEST_ROW - len(END)])
def test_of_a_line_without_end_no_piece_is_taken_for_a_row(more: int, tmp_path: Path) -> None:
    """Wherever it is cut: a piece that begins as a row does is none."""
    header = ",".join(run_directory.COLUMNS["metrics.csv"])
    long = "9" * (LONGEST_ROW + more) + END
    (tmp_path / "metrics.csv").write_text(f"{header}\n{long}\n{END}\n{long}")
    assert [row["step"] for row in RunDirectory(tmp_path).rows("metrics.csv")] == ["5"]


@pytest.mark.parametrize("holds", ["zeros", "line ends", "commas"])
def test_a_log_of_any_size_takes_no_memory(holds: str, tmp_path: Path) -> None:
    with (tmp_path / "metrics.csv").open("wb") as file:
        for _ in range(12):
            file.write({"zeros": b"\0" * 2, "line ends": b"\n" * 2, "commas": b",\n"}[holds] * 2**19)
    found: list[object] = []
    assert peak_of(lambda: found.append(RunDirectory(tmp_path).rows("metrics.csv"))) < 2**20
    assert found == [[]]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_of_another_kind_and_in_the_way_is_put_aside_and_said(
    there: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice, each time under a name of its own; a file before a folder, and a folder before a file."""
    for number in ("", "1"):
        path = tmp_path / "a"
        delete(path)
        precious = path if there == "file" else path / "b"
        precious.parent.mkdir(exist_ok=True)
        precious.write_text(f"precious{number}")
        with writing(path) as unfinished:
            unfinished.mkdir() if there == "file" else unfinished.write_text("new")
        aside = tmp_path / f"a.in-the-way{number}"
        assert (aside if there == "file" else aside / "b").read_text() == f"precious{number}"
        assert path.is_dir() == (there == "file")
        assert f"{path} was a {there}, in the way of what is written: it is now {aside.name}" in caplog.text


def test_a_file_in_the_place_of_a_checkpoint_stays(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    (folder / "checkpoints" / "step-000006").write_text("precious")
    assert run(folder / "config.yaml", folder, "--resume", "auto") == 0
    assert (folder / "checkpoints" / "step-000006.in-the-way").read_text() == "precious"
    assert_equal_bits(folder, finished, 6)


def test_a_row_that_cannot_be_written_waits_and_comes_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, failing = RunDirectory(tmp_path), [True, True, False]
    real = run_directory.append

    def append(file: Path, text: bytes) -> None:
        if failing and failing.pop(0):
            raise OSError(28, "No space left on device")
        real(file, text)

    monkeypatch.setattr(run_directory, "append", append)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            log.log("validation.csv", {"step": step, "loss": 0.5})
    log.log("validation.csv", {"step": 3, "loss": 0.5})
    log.write_rows()
    assert (tmp_path / "validation.csv").read_text().split() == ["1,0.5", "2,0.5", "3,0.5"]
