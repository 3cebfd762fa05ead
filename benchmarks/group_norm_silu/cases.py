"""Lists what is measured, and computes the fewest bytes that each pass could move."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_GROUPS = 32
Shape = tuple[int, int, int, int]
QUICK_SHAPES: tuple[Shape, ...] = ((32, 256, 64, 64), (8, 320, 64, 64), (1, 1280, 8, 8))
SHAPES: tuple[Shape, ...] = (
    *QUICK_SHAPES,
    (2, 512, 128, 128),
    (1, 128, 512, 512),
    (64, 128, 32, 32),
    *((1, c, side, side) for c, side in ((320, 64), (640, 32), (1280, 16))),
    *((8, c, side, side) for c, side in ((640, 32), (1280, 16), (1280, 8))),
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EXTRAS: dict[str, tuple[str, ...]] = {
    "none": (),
    "pre_bias": ("pre_bias",),
    "scale_shift": ("scale", "shift"),
    "maps": ("scale", "shift", "maps"),  # of x's own shape
}
PASSES = ("forward", "backward")

# Elements of a group that a block holds on chip, by pass and layout: forward at 16 bits each, backward at any (xhat and
# dz in float32). In channels_last a group has a few neighbouring channels of each row: where those are no whole loads
# of 16 bytes, only a short group is held; where they are loads of 8 and groups are few, others are, too.
ON_CHIP = {
    ("forward", "contiguous"): 49152,
    ("forward", "channels_last"): 20480,
    ("backward", "contiguous"): 20480,
    ("backward", "channels_last"): 10240,
}
LOAD_BYTES = 16
NARROW_LOAD_BYTES = 8
SHORT = 8192  # elements of 16 bits
FEW = 132  # groups: fewer than an H200 has multiprocessors


@dataclass(frozen=True)
class Case:
    """Describes one row of results: a call on x (N, C, H, W) with weight and bias."""

    shape: Shape
    dtype: str
    layout: str
    extras: str = "none"
    groups: int = NUM_GROUPS

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Make x, dy, weight, bias and the extras; x, dy and the parameters in the case's dtype."""
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
        if self.extras == "maps":
            made |= {name: torch.randn_like(made["x"]) for name in ("scale", "shift")}
        elif "scale" in EXTRAS[self.extras]:
            made["scale"], made["shift"] = random(n, 2 * c).chunk(2, dim=1)
        if "pre_bias" in EXTRAS[self.extras]:
            made["pre_bias"] = random(n, c)
        return made

    def bytes_moved(self, which: str, *, clusters: bool = False) -> int:
        """Count the bytes that the pass must move: reads and writes of x, y, dy and dx, as often as the limit says.

        Forward: x once and y where a group fits on chip (or a cluster holds it), else x twice. Backward: x, dy once and
        dx where xhat and dz of a group fit on chip, else x and dy twice. For 16 bits: 4, 6, 6 and 10 bytes an element.
        What fits depends on the layout (ON_CHIP). Two maps are read with y and with dx, and with the sums, too, where
        those are a pass of their own; their gradients are written once.
        """
        once, again = (2, 3) if which == "forward" else (3, 5)
        if self.extras == "maps":
            once, again = (4, 5) if which == "forward" else (7, 11)
        on_chip = clusters or self._fits_on_chip(which)
        return self.elements * self.itemsize * (once if on_chip else again)

    def _fits_on_chip(self, which: str) -> bool:
        length, group_channels = self.elements // (self.shape[0] * self.groups), self.shape[1] // self.groups
        if self.layout == "channels_last" and group_channels * self.itemsize % LOAD_BYTES:
            few = self.shape[0] * self.groups < FEW and group_channels * self.itemsize % NARROW_LOAD_BYTES == 0
            return (few or length * self.itemsize <= SHORT * 2) and length <= ON_CHIP[which, self.layout]
        bytes_of_one = self.itemsize if which == "forward" else 2
        return length * bytes_of_one <= ON_CHIP[which, self.layout] * 2

    def bytes_read(self, which: str) -> int:
        """Count the bytes of the large tensors that a call of the pass reads: x, maps, and dy in the backward pass."""
        tensors = (1 if which == "forward" else 2) + (2 if self.extras == "maps" else 0)
        return self.elements * self.itemsize * tensors

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "layout": self.layout, "extras": self.extras}


def cases(
    *,
    quick: bool = False,
    dtypes: Collection[str] = tuple(DTYPES),
    shapes: Collection[Shape] = SHAPES,
    part: tuple[int, int] = (1, 1),
) -> list[Case]:
    """List all shapes, dtypes and layouts without extras, then the extras in bf16.

    The most important come first, so that a run that is cut short has those: bf16 comes first, both
    layouts of a shape side by side.

    `quick` leaves three shapes in bf16; `part` (k, n) takes every n-th case from the k-th on, counted from 1.
    """
    plain = [Case(shape, dtype, layout) for dtype in DTYPES for shape in SHAPES for layout in LAYOUTS]
    fused = [
        Case(shape, "bfloat16", layout, extras)
        for shape in SHAPES
        for extras in EXTRAS
        for layout in LAYOUTS
        if extras != "none"
    ]
    chosen = [case for case in plain + fused if case.dtype in dtypes and case.shape in shapes]
    if quick:
        chosen = [case for case in chosen if case.dtype == "bfloat16" and case.shape in QUICK_SHAPES]
    first, parts = part
    return chosen[first - 1 :: parts]
