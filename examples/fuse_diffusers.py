"""Fuses somebody else's U-Net in one line, fine-tunes it at batch sizes 1 and 2, and saves it for plain diffusers.

The model is a small `diffusers.UNet2DModel`; for one of your own put `DDPMPipeline.from_pretrained(…).unet` in its
place. It is fine-tuned on crops of the photographs that scikit-learn ships: group normalization does not look across
the batch, so one image at a time is as good as many, and the bytes saved are batch size.

    python examples/fuse_diffusers.py --out fused

Prints what was fused and the loss at each batch size; leaves a folder that `UNet2DModel.from_pretrained` loads.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

try:
    from sklearn.datasets import load_sample_images
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is not installed: pip install -e ".[train]"') from None

import unetgn
from unetgn.programs.paths import folder_to_write

SIZE, STEPS = 16, 40


def crops(count: int) -> Tensor:
    """Draw random crops of the two photographs, (count, 3, SIZE, SIZE) in [-1, 1], at a quarter of their resolution."""
    pictures = [torch.from_numpy(picture[::4, ::4].copy()) for picture in load_sample_images().images]
    pieces = []
    for _ in range(count):
        picture = pictures[int(torch.randint(2, ()))]
        top, left = (int(torch.randint(length - SIZE + 1, ())) for length in picture.shape[:2])
        pieces.append(picture[top : top + SIZE, left : left + SIZE].permute(2, 0, 1))
    return torch.stack(pieces).float() / 127.5 - 1


def denoising_loss(model: UNet2DModel, images: Tensor) -> Tensor:
    """Compute the mean square error of the predicted noise, at random timesteps."""
    timesteps, noise = torch.randint(1000, (len(images),)), torch.randn_like(images)
    noisy = DDPMScheduler().add_noise(images, noise, timesteps)
    return (model(noisy, timesteps).sample - noise).square().mean()


def fine_tune(model: UNet2DModel, batch_size: int) -> None:
    """Take some steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(STEPS):
        loss = denoising_loss(model, crops(batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(model: UNet2DModel) -> float:
    """Return the loss on crops, noise and timesteps that are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return denoising_loss(model, crops(32)).item()


def main(out: Path | None = None) -> list[float]:
    """Fuse, fine-tune, save, and load with plain diffusers; return the loss before, between and after."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )

    print(unetgn.fuse(model))  # the one line

    losses = [judge(model)]
    for batch_size in (1, 2):
        fine_tune(model, batch_size)
        losses.append(judge(model))
        print(f"{STEPS} steps at batch size {batch_size}: loss {losses[-2]:.3f} -> {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        model.save_pretrained(folder)
        plain = UNet2DModel.from_pretrained(folder, use_safetensors=True)  # knows nothing of unetgn
    model, images = model.eval(), crops(2)
    with torch.no_grad():
        difference = (plain(images, 500).sample - model(images, 500).sample).abs().max().item()
    print(f"loaded with plain diffusers: outputs differ by {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the saved model does not compute what was trained")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=folder_to_write, help="the folder for the fine-tuned model")
    main(parser.parse_args().out)
