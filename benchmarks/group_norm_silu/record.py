"""Keeps the JSON file of a run: written after each case, taken up again by the next run."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.group_norm_silu.cases import Case

Contents = dict[str, Any]
SAME = ("device", "commit")  # what rows of one file have in common
WHICH = ("shape", "dtype", "layout", "extras", "pass", "clusters")  # what tells one row from another


class OtherResults(ValueError):
    """Says that the file holds results of another commit or device."""


@dataclass
class Record:
    """Holds the contents of the file at `path`: device, driver, torch, triton, commit, copy_bandwidth, host, and

    rows       what was measured
    faults     {case, clusters, faults} of cases whose results are wrong, and which are not timed
    errors     {case, clusters, error, again} of cases that could not be checked or timed; `again`: the next run tries
               them once more, which it does not where the case hung or broke the device's context
    running    {case, clusters, began} of a case that was begun and has not ended; None between two cases
    """

    path: Path
    contents: Contents

    @classmethod
    def open(cls, path: Path, environment: Contents) -> "Record":
        """Take up the results at `path`, or begin. Raises OtherResults where those are of another commit or device."""
        contents = {**environment, "rows": [], "faults": [], "errors": [], "running": None}
        if path.exists():
            contents = {**json.loads(path.read_text()), "running": None}
            _refuse_others(path, contents, environment)
        return cls(path, contents)

    def has(self, case: Case, *, clusters: bool) -> bool:
        """Return True where the case has been measured, found wrong, or given up."""
        given_up = [entry for entry in self.contents["errors"] if not entry["again"]]
        entries = self.contents["rows"] + self.contents["faults"] + given_up
        return any(_is_of(entry, _key(case, clusters)) for entry in entries)

    def begin(self, case: Case, *, clusters: bool) -> None:
        """Say which case is under way, should the process not come back from it; an earlier error is forgotten."""
        key = _key(case, clusters)
        self.contents["errors"] = [entry for entry in self.contents["errors"] if not _is_of(entry, key)]
        self.contents["running"] = {**key, "began": time.time()}
        self.save()

    def add(self, rows: Sequence[Contents]) -> None:
        self.contents["rows"] += rows
        self._end()

    def add_faults(self, case: Case, faults: Sequence[str], *, clusters: bool) -> None:
        self.contents["faults"].append({**_key(case, clusters), "faults": list(faults)})
        self._end()

    def add_error(self, case: Case, error: str, *, clusters: bool, again: bool) -> None:
        self.contents["errors"].append({**_key(case, clusters), "error": error, "again": again})
        self._end()

    def give_up_running(self, error: str, *, after: float = 0.0) -> None:
        """Take up what another process has written. The case that it did not come back from is an error, and is not
        tried again where it had run for at least `after` seconds."""
        self.contents = json.loads(self.path.read_text())
        running = self.contents["running"]
        if running is not None:
            lasted = time.time() - running.pop("began")
            self.contents["errors"].append({**running, "error": error, "again": lasted < after})
            self._end()

    def _end(self) -> None:
        self.contents["running"] = None
        self.save()

    def save(self) -> None:
        """Write under another name, then rename: whoever stops the process, the file is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.contents, indent=1) + "\n")
        os.replace(temporary, self.path)


def merged(paths: Sequence[Path]) -> Contents:
    """Merge the results of several files (parts of a run) as one. Raises OtherResults where they are of two commits or
    devices, or where two of them hold the same row, fault or error."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        _refuse_others(path, other, first)
        for kind in ("rows", "faults", "errors"):
            _refuse_twice(path, kind, first[kind], other[kind])
            first[kind] += other[kind]
    return dict(first)


def _key(case: Case, clusters: bool) -> Contents:
    return {**case.describe(), "clusters": clusters}


def _is_of(entry: Contents, key: Contents) -> bool:
    return all(entry[name] == value for name, value in key.items())


def _refuse_twice(path: Path, kind: str, known: Sequence[Contents], more: Sequence[Contents]) -> None:
    for entry in more:
        key = {name: entry[name] for name in WHICH if name in entry}
        if any(_is_of(one, key) for one in known):
            raise OtherResults(f"{path} holds {kind} of {key}, and so does an earlier file: leave one of them out")


def _refuse_others(path: Path, contents: Contents, wanted: Contents) -> None:
    for key in SAME:
        if contents[key] != wanted[key]:
            raise OtherResults(
                f"{path} holds results of {key} {contents[key]}, and these are of {wanted[key]}; "
                f"move it away, or name another folder with --output"
            )


def environment(device: str, commit: str) -> Contents:
    """Say where the figures come from."""
    return {
        "device": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit,
    }


def commit_of(folder: Path) -> str | None:
    """Return the commit that is checked out there; None outside of a repository."""
    return _output("git", "-C", str(folder), "rev-parse", "HEAD")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
