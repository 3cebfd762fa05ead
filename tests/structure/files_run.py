"""Counts the files of this repository that run in one forward, one training step and one launch.

`python tests/structure/files_run.py` prints them. A file runs where a function of it is called, or a class body or
module of it is executed, between two points; what is only imported before does not count.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: its kernels then run on the CPU

import torch

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("unetgn",)


@contextmanager
def files_run() -> Iterator[set[str]]:
    """Fill the set with the files that run within the block, by their paths from the root of the repository."""
    found: set[str] = set()
    tops = tuple(str(ROOT / top) + os.sep for top in COUNTED)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(tops):
            found.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def of_a_forward() -> set[str]:
    """List the files of one forward of the network of configs/digits8_ddpm.yaml, in evaluation."""
    from unetgn import UNet
    from unetgn.training.config_files import load_config
    from unetgn.training.config_yaml import find_config

    unet = UNet.from_unet_config(load_config(find_config("digits8_ddpm")).model).eval()
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad(), files_run() as found:
        unet(x, 7, class_labels=labels)
    return found


def of_a_step() -> set[str]:
    """List the files of one training step of configs/digits8_ddpm.yaml: the batch read, the step made."""
    from unetgn.training import loop, train

    found: set[str] = set()
    step = loop.Loop.next_step

    def watched(self: loop.Loop) -> None:
        if self.state.step != 2:  # the third: what happens once has happened
            return step(self)
        with files_run() as files:
            step(self)
        found.update(files)

    loop.Loop.next_step = watched  # type: ignore[method-assign]
    sizes, nothing_due = ["train.steps=4", "train.batch_size=4"], ["preview.every=0", "train.validate_every=0"]
    keys = [*sizes, *nothing_due, "train.trackers=[]"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            assert train.main(["--config", "digits8_ddpm", "--output", f"{folder}/run", *keys]) == 0
    finally:
        loop.Loop.next_step = step  # type: ignore[method-assign]
    return found


def of_a_launch(*, warm: bool = True) -> set[str]:
    """List the files of `unetgn.ops` in one recorded call on Triton, of a kind seen before (`warm`) or the first."""
    from unetgn.ops import group_norm_silu, implementation

    x, weight, bias = torch.randn(2, 8, 4, 4), torch.ones(8, requires_grad=True), torch.zeros(8)
    with implementation("triton"):
        if warm:
            group_norm_silu(x, 2, weight, bias)
        with files_run() as found:
            group_norm_silu(x, 2, weight, bias)
    return found


def main() -> None:
    """Print the files, and how many they are; with --json, as one line of JSON for a test."""
    counted: dict[str, Callable[[], set[str]]] = {
        "a launch, cold": lambda: of_a_launch(warm=False),
        "a launch, warm": of_a_launch,
        "a forward": of_a_forward,
        "a training step": of_a_step,
    }
    files = {name: sorted(count()) for name, count in counted.items()}
    if "--json" in sys.argv:
        print(json.dumps(files))
        return
    for name, found in files.items():
        print(f"{name}: {len(found)} files\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main()
