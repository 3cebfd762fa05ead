"""Reads the fixtures of `golden/`: what the authors' networks compute, and how weights are made from their names.

`golden/README.md` describes the files. Weights are a pure function of name and shape, so none are stored.
"""

import json
import math
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from unetgn import UNet
from unetgn.interop import convert

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in (GOLDEN / "visible").glob("*.json"))


@dataclass(frozen=True)
class Fixture:
    """Holds one network of its authors: `meta` is the JSON file, `tensors` are inputs and expected outputs."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return {**self.meta["constructor_kwargs"], "class": self.meta["peer"]["class"]}

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        tables, buffers = set(self.meta["embedding_keys"]), self.meta["buffers"]
        return {
            key: torch.tensor(buffers[key]) if key in buffers else made_up(key, shape, table=key in tables)
            for key, shape in self.meta["shapes"].items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by their original names; the tensors are shared, the dict is not."""
        return dict(self._weights)

    @cached_property
    def _unet(self) -> UNet:
        return convert(self.meta["family"], self.config, self.state_dict())

    def converted(self) -> UNet:
        """Return our network in float32; all callers share it."""
        return self._unet.float()  # the weights are float32: nothing is lost on the way to float64 and back

    def output(self, unet: UNet, dtype: torch.dtype) -> Tensor:
        """Compute what `unet` gives for the fixture's inputs, all of them in `dtype`."""
        given = {
            name: self.tensors[name].to(dtype) if self.tensors[name].is_floating_point() else self.tensors[name]
            for name in self.meta["inputs"]
        }
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        if "y" in given:
            added = {"vector": given["y"]}
        with torch.no_grad():
            return unet.to(dtype)(
                given["x"],
                given["timesteps"] if "timesteps" in given else given["noise_labels"],
                given.get("context"),
                class_labels=given["labels"] if "labels" in given else given.get("class_labels"),
                augment_labels=given.get("augment_labels"),
                added_cond_kwargs=added or None,
            ).sample


@cache
def fixture(name: str) -> Fixture:
    path = GOLDEN / "visible" / f"{name}.json"
    return Fixture(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))


def made_up(key: str, shape: list[int], *, table: bool = False) -> Tensor:
    """Make the float32 values of the weight called `key`, by the rule in `golden/README.md`."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if not table:
        if len(shape) >= 2:
            values = values / math.sqrt(math.prod(shape[1:]))
        else:
            values = 0.1 * values + (1 if key.endswith("weight") else 0)
    return torch.tensor(values, dtype=torch.float32)


def max_relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    return float((output.double() - expected.double()).abs().max() / expected.double().abs().max())
