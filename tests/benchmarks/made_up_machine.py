"""A machine on which the program of the fused operator's benchmark runs without a GPU, and what it is given to do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.group_norm_silu.cases import Case

CASES = [
    Case((2, 64, 4, 4), dtype, layout, extras)
    for dtype, extras in (("bfloat16", "none"), ("float32", "none"), ("bfloat16", "scale_shift"))
    for layout in ("contiguous", "channels_last")
]


@dataclass
class Pretended:
    """Stands for a machine whose device is the CPU: calls are made twice, and each second on the clock is made up."""

    device: torch.device
    implementation: str = "aten"
    alive: bool = True
    timed: int = 0

    def name(self) -> str:
        return "Made Up 1"

    def cache_bytes(self) -> int:
        return 8192

    def copy_bandwidth(self) -> float:
        return 1e12

    def device_us(self, calls: Sequence[Callable[[], Any]]) -> float:
        for call in (*calls, *calls):
            call()
        self.timed += 1
        return float(self.timed)

    def host_us(self, call: Callable[[], Any]) -> float:
        call()
        return 1.0

    def is_alive(self) -> bool:
        return self.alive

    def empty_cache(self) -> None: ...


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "group_norm_silu_made_up_1.json").read_text()))
