"""Asks what the operator is worth to whole networks: steps of forward and backward in bf16.

`tower` needs nothing but torch: residual blocks with the widths and sizes of Stable Diffusion's encoder. The U-Nets are
diffusers', with random weights: as they are, fused, compiled, and as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.machine import Place
from benchmarks.gpu.worker import Absent, Data, Unit
from benchmarks.group_norm_silu.cases import LAYOUTS, NUM_GROUPS
from unetgn.ops import implementation
from unetgn.ops.functional import group_norm_silu

EMBEDDING = 1280
WIDTHS, SIZE, LATENTS = (320, 640, 1280, 1280), 64, 4
NEEDED = "diffusers"
# The norms of the networks below, as (channels, side): what `prepare` compiles. Those of attention have no SiLU.
NORMS: dict[str, dict[int, tuple[int, ...]]] = {
    "tower": {64: (320,), 32: (320, 640), 16: (640, 1280), 8: (1280,)},
    "sd15": {
        64: (320, 640, 960),
        32: (320, 640, 960, 1280, 1920),
        16: (640, 1280, 1920, 2560),
        8: (1280, 2560),
    },
    "cifar10": {32: (128, 256, 384), 16: (128, 256, 384, 512), 8: (256, 512), 4: (256, 512)},
}
BATCHES = {"tower": (8, 1), "sd15": (8, 2), "cifar10": (128,)}
ATTENTION: dict[str, dict[int, tuple[int, ...]]] = {
    "tower": {},
    "sd15": {64: (320,), 32: (640,), 16: (1280,), 8: (1280,)},
    "cifar10": {16: (256,), 4: (256,)},
}


class Residual(nn.Module):
    """Adds two convolutions, each behind group norm + SiLU, the second with the embedding added before its norm."""

    def __init__(self, in_channels: int, channels: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norms = nn.ModuleList([nn.GroupNorm(NUM_GROUPS, in_channels), nn.GroupNorm(NUM_GROUPS, channels)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(in_channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)]
        )
        self.project = nn.Linear(EMBEDDING, channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.convs[0](self._norm(0, x, None))
        h = self.convs[1](self._norm(1, h, self.project(embedding)))
        return h + self.shortcut(x)

    def _norm(self, index: int, x: Tensor, pre_bias: Tensor | None) -> Tensor:
        norm: Any = self.norms[index]
        if self.fused:
            return group_norm_silu(x, NUM_GROUPS, norm.weight, norm.bias, norm.eps, pre_bias=pre_bias)
        return F.silu(norm(x if pre_bias is None else x + pre_bias[:, :, None, None]))


class Tower(nn.Module):
    """Passes latents through two residual blocks a level, with a strided convolution between levels."""

    def __init__(self, widths: tuple[int, ...], fused: bool) -> None:
        super().__init__()
        before = (widths[0], *widths)
        self.enter = nn.Conv2d(LATENTS, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.ModuleList([Residual(before[i], width, fused), Residual(width, width, fused)])
            for i, width in enumerate(widths)
        )
        self.halve = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths[:-1])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.enter(x)
        for index, level in enumerate(self.levels):
            x = self.halve[index - 1](x) if index else x
            for block in level:  # type: ignore[attr-defined]
                x = block(x, embedding)
        return x


def units(machine: Place) -> Iterator[Unit]:
    """List the tower and the U-Nets, both layouts of each, eager before fused; compiled last."""
    batches = (1,) if machine.tiny else BATCHES["tower"]
    kinds = [("eager", 6.0), ("fused", 6.0)]
    for batch in batches:
        for layout in LAYOUTS:
            for kind, seconds in kinds:
                run = partial(tower, batch, kind, layout, machine)
                yield Unit(f"network tower b{batch} {layout} {kind}", "network", seconds, 60.0, run)
    for network in MAKERS:
        for batch in (1,) if machine.tiny else BATCHES[network]:
            for layout in reversed(LAYOUTS):
                for kind, seconds in (*kinds, ("ours", 8.0)):
                    run = partial(unet, network, batch, kind, layout, machine)
                    yield Unit(f"network {network} b{batch} {layout} {kind}", "network", seconds, 90.0, run)
    for layout in LAYOUTS:
        run = partial(tower, batches[0], "compiled", layout, machine)
        yield Unit(f"network tower b{batches[0]} {layout} compiled", "network compiled", 30.0, 120.0, run)
    for kind in ("compiled", "ours compiled"):
        batch = 1 if machine.tiny else 128
        run = partial(unet, "cifar10", batch, kind, "channels_last", machine)
        yield Unit(f"network cifar10 b{batch} channels_last {kind}", "network compiled", 45.0, 150.0, run)


def tower(batch: int, kind: str, layout: str, machine: Place) -> Data:
    """Measure a step of the tower."""
    widths, size = ((64, 128), 8) if machine.tiny else (WIDTHS, SIZE)
    with torch.device(machine.device):
        model = Tower(widths, fused=kind == "fused")
        inputs = torch.randn(batch, LATENTS, size, size), torch.randn(batch, EMBEDDING)
    return step_of(model, inputs, kind, layout, machine)


def unet(network: str, batch: int, kind: str, layout: str, machine: Place) -> Data:
    """Measure a step of a U-Net of diffusers; `kind`: eager, fused, compiled, ours, or ours compiled."""
    if find_spec(NEEDED) is None:
        raise Absent(f"{NEEDED} is not installed")
    import unetgn

    with torch.device(machine.device):
        model, inputs = MAKERS[network](batch, machine.tiny)
    if kind == "fused":
        unetgn.fuse(model)
    if kind.startswith("ours"):
        model = unetgn.UNet.from_diffusers(model)
    return step_of(model, inputs, kind, layout, machine)


def step_of(model: nn.Module, inputs: tuple[Tensor, ...], kind: str, layout: str, machine: Place) -> Data:
    """Measure forward and backward of a model in bf16."""
    model.to(machine.device, torch.bfloat16).train()
    model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    x, *others = (t.to(machine.device, torch.bfloat16) if t.is_floating_point() else t for t in inputs)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    call: Callable[..., Any] = machine.compile(model) if kind.endswith("compiled") else model

    def step() -> None:
        output = call(x, *others)
        sample: Tensor = output if isinstance(output, Tensor) else output.sample
        sample.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    with implementation("auto"):  # in a rehearsal, not Triton: its interpreter takes minutes for a network
        return {"batch": x.shape[0], "layout": layout, "contender": kind, **machine.step(step)}


def cifar10(batch: int, tiny: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Make the network of google/ddpm-cifar10-32 and a batch."""
    from diffusers import UNet2DModel

    kinds = ("Down", "AttnDown") if tiny else ("Down", "AttnDown", "Down", "Down")
    model = UNet2DModel(
        sample_size=8 if tiny else 32,
        block_out_channels=(32, 64) if tiny else (128, 256, 256, 256),
        down_block_types=tuple(f"{kind}Block2D" for kind in kinds),
        up_block_types=tuple(f"{kind.replace('Down', 'Up')}Block2D" for kind in reversed(kinds)),
        layers_per_block=1 if tiny else 2,
        attention_head_dim=None,
        downsample_padding=0,
        norm_eps=1e-6,
    )
    size = model.config.sample_size
    return model, (torch.randn(batch, 3, size, size), torch.arange(batch))


def sd15(batch: int, tiny: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Make the network of Stable Diffusion 1.5 and a batch of latents, with prompts of 77 tokens."""
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
    if tiny:
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        options |= {"block_out_channels": (32, 64), "down_block_types": down, "up_block_types": up}
        options |= {"cross_attention_dim": 16, "sample_size": 8, "layers_per_block": 1}
    model = UNet2DConditionModel(**options)
    size = model.config.sample_size
    words = torch.randn(batch, 77, model.config.cross_attention_dim)
    return model, (torch.randn(batch, 4, size, size), torch.arange(batch), words)


MAKERS: dict[str, Callable[[int, bool], tuple[nn.Module, tuple[Tensor, ...]]]] = {"sd15": sd15, "cifar10": cifar10}
