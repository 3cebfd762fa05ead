"""The JSON file of a run: written after each case, taken up again by the next run."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.group_norm_silu.cases import Case

Contents = dict[str, Any]
SAME = ("device", "commit")  # what rows of one file have in common


class OtherResults(ValueError):
    """The file holds results of another commit or device."""


@dataclass
class Record:
    """The contents of the file at `path`: `device`, `driver`, `torch`, `triton`, `commit`, `copy_bandwidth`, `host`,
    `rows` and `faults` ({case, clusters, faults} of cases whose results are wrong, and which are not timed)."""

    path: Path
    contents: Contents

    @classmethod
    def open(cls, path: Path, environment: Contents) -> "Record":
        """Take up the results at `path`, or begin. Raises OtherResults where those are of another commit or device."""
        contents = {**environment, "rows": [], "faults": []}
        if path.exists():
            contents = json.loads(path.read_text())
            _refuse_others(path, contents, environment)
        return cls(path, contents)

    def has(self, case: Case, *, clusters: bool) -> bool:
        """True where the case has been measured, or found wrong, already."""
        wanted = {**case.describe(), "clusters": clusters}
        entries = self.contents["rows"] + self.contents["faults"]
        return any(all(entry[key] == value for key, value in wanted.items()) for entry in entries)

    def add(self, rows: Sequence[Contents]) -> None:
        self.contents["rows"] += rows
        self.save()

    def add_faults(self, case: Case, faults: Sequence[str], *, clusters: bool) -> None:
        self.contents["faults"].append({**case.describe(), "clusters": clusters, "faults": list(faults)})
        self.save()

    def save(self) -> None:
        """Write under another name, then rename: whoever stops the process, the file is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.contents, indent=1) + "\n")
        os.replace(temporary, self.path)


def merged(paths: Sequence[Path]) -> Contents:
    """The results of several files (parts of a run) as one. Raises OtherResults where they are of two commits or
    devices."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        _refuse_others(path, other, first)
        first["rows"] += other["rows"]
        first["faults"] += other["faults"]
    return dict(first)


def _refuse_others(path: Path, contents: Contents, wanted: Contents) -> None:
    for key in SAME:
        if contents[key] != wanted[key]:
            raise OtherResults(
                f"{path} holds results of {key} {contents[key]}, and these are of {wanted[key]}; "
                f"move it away, or name another folder with --output"
            )


def environment(device: str, commit: str) -> Contents:
    """Where the figures come from."""
    return {
        "device": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit,
    }


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out there; None outside of a repository."""
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
