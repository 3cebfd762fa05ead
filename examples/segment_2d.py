"""Trains a 2-D segmentation U-Net, without any diffusion, to find the flowers in a grey, noisy photograph.

scikit-learn ships the photograph of two dahlias. Which pixels are petals is told by their colour, red far above blue;
the network sees brightness under noise of twice the picture's contrast. Trained on crops of the upper two thirds, with
the large flower, and judged on the lower third, with the rim of the other.

    python examples/segment_2d.py --out segment_2d.png

Prints intersection over union on the part that was not trained on, beside that of the best brightness threshold.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_sample_image
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is not installed: pip install -e ".[train]"') from None

from unetgn import Downsample, GroupNormSiLU, ResBlock, SelfAttention, Upsample
from unetgn.nn import NormConfig
from unetgn.programs.paths import file_to_write

CROP, STEPS, NOISE = 64, 50, 2.0


class SegmentationUNet(nn.Module):
    """Maps grey (N, 1, H, W) to logits (N, 1, H, W), for any H and W."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        norm = NormConfig(group_size=8)
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1)
        self.down, self.downsamplers, self.upsamplers, self.up = (nn.ModuleList() for _ in range(4))
        for fine, coarse in pairwise(widths):
            self.down.append(ResBlock(fine, norm=norm))
            self.downsamplers.append(Downsample(fine, coarse))
            self.upsamplers.append(Upsample(coarse, fine))
            self.up.append(ResBlock(2 * fine, fine, norm=norm))
        self.middle = nn.Sequential(ResBlock(widths[-1], norm=norm), SelfAttention(widths[-1], norm=norm))
        self.head = nn.Sequential(GroupNormSiLU(2, widths[0]), nn.Conv2d(widths[0], 1, 3, padding=1))

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
        return self.head(h)


def picture() -> tuple[Tensor, Tensor]:
    """Load grey (1, H, W), of mean 0 and standard deviation 1, and the petals' mask (1, H, W), at half resolution."""
    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).float().permute(2, 0, 1) / 255
    red, green, blue = F.avg_pool2d(pixels[None], 2)[0]
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return ((grey - grey.mean()) / grey.std())[None], ((red - blue) > 0.25).float()[None]


def overlap(got: Tensor, wanted: Tensor) -> float:
    """Compute the intersection over union of two masks."""
    return ((got & wanted).sum() / (got | wanted).sum()).item()


def crops(grey: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw random crops, half of them mirrored: (count, 1, CROP, CROP) each."""
    both = torch.cat([grey, mask])
    pieces = []
    for _ in range(count):
        top = int(torch.randint(both.shape[1] - CROP + 1, ()))
        left = int(torch.randint(both.shape[2] - CROP + 1, ()))
        piece = both[:, top : top + CROP, left : left + CROP]
        pieces.append(piece.flip(2) if torch.rand(()) < 0.5 else piece)
    return torch.stack(pieces).split(1, dim=1)


def main(out: Path | None = None) -> tuple[float, float]:
    """Train, judge, draw; return the overlap of the network's mask and of the best brightness threshold's."""
    torch.manual_seed(0)
    grey, mask = picture()
    border = 2 * grey.shape[1] // 3
    model = SegmentationUNet()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for _ in range(STEPS):
        inputs, wanted = crops(grey[:, :border], mask[:, :border], 6)
        loss = F.binary_cross_entropy_with_logits(model(inputs + NOISE * torch.randn_like(inputs)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noisy = grey + NOISE * torch.randn_like(grey)
    with torch.no_grad():
        found = model(noisy[None])[0] > 0
    new, wanted = (slice(None), slice(border, None)), mask[:, border:].bool()
    threshold = max(overlap(noisy[new] > level, wanted) for level in torch.linspace(-2, 6, 41))
    score = overlap(found[new], wanted)
    print(f"intersection over union on the lower part: {score:.2f} (best brightness threshold: {threshold:.2f})")
    if out is not None:
        figure = Figure(figsize=(10, 2.5), layout="constrained")
        for axes, image in zip(figure.subplots(1, 3), (noisy, mask, found), strict=True):
            axes.imshow(image[0], cmap="gray")
            axes.axhline(border, color="C1")
        figure.savefig(out)
    return score, threshold


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, help="where to save the picture")
    main(parser.parse_args().out)
