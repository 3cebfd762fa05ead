"""Documents name files that are there; tests/test_docs.py follows their links in the built site."""

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


def anchors(document: Path) -> set[str]:
    """Give the anchors that a forge makes of the headings: lower case, a hyphen for a space, without other signs."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_images_lead_to_files_where_the_document_lies(document: Path):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.S | re.M)
    links = [link for link in re.findall(r"\]\(([^\s()]+)\)", text) if not re.match(r"\w+:", link)]
    assert len(links) == len(re.findall(r"\]\((?!\w+:)", text))  # none is written in a way that is not read here
    lead = {link: (document.parent / link.partition("#")[0] if link[0] != "#" else document) for link in links}
    assert [link for link, path in lead.items() if not path.exists()] == []
    assert [link for link, path in lead.items() if "#" in link and link.partition("#")[2] not in anchors(path)] == []


def test_the_tests_that_hold_a_promise_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []


def test_the_glossary_is_in_order():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [row.lower().replace("-", "").replace("_", "") for row in rows if row.strip("- ") and row != "word"]
    assert len(words) > 40
    assert words == sorted(words)
