"""Docstrings say what a thing does, beginning with a verb.

Of functions and methods the first word is one of verbs.txt: add yours, if it is an imperative ("Return True where …").
Those of classes may have it in the third person as well ("Holds the sizes of one call"). Those of modules and of
properties begin with no word that makes a riddle or a label of them, those under fields with neither "Whether" nor
"What".
"""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.structure.imports import ROOT

FOLDERS = ("unetgn", "benchmarks")
LABELS = {
    "What", "Whether", "Where", "Which", "How", "Who", "Whom", "Whose", "When", "Why", "The", "A", "An", "One", "Two",
    "All", "Each", "Every", "Everything", "Everybody", "This", "These", "That", "Those", "Nothing", "Such", "Some",
    "Any", "Both", "It",
}  # fmt: skip
LISTED = Path(__file__).with_name("verbs.txt").read_text().split()
VERBS = set(LISTED)
IRREGULAR = {"Have": "Has"}


def third_person(verb: str) -> str:
    """Return the verb as a statement about one thing has it: "Holds", "Passes", "Copies"."""
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if verb.endswith("y") and verb[-2] not in "aeiou" else f"{verb}s"


STATEMENTS = {third_person(verb): verb for verb in VERBS}

Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Find the docstrings that begin with something else: their lines and first words."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from _riddles_under_fields(node)
        text = ast.get_docstring(node) if isinstance(node, Node) else None
        if text is None:
            continue
        first = _first_word(text)
        line = 1 if isinstance(node, ast.Module) else node.lineno  # type: ignore[attr-defined]
        if not _may_begin(node, first):
            yield line, first


def _may_begin(node: ast.AST, first: str) -> bool:
    """Return True where the docstring of the node may begin with this word."""
    if isinstance(node, ast.ClassDef):
        return first in VERBS or first in STATEMENTS
    if _is_a_function(node):
        return first in VERBS
    return first not in LABELS and first[0].isupper()


def _riddles_under_fields(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Find the docstrings under the fields of a class that begin with "Whether" or "What"."""
    for before, after in pairwise(node.body):
        match before, after:
            case ast.AnnAssign(), ast.Expr(ast.Constant(str(text))) if _first_word(text) in ("Whether", "What"):
                yield after.lineno, _first_word(text)


def _first_word(text: str) -> str:
    return text.split()[0].rstrip(".,:;")


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
        ('"""Adds."""\nclass C:\n    """Images drawn during training."""', ["Images"]),
        ('"""Adds."""\nclass C:\n    """Checkpoints: how often one is made."""', ["Checkpoints"]),
        ('"""Adds."""\nclass C:\n    """Adds both."""', []),
        ('"""Adds."""\nclass C:\n    """Add both."""', []),
        ('"""Adds."""\nclass C:\n    a: int\n    """Whether to add."""', ["Whether"]),
        ('"""Adds."""\nclass C:\n    a: int\n    """Number of terms."""', []),
        ('"""(N, C) values."""', ["(N"]),
        ("def f(): pass", []),
    ],
)
def test_the_check_sees_a_label_and_lets_a_verb_pass(source: str, words: list[str]):
    assert [word for _, word in faults(source)] == words


def test_the_verbs_are_used_and_stand_in_order():
    used = {
        STATEMENTS.get(first, first) if isinstance(node, ast.ClassDef) else first
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ClassDef) or _is_a_function(node)) and (text := ast.get_docstring(node))
        for first in [_first_word(text)]
    }
    assert VERBS - used == set()
    assert sorted(VERBS) == LISTED


def _files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
