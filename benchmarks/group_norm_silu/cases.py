"""What is measured, and the fewest bytes that each pass could move."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_GROUPS = 32
SHAPES: tuple[tuple[int, int, int, int], ...] = (
    *((n, c, side, side) for n in (1, 8) for c, side in ((320, 64), (640, 32), (1280, 16), (1280, 8))),
    (1, 128, 512, 512),
    (64, 128, 32, 32),
    (32, 256, 64, 64),
    (2, 512, 128, 128),
)
QUICK_SHAPES = ((1, 1280, 8, 8), (8, 320, 64, 64), (32, 256, 64, 64))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EXTRAS: dict[str, tuple[str, ...]] = {"none": (), "pre_bias": ("pre_bias",), "scale_shift": ("scale", "shift")}
PASSES = ("forward", "backward")

# Elements of a group that a block holds on chip: forward at 16 bits each, backward at any (xhat and dz in float32).
ON_CHIP_FORWARD = 49152
ON_CHIP_BACKWARD = 20480


@dataclass(frozen=True)
class Case:
    """One row of results: a call on x (N, C, H, W) with NUM_GROUPS groups, weight and bias."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    extras: str = "none"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """x, dy, weight, bias and the extras; x, dy and the parameters in the case's dtype."""
        generator = torch.Generator(device).manual_seed(seed)
        n, c = self.shape[:2]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(DTYPES[self.dtype])

        made = {
            "x": random(*self.shape).contiguous(memory_format=LAYOUTS[self.layout]),
            "dy": random(*self.shape).contiguous(memory_format=LAYOUTS[self.layout]),
            "weight": random(c),
            "bias": random(c),
        }
        if "scale" in EXTRAS[self.extras]:
            made["scale"], made["shift"] = random(n, 2 * c).chunk(2, dim=1)
        if "pre_bias" in EXTRAS[self.extras]:
            made["pre_bias"] = random(n, c)
        return made

    def bytes_moved(self, which: str, *, clusters: bool = False) -> int:
        """Bytes that the pass must move: reads and writes of x, y, dy and dx, each as often as the limit says.

        Forward: x once and y where a group fits on chip (or a cluster holds it), else x twice. Backward: x, dy once and
        dx where xhat and dz of a group fit on chip, else x and dy twice. For 16 bits: 4, 6, 6 and 10 bytes an element.
        """
        length = self.elements // (self.shape[0] * NUM_GROUPS)
        if which == "forward":
            on_chip = clusters or length * self.itemsize <= ON_CHIP_FORWARD * 2
            return self.elements * self.itemsize * (2 if on_chip else 3)
        return self.elements * self.itemsize * (3 if length <= ON_CHIP_BACKWARD else 5)

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "layout": self.layout, "extras": self.extras}


def cases(*, quick: bool) -> list[Case]:
    """All shapes, dtypes and layouts without extras, and the extras in bf16; a few of them where quick."""
    shapes = QUICK_SHAPES if quick else SHAPES
    dtypes = ("bfloat16",) if quick else tuple(DTYPES)
    plain = [Case(shape, dtype, layout) for shape in shapes for dtype in dtypes for layout in LAYOUTS]
    fused = [
        Case(shape, "bfloat16", layout, extras)
        for shape in shapes
        for layout in LAYOUTS
        for extras in EXTRAS
        if extras != "none"
    ]
    return plain + fused
