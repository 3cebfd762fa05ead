"""Chooses the tests of `make quick`: those nearest to what changed since the last commit, else the 500 fastest.

`python tests/structure/quick.py` prints their files. What changed is what git says of the working tree, or of the last
commit where that is clean. A test is near a file if it imports it; then come the tests of what imports that, and so on,
as long as their recorded times fit the budget. The times are those of tests/structure/durations.json, in seconds of one
core, which `make durations` measures anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the script's own folder is what Python puts there

from tests.structure.imports import Import, all_imports, imports_of, modules, name_of  # noqa: E402

DURATIONS = Path(__file__).with_name("durations.json")
BUDGET = 65.0  # seconds of one core
FASTEST = 500  # tests
UNKNOWN = 5.0  # seconds of a file that nobody has measured
RUN_BY = {ROOT / "tests/ops/interpreted": ROOT / "tests/ops/test_triton_interpreter.py"}  # in a process of its own


def changed_files() -> list[Path]:
    """List the Python files that differ from the last commit, or that the last commit changed where none does."""
    status = _git("status", "--porcelain", "--untracked-files=all")
    names = [line[3:].split(" -> ")[-1] for line in status] or _git("diff", "--name-only", "HEAD~1", "HEAD")
    return [ROOT / name for name in names if name.endswith(".py") and (ROOT / name).is_file()]


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def import_graph() -> tuple[dict[str, Path], list[Import]]:
    """Read the modules of the repository with its tests, and all imports among them."""
    tests = {name_of(path): path for path in (ROOT / "tests").rglob("*.py")}
    known = modules() | tests
    return known, all_imports() + [found for name, path in tests.items() for found in imports_of(name, path, known)]


def nearest_tests(changed: Iterable[Path], known: dict[str, Path], imports: list[Import]) -> list[Path]:
    """List the test files that reach what changed, those that need the fewest imports first."""
    importers: dict[str, set[str]] = {}
    for found in imports:
        importers.setdefault(found.imported, set()).add(found.importer)
    ring = {name_of(path) for path in changed if name_of(path) in known}
    seen: list[str] = []
    while ring:
        seen += sorted(ring)
        ring = {importer for module in ring for importer in importers.get(module, ())} - set(seen)
    tests = [known[module] for module in seen if known[module].name.startswith("test_")]
    return list(dict.fromkeys(RUN_BY.get(path.parent, path) for path in tests))


def within_budget(tests: Iterable[Path], durations: dict[str, dict[str, float]], budget: float) -> list[Path]:
    """Keep the tests, in order, that fit the budget together; one that is too long by itself is left out."""
    kept = []
    for path in tests:
        seconds = durations.get(str(path.relative_to(ROOT)), {}).get("seconds", UNKNOWN)
        if seconds <= budget:
            kept.append(path)
            budget -= seconds
    return kept


def fastest_tests(durations: dict[str, dict[str, float]], count: int) -> list[Path]:
    """List the files whose tests take least each, until they hold `count` tests."""
    kept, held = [], 0.0
    for name, figures in sorted(durations.items(), key=lambda item: item[1]["seconds"] / item[1]["tests"]):
        if held < count and (ROOT / name).is_file():
            kept.append(ROOT / name)
            held += figures["tests"]
    return kept


def record(report: Path) -> dict[str, dict[str, float]]:
    """Read the seconds and the number of tests of each file from pytest's JUnit report, without skipped ones."""
    figures: dict[str, dict[str, float]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = case.get("classname", "").replace(".", "/") + ".py"
        if (ROOT / name).is_file() and case.find("skipped") is None:
            file = figures.setdefault(name, {"seconds": 0.0, "tests": 0})
            file["seconds"] = round(file["seconds"] + float(case.get("time", 0)), 2)
            file["tests"] += 1
    return dict(sorted(figures.items()))


def main() -> None:
    """Print the chosen files, or write the recorded times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="REPORT", help="write durations.json from this JUnit report")
    arguments = parser.parse_args()
    if arguments.record:
        DURATIONS.write_text(json.dumps(record(arguments.record), indent=1) + "\n")
        return
    durations = json.loads(DURATIONS.read_text())
    near = within_budget(nearest_tests(changed_files(), *import_graph()), durations, BUDGET)
    chosen = near or within_budget(fastest_tests(durations, FASTEST), durations, BUDGET)
    print("\n".join(str(path.relative_to(ROOT)) for path in chosen))


if __name__ == "__main__":
    main()
