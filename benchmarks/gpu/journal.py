"""Keeps the results: one line of JSON a unit, appended to DIR/units.jsonl."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

NAME = "units.jsonl"
SAME = ("device", "torch", "triton", "source")  # what results that are taken together have in common
# What becomes of a unit. It is not run again in the same folder after the first of these, nor after the second unless
# that is asked for.
KNOWN = ("done", "wrong")
FAILED = ("error", "lost", "hung", "died")
LEFT = ("skipped", "absent")


@dataclass(frozen=True)
class Journal:
    """Holds the folder of a run, and what its lines have in common: device, versions, commit."""

    folder: Path
    environment: Line

    def add(self, unit: str, kind: str, status: str, **more: Any) -> None:
        """Append a line and bring it to the disk, whatever becomes of this process."""
        line = {**self.environment, "unit": unit, "kind": kind, "status": status, **more}
        path = self.folder / NAME
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * bool(torn) + json.dumps(line, default=repr) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def latest(self) -> dict[str, Line]:
        """Return the last line of each unit that was run on the same device, versions and source."""
        same = [one for one in lines(self.folder) if all(one.get(key) == self.environment.get(key) for key in SAME)]
        return {line["unit"]: line for line in same}


def lines(folder: Path) -> list[Line]:
    """Read all lines of a folder; one that was torn when a machine was taken away is left out."""
    path = folder / NAME
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"unit", "kind", "status"} <= line.keys():
            found.append(line)
    return found
