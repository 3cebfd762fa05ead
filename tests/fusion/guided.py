"""Defines a residual block in guided-diffusion's style, written for the tests: its structure, none of its text."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Resample(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=self.factor, mode="nearest")


class ResBlock(nn.Module):
    """Has the keys in_layers.{0,2}, emb_layers.1, out_layers.{0,3}, skip_connection; the work is in `_forward`."""

    def __init__(self, channels: int, width: int, scale_shift: bool, factor: float | None, checkpointed: bool) -> None:
        super().__init__()
        self.use_scale_shift_norm, self.use_checkpoint, self.updown = scale_shift, checkpointed, factor is not None
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.h_upd = self.x_upd = Resample(factor) if factor is not None else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * channels if scale_shift else channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            rest, convolution = self.in_layers[:-1], self.in_layers[-1]
            h = convolution(self.h_upd(rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class GuidedUNet(nn.Module):
    """Chains three blocks, one down, one plain and checkpointed, one up, and a tail: seven places."""

    def __init__(self, scale_shift: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down = ResBlock(16, 16, scale_shift, 0.5, checkpointed=False)
        self.middle = ResBlock(16, 16, scale_shift, None, checkpointed=True)
        self.up = ResBlock(16, 16, scale_shift, 2.0, checkpointed=False)
        self.out = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.first(x)
        for block in (self.down, self.middle, self.up):
            h = block(h, emb)
        return self.out(h)
