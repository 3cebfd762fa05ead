"""Does what the programs of this project need before torch is imported; in everybody else's programs it does nothing.

`unetgn/__init__.py` imports this package first of all, so that Ctrl-C and a missing package end in one line from then
on, and so that the launcher of this process is known (`parent`) should it die during the imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

from unetgn.programs import parent as parent
from unetgn.programs.last_words import keep_output, say_last_words

FOLDERS = [Path(__file__).resolve().parents[2] / name for name in ("training", "sampling", "benchmarks")]


def is_ours(program: Path) -> bool:
    """Return True for the command `unetgn`, and for the scripts and benchmarks of the repository that this lies in."""
    return program.name == "unetgn" or any(program.resolve().is_relative_to(folder) for folder in FOLDERS)


if is_ours(Path(next(iter(sys.argv), ""))):
    keep_output()
    sys.excepthook = say_last_words
