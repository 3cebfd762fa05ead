"""Writes figures with where they come from: device, versions, commit and command; by default under `results/`."""

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_name import device_name
from benchmarks.group_norm_silu.record import commit_of
from benchmarks.result_file import result_file
from unetgn.programs.paths import user_path
from unetgn.training.files import write_json

COMMIT_VARIABLE = "UNETGN_COMMIT"  # where git cannot tell


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the figures go."""
    parser.add_argument("--out", type=user_path, help="JSON file; by default under benchmarks/results")


def out_path(parser: argparse.ArgumentParser, given: Path | None, stem: str, device: str = "cpu") -> Path:
    """Return where the figures go: `given`, or a file of this benchmark and device. Ends the program where that fails.

    It is asked before anything is measured, so that no figures are lost for want of a place.
    """
    return result_file(parser, given, f"{stem}_{device_name(device).replace(' ', '_')}.json")


def head(program: str, device: str = "cpu", *, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return what figures of `python -m benchmarks.PROGRAM` begin with; `packages` are those whose versions count.

    The load average is that of this moment: a machine that does something else shows in it.
    """
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: found for name in packages if (found := installed(name)) is not None},
        "python": platform.python_version(),
        "commit": os.environ.get(COMMIT_VARIABLE) or commit_of(Path(__file__).parent) or "",
        "command": " ".join([f"python -m benchmarks.{program}", *sys.argv[1:]]),
        "load_average": os.getloadavg(),
    }


def installed(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the figures, and say where."""
    write_json(path, dict(result))
    print(f"load average {result['load_average']}; written to {path}", flush=True)
