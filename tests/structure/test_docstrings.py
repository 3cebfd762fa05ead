"""Docstrings say what a thing does, beginning with a verb.

Of functions and methods the first word is one of verbs.txt: add yours, if it is an imperative ("Return True where …").
Those of modules, classes and properties may also state it ("Holds the sizes of one call"), but begin with no word that
makes a riddle or a label of them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.imports import ROOT

FOLDERS = ("unetgn", "training", "sampling", "benchmarks")
LABELS = {
    "What", "Whether", "Where", "Which", "How", "Who", "Whom", "Whose", "When", "Why", "The", "A", "An", "One", "Two",
    "All", "Each", "Every", "Everything", "Everybody", "This", "These", "That", "Those", "Nothing", "Such", "Some",
    "Any", "Both", "It",
}  # fmt: skip
LISTED = Path(__file__).with_name("verbs.txt").read_text().split()
VERBS = set(LISTED)

Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Find the docstrings that begin with something else: their lines and first words."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, Node) else None
        if text is None:
            continue
        first = text.split()[0].rstrip(".,:;")
        line = 1 if isinstance(node, ast.Module) else node.lineno  # type: ignore[attr-defined]
        if first in LABELS or not first[0].isupper() or (_is_a_function(node) and first not in VERBS):
            yield line, first


def _is_a_function(node: ast.AST) -> bool:
    """Return True for functions and methods, and False for properties, which are read as values."""
    decorators = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())}
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not decorators & {"property", "cached_property"}


def test_docstrings_begin_with_a_verb():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)}:{line} begins with {word!r}"
        for path in files
        for line, word in faults(path.read_text())
    ]
    assert not found, "begin these with a verb; if it is one, add it to verbs.txt:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('"""What this is."""', ["What"]),
        ('"""Adds."""\ndef f():\n    """The sum."""', ["The"]),
        ('"""Adds."""\ndef f():\n    """Sum of both."""', ["Sum"]),
        ('"""Adds."""\ndef f():\n    """Add both."""', []),
        ('"""Adds."""\nclass C:\n    @property\n    def s(self):\n        """Sum of both."""', []),
        ('"""Adds."""\nclass C:\n    """A sum."""', ["A"]),
        ('"""(N, C) values."""', ["(N"]),
        ("def f(): pass", []),
    ],
)
def test_the_check_sees_a_label_and_lets_a_verb_pass(source: str, words: list[str]):
    assert [word for _, word in faults(source)] == words


def test_the_verbs_are_used_and_stand_in_order():
    used = {
        text.split()[0].rstrip(".,:;")
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if _is_a_function(node) and (text := ast.get_docstring(node))  # type: ignore[arg-type]
    }
    assert VERBS - used == set()
    assert sorted(VERBS) == LISTED


def _files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
