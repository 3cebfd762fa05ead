"""Chooses the JSON file of a benchmark before it measures."""

from __future__ import annotations

import argparse
from pathlib import Path

from unetgn.programs.paths import check_file

RESULTS = Path(__file__).parent / "results"


def result_file(parser: argparse.ArgumentParser, given: Path | None, default: str, *, option: str = "--out") -> Path:
    """Return the file that `option` names, or `default` under benchmarks/results; end where none can be written there.

    Raises SystemExit, with what would do.
    """
    out = given or RESULTS / default
    try:
        check_file(out)
    except OSError as error:
        parser.error(f"argument {option}: {error}")
    return out
