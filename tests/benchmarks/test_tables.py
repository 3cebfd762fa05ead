"""README's table, the documentation's page and the plot come from the JSON files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record, tables

HEAD = {"device": "Made Up", "threads": 2, "torch": "2.x", "commit": "c" * 40}
ONE = {"ratio": 0.5, "ratio_quartiles": [0.25, 0.75], "seconds": 1.5, "seconds_above": 0.125}
RATES = {"images_per_second": {"theirs": 10.0, "ours": 20.0}}
CASE = {"network": "cifar10", "layout": "contiguous", "dtype": "float32"}
STEP = {**CASE, "batch": 4, "contender": "ours", **ONE, "kept_bytes": 2**21, "kept_ratio": 0.625, "peak_bytes": 2**23}
POINTS = [(1, 32), (4, 32), (1, 64)]
HELD = {"kept_bytes": 2**21, "step_bytes": 3 * 2**20}
MADE_UP: dict[str, list[dict[str, Any]]] = {
    "unet_step": [STEP, {**CASE, "contender": "MONAI", "absent": "it is not installed"}],
    "unet_step_compiled": [
        {**CASE, "batch": 4, "contender": "ours, compiled", **ONE, "kept_bytes": 2**22, "kept_ratio": 1.25}
    ],
    "train_compiled": [{"processes": 1, **ONE, **RATES}],
    "train": [{"processes": 2, **ONE, **RATES}],
    "sample": [{"what": "program", "images": 1000, "batch": 64, "size": 8, **ONE, **RATES}],
    "memory": [{"contender": "ours", "batch": batch, "size": size, **HELD} for batch, size in POINTS],
    "startup": [{"what": "unetgn.UNet", "compared_with": "torch", **ONE}],
}
PARTS = {"convolutions": {"seconds": 0.5, "at_best": 0.25}, "norms": {"seconds": 0.125}}


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder of results, one file a program."""
    for program, rows in MADE_UP.items():
        result = {**HEAD, "rows": rows, "parts": [{**CASE, "contender": "ours", "parts": PARTS}]}
        (tmp_path / f"{program}_Made_Up.json").write_text(json.dumps(result))
    return tmp_path


def test_readme_has_the_table_that_the_results_make():
    """After a new measurement: `python -m benchmarks.tables --write`."""
    text = tables.README.read_text(encoding="utf-8")
    assert tables.replaced(text, tables.readme(tables.results())) == text


def test_readme_says_the_machine_the_figures_and_what_is_not_measured(made_up: Path):
    text = tables.readme(tables.results(made_up))
    assert "| Made Up |" in text.splitlines()[0]
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert rows["a training step of CIFAR-10's network: time, bytes kept for backward"] == "0.50 (0.25–0.75), 0.62"
    assert rows["`training/train.py` and the loop of diffusers' example, 2 processes: time"] == "0.50 (0.25–0.75)"
    (compiled,) = (value for what, value in rows.items() if "compiled, of diffusers' uncompiled" in what)
    assert compiled == "0.50 (0.25–0.75), 1.25"
    assert rows["`unetgn.UNet`: import, after torch"] == "0.12 s"
    assert rows["`training/train.py` and the loop of diffusers' example, 1 process: time"] == tables.NOT_YET
    assert text.endswith("2 threads, torch 2.x, commit cccccccccc.")


def test_readme_leaves_out_of_a_machine_what_another_has_measured(made_up: Path):
    other = {**HEAD, "device": "Another", "rows": [{"processes": 1, **ONE, **RATES}]}
    (made_up / "train_Another.json").write_text(json.dumps(other))
    first, another = tables.readme(tables.results(made_up)).split("| Another |")
    line = "`training/train.py` and the loop of diffusers' example, {}: time | {} |"
    assert line.format("1 process", "0.50 (0.25–0.75)") in another
    assert "2 processes" not in another
    assert line.format("2 processes", "0.50 (0.25–0.75)") in first
    assert "example, 1 process:" not in first


def test_without_results_nothing_is_measured_yet(tmp_path: Path):
    text = tables.readme(tables.results(tmp_path))
    assert text.count(tables.NOT_YET) == len(list(tables.summary_rows()))
    assert "\n\n".join(tables.pages(tables.results(tmp_path))).count("Not measured yet.") == len(tables.PROGRAMS)


def test_the_page_has_every_row_of_every_program(made_up: Path):
    text = "\n\n".join(tables.pages(tables.results(made_up)))
    for line in [
        "On Made Up, 2 threads, torch 2.x, commit cccccccccc.",
        "| 2 | 10.0 | 20.0 | 0.50 (0.25–0.75) |",
        "| 1000 images, whole program | 64 | 8×8 | 10.00 | 20.00 | 0.50 (0.25–0.75) |",
        "| cifar10, batch 4 | contiguous | float32 | ours | 1500.0 | 0.50 (0.25–0.75) | 2 (0.62) | 8 |",
        "| cifar10 | contiguous | float32 | MONAI | it is not installed |  |  |  |",
        "| cifar10, batch 4 | contiguous | float32 | ours, compiled | 1500.0 | 0.50 (0.25–0.75) | 4 (1.25) |  |",
        "| cifar10 | ours | 500.0 (250.0) | 125.0 |",
        "| ours | 3 (2) | 3 (2) | 3 (2) |",
        "| unetgn.UNet | 1.50 | torch | +0.12 | 0.50 (0.25–0.75) |",
    ]:
        assert line in text
    assert tables.NOT_YET.capitalize() not in text


def test_the_documentation_takes_its_page_from_there(made_up: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mkdocs")
    from docs import hooks

    found = tables.results(made_up)
    monkeypatch.setattr(tables, "results", lambda: found)
    assert "\n\n".join(tables.pages(found)) in hooks.benchmarks()


def test_the_plot_is_drawn_from_the_rows(made_up: Path):
    tables.draw_memory(tables.results(made_up)["Made Up"]["memory"], made_up / "memory.png")
    assert (made_up / "memory.png").stat().st_size > 1000


def test_a_readme_without_its_marks_is_not_written():
    with pytest.raises(ValueError, match="put these two lines back"):
        tables.replaced("# unetgn\n", "a table")


def test_where_figures_cannot_be_written_the_program_ends_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from benchmarks import memory

    (tmp_path / "file").touch()
    for out, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "out.json", "is a file")):
        with pytest.raises(SystemExit):
            memory.main(["--quick", "--out", str(out)])
        assert words in capsys.readouterr().err


def test_a_result_says_what_made_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(record.COMMIT_VARIABLE, "abc")
    found = record.head("train", packages=("torch", "no-such-package"))
    assert set(found) == {"device", "threads", "torch", "python", "commit", "command", "load_average"}
    assert found["commit"] == "abc"
    assert found["command"].startswith("python -m benchmarks.train")
