"""Counts how much of other libraries than diffusers `unetgn.fuse` takes: `python -m benchmarks.fuse_libraries`.

As `fuse_coverage` does for diffusers, with real classes: from packages of PyPI that are installed, and from
repositories that are cloned as `SOURCES/NAME` (`--sources`). What is not there is a line that says so, and keeps its
place in the record. Each library has a process of its own, since several call their modules alike. Prints tables in
Markdown and puts them into `benchmarks/results/fuse_libraries.json`, library by library; `--guide` prints, from that
file, the rows that the guide has. Exit code 1 where the report of `fuse` says otherwise than the runs, or where outputs
differ.
"""

from __future__ import annotations

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import importlib
import importlib.metadata
import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuse_coverage import Row, measure, table
from benchmarks.fuse_instances import Library
from benchmarks.fuse_recipes_libraries import LIBRARIES
from benchmarks.result_file import result_file
from unetgn.programs.paths import user_path
from unetgn.training.files import write_json

RESULTS = Path(__file__).parent / "results" / "fuse_libraries.json"
Counted = dict[str, Any]  # of one library: its name, where its classes come from, and rows, or why there are none


def count(library: Library, sources: Path) -> Counted:
    """Measure every recipe of a library in this process."""
    warnings.filterwarnings("ignore")
    folder = sources / library.repository.rpartition("/")[2]
    if library.repository:
        sys.path.insert(0, str(folder))
    try:
        origin = _commit(folder, library) if library.repository else _version(library)
        library.prepare()
        rows = [measure(recipe, _resolve(recipe.path)) for recipe in library.recipes]
    except (ImportError, FileNotFoundError) as error:
        return {"library": library.name, "skipped": f"{type(error).__name__}: {error}"}
    return {
        "library": library.name,
        "origin": origin,
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }


def count_apart(library: Library, sources: Path) -> Counted:
    """Measure a library in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fuse_libraries", "--one", library.name, "--sources", str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"library": library.name, "skipped": f"it ended with code {done.returncode}: {last}"}
    counted: Counted = json.loads(done.stdout.strip().splitlines()[-1])
    return counted


def rows_of(counted: Counted) -> list[Row]:
    """Return the rows of a library's record."""
    return [Row(**row) for row in counted.get("rows", ())]


def recorded() -> list[Counted]:
    """Read what the last whole run has counted."""
    libraries: list[Counted] = json.loads(RESULTS.read_text(encoding="utf-8"))["libraries"]
    return libraries


def record(counted: Counted) -> None:
    """Put what was counted of a library in the place of what is recorded of it; the order is that of the recipes."""
    if "skipped" in counted:
        return
    others = [other for other in recorded() if other["library"] != counted["library"]] if RESULTS.is_file() else []
    order = [library.name for library in LIBRARIES]
    libraries = sorted([*others, counted], key=lambda one: order.index(one["library"]))
    write_json(RESULTS, {"libraries": libraries})


def guide_table(libraries: list[Counted]) -> str:
    """Write a line a library for the guide."""
    lines = ["| library | models | fused / places | left, and why |", "|---|---|---|---|"]
    for counted in libraries:
        rows = rows_of(counted)
        models = ", ".join(f"{row.model}{f' ({row.variant})' if row.variant else ''}" for row in rows)
        left = "; ".join(dict.fromkeys(row.left for row in rows if row.left))
        places = f"{sum(row.fused for row in rows)}/{sum(row.places for row in rows)}"
        lines.append(f"| {counted['library']} | {models} | {places} | {left} |")
    return "\n".join(lines)


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _version(library: Library) -> str:
    return f"{library.package} {importlib.metadata.version(library.package)}"


def _commit(folder: Path, library: Library) -> str:
    """Return a repository with its commit, which the file `.git` or `COMMIT` in the clone says."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no clone of {library.repository} in --sources")
    if (folder / "COMMIT").is_file():
        return f"{library.repository} {(folder / 'COMMIT').read_text(encoding='utf-8').strip()}"
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return f"{library.repository} {head.stdout.strip()}"


def main(given: list[str] | None = None) -> int:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=user_path, default=Path("sources"), help="the folder that holds the clones")
    parser.add_argument("--only", default="", help="part of the names of the libraries to go through")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--guide", action="store_true", help="print the guide's rows from the recorded results")
    arguments = parser.parse_args(given)
    if arguments.guide:
        print(guide_table(recorded()))
        return 0
    if arguments.one:
        library = next(library for library in LIBRARIES if library.name == arguments.one)
        print(json.dumps(count(library, arguments.sources)))
        return 0
    result_file(parser, None, RESULTS.name)  # which `record` writes
    counted = []
    for library in LIBRARIES:
        if arguments.only in library.name:
            counted.append(count_apart(library, arguments.sources))
            print(f"{library.name}: {counted[-1].get('skipped') or counted[-1]['origin']}")
            print(table(rows_of(counted[-1])), flush=True)
            record(counted[-1])
    wrong = [row for one in counted for row in rows_of(one) if row.wrong]
    for row in wrong:
        print(f"{row.model} {row.variant}: {row.wrong}", file=sys.stderr)
    return 1 if wrong or not counted else 0


if __name__ == "__main__":
    sys.exit(main())
