"""Trains a 3-D U-Net on small volumes: `unetgn.UNet` with three spatial axes marks ellipsoids in noise.

Each volume is made on the spot: one to three ellipsoids of random place, size and brightness, in noise of the same
strength. The network has no diffusion in it, so its timestep is 0 throughout; the last axis is half as long as the
others and is halved once less, as with scans of thick slices.

    python examples/volumes_3d.py --out volumes_3d.png

Prints the Dice coefficient on fresh volumes, 2 |A and B| / (|A| + |B|).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is not installed: pip install -e ".[train]"') from None

from unetgn import UNet
from unetgn.programs.paths import file_to_write

SHAPE, STEPS = (16, 16, 8), 60


def volumes(count: int) -> tuple[Tensor, Tensor]:
    """Make noisy volumes (count, 1, *SHAPE) and the masks of their ellipsoids."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(length) for length in SHAPE), indexing="ij")).float()
    clean, masks = torch.zeros(count, 1, *SHAPE), torch.zeros(count, 1, *SHAPE)
    for volume, mask in zip(clean, masks, strict=True):
        for _ in range(int(torch.randint(1, 4, ()))):
            centre = torch.rand(3, 1, 1, 1) * torch.tensor(SHAPE).view(3, 1, 1, 1)
            radii = torch.tensor(SHAPE).view(3, 1, 1, 1) * (0.1 + 0.2 * torch.rand(3, 1, 1, 1))
            inside = ((grid - centre) / radii).square().sum(dim=0) < 1
            volume[0, inside] = 1 + torch.rand(())
            mask[0, inside] = 1
    return clean + torch.randn_like(clean), masks


def dice(got: Tensor, wanted: Tensor) -> float:
    """Compute 2 |A and B| / (|A| + |B|) of two masks."""
    return (2 * (got * wanted).sum() / (got.sum() + wanted.sum())).item()


def main(out: Path | None = None) -> float:
    """Train, judge, draw; return the Dice coefficient."""
    torch.manual_seed(0)
    model = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=(16, 32),
        depth=1,
        attention_levels=(),
        norm={"group_size": 8},
        resample={"strides": (2, 2, 1)},
    )
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, STEPS)
    for _ in range(STEPS):
        noisy, wanted = volumes(2)
        loss = F.binary_cross_entropy_with_logits(model(noisy, 0).sample, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noisy, wanted = volumes(16)
    with torch.no_grad():
        found = (model(noisy, 0).sample > 0).float()
    score = dice(found, wanted)
    print(f"Dice coefficient on {len(noisy)} volumes that were not trained on: {score:.2f}")
    if out is not None:
        draw(noisy, wanted, found, out)
    return score


def draw(noisy: Tensor, wanted: Tensor, found: Tensor, out: Path) -> None:
    """Draw slices of the first volume: what the network saw, what was there, what it found."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    for row, volume in zip(figure.subplots(3, 4), (noisy, wanted, found), strict=True):
        for axes, depth in zip(row, range(1, SHAPE[2], 2), strict=True):
            axes.imshow(volume[0, 0, :, :, depth], cmap="gray")
            axes.set_axis_off()
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, help="where to save the picture")
    main(parser.parse_args().out)
