"""Makes classes of blocks from the text of their forwards, one file each, for tests that generate forwards."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Maker = Callable[..., type[nn.Module]]


def maker(folder: Path, **names: Any) -> Maker:
    """Return the function that makes a class with a forward and other methods. Its globals are torch, F and names."""
    number = itertools.count()

    def make(base: type[nn.Module], body: str, arguments: str = "x", methods: str = "") -> type[nn.Module]:
        path = folder / f"file{next(number)}.py"
        lines = [f"        {line}" for line in body.splitlines()]
        lines += [f"    {line}" for line in methods.splitlines()]
        path.write_text("\n".join(["class Theirs(Base):", f"    def forward(self, {arguments}):", *lines, ""]))
        known = {"Base": base, "F": F, "torch": torch, "nn": nn, "__name__": "theirs", **names}
        exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), known)
        return known["Theirs"]

    return make
