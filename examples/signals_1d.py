"""Trains a 1-D U-Net from unetgn's blocks to take the noise off real signals.

The signals are a recorded membrane voltage that matplotlib ships. The network is trained on the first three quarters of
the recording and judged on the last.

    python examples/signals_1d.py --out signals_1d.png

Prints the signal-to-noise ratio before and after, in decibels, and draws one window.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

try:
    from matplotlib import cbook
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is not installed: pip install -e ".[train]"') from None

from unetgn import Downsample, ResBlock, Upsample
from unetgn.nn import NormConfig
from unetgn.programs.paths import file_to_write

WINDOW, WIDTHS, STEPS = 256, (16, 32, 64), 100


class SignalUNet(nn.Module):
    """Maps a noisy signal (N, 1, L), of any L, to what is to be added to it."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        norm = NormConfig(group_size=8)
        self.stem = nn.Conv1d(1, widths[0], 7, padding=3)
        self.down, self.downsamplers, self.upsamplers, self.up = (nn.ModuleList() for _ in range(4))
        for fine, coarse in pairwise(widths):
            self.down.append(ResBlock(fine, spatial_dims=1, norm=norm))
            self.downsamplers.append(Downsample(fine, coarse, spatial_dims=1))
            self.upsamplers.append(Upsample(coarse, fine, spatial_dims=1))
            self.up.append(ResBlock(2 * fine, fine, spatial_dims=1, norm=norm))
        self.middle = ResBlock(widths[-1], spatial_dims=1, norm=norm)
        self.out = nn.Conv1d(widths[0], 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.stem(x), []
        for block, downsample in zip(self.down, self.downsamplers, strict=True):
            h = block(h)
            skips.append(h)
            h = downsample(h)
        h = self.middle(h)
        for block, upsample in zip(reversed(self.up), reversed(self.upsamplers), strict=True):
            skip = skips.pop()
            h = block(torch.cat([upsample(h, size=skip.shape[2:]), skip], dim=1))
        return self.out(h)


def recording() -> Tensor:
    """Load the membrane voltage, 12,000 samples, with mean 0 and standard deviation 1."""
    with cbook.get_sample_data("membrane.dat") as file:
        values = torch.from_numpy(np.frombuffer(file.read(), dtype=np.float32).copy())
    return (values - values.mean()) / values.std()


def windows(signal: Tensor, starts: Tensor) -> Tensor:
    """Cut the pieces of the signal that begin at `starts`: (N, 1, WINDOW)."""
    return torch.stack([signal[start : start + WINDOW] for start in starts.tolist()])[:, None]


def decibels(clean: Tensor, got: Tensor) -> float:
    """Compute 10 log10 of the power of the signal over that of the error."""
    return 10 * torch.log10(clean.square().mean() / (got - clean).square().mean()).item()


def main(out: Path | None = None) -> float:
    """Train, judge, draw; return the decibels that were won."""
    torch.manual_seed(0)
    signal = recording()
    train, held_out = signal[:9000], signal[9000:]
    model = SignalUNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for _ in range(STEPS):
        clean = windows(train, torch.randint(len(train) - WINDOW, (16,)))
        noisy = clean + torch.randn_like(clean)
        loss = (noisy + model(noisy) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clean = windows(held_out, torch.arange(0, len(held_out) - WINDOW, WINDOW))
    noisy = clean + torch.randn_like(clean)
    with torch.no_grad():
        denoised = noisy + model(noisy)
    before, after = decibels(clean, noisy), decibels(clean, denoised)
    print(f"signal to noise on {len(clean)} windows that were not trained on: {before:.1f} dB -> {after:.1f} dB")
    if out is not None:
        draw(clean, noisy, denoised, out)
    return after - before


def draw(clean: Tensor, noisy: Tensor, denoised: Tensor, out: Path) -> None:
    """Draw the liveliest window: noisy, denoised and clean."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    index = int(clean.var(dim=2).argmax())
    for name, signals, colour in (("noisy", noisy, "0.8"), ("clean", clean, "0"), ("denoised", denoised, "C1")):
        axes.plot(signals[index, 0], color=colour, label=name)
    axes.legend()
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, help="where to save the picture")
    main(parser.parse_args().out)
