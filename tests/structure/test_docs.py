"""Documents name files that are there."""

import re
from pathlib import Path

import pytest

from tests.structure.imports import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
FOLDERS = (
    ROOT,
    ROOT / "unetgn",
    ROOT / "unetgn" / "ops",
    ROOT / "unetgn" / "ops" / "triton",
)  # that a path may begin from
HISTORY = "CHANGELOG.md"  # names what was


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != HISTORY], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_the_files_that_a_document_names_are_there(document: Path):
    named = set(re.findall(r"[\w*]+(?:/[\w*]+)+\.py\b", document.read_text()))
    assert not [name for name in named if not any(list(folder.glob(name)) for folder in FOLDERS)]


def test_the_tests_that_hold_a_promise_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []


def test_the_glossary_is_in_order():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [row.lower().replace("-", "").replace("_", "") for row in rows if row.strip("- ") and row != "word"]
    assert len(words) > 40
    assert words == sorted(words)
