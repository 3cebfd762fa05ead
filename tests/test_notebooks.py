"""Runs the code of examples/notebooks cell by cell, in small, and keeps what they print out of the repository."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
# What the cell that is tagged `parameters` gives, in small.
SMALL = {"train": {"STEPS": 4, "SEEDS": range(2)}, "fuse": {"SIZE": 16}, "load": {"SIZE": 8}}


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_there_are_the_three() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one_of_format_4_5_and_holds_no_results(notebook: Path) -> None:
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        assert {"cell_type", "id", "metadata", "source"} <= cell.keys()
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {"__name__": "__main__"}
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, {cell['id']}", "exec"), found)
        if "parameters" in cell["metadata"].get("tags", []):
            given = {name.id for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, ast.Assign)
                     for name in node.targets if isinstance(name, ast.Name)}  # fmt: skip
            assert given == SMALL[notebook.stem].keys()
            found |= SMALL[notebook.stem]
