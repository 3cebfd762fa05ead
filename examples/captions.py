"""Trains a text-conditioned diffusion U-Net with cross-attention, for some steps on real handwritten digits.

The captions are words, "zero" to "nine", read letter by letter: each letter has an embedding, and the U-Net's spatial
transformers attend to the letters. After training, the network denoises with the right caption, with a wrong one, and
with none; how much better the right caption does is what it has learned to read.

    python examples/captions.py --out captions.png

Prints the three errors (mean square, of the predicted noise) and draws a digit for each word, sampled with DDIM.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is not installed: pip install -e ".[train]"') from None

from unetgn import UNet
from unetgn.programs.paths import file_to_write

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH, WIDTH, STEPS, STRONG_NOISE = 5, 32, 150, 600


class Captions(nn.Module):
    """Embeds words as contexts: class indices (N,) -> letters (N, LENGTH, WIDTH). Index 10 is no caption."""

    def __init__(self) -> None:
        super().__init__()
        letters = [[ord(letter) - 96 for letter in word.ljust(LENGTH, "`")] for word in (*WORDS, "")]
        self.register_buffer("letters", torch.tensor(letters))
        self.letter = nn.Embedding(27, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        return self.letter(self.letters[words]) + self.place


def digits() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 1,797 digits, (N, 1, 8, 8) in [-1, 1], and what they are."""
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)


def main(out: Path | None = None) -> dict[str, float]:
    """Train, judge, draw; return the error under strong noise with the right caption, a wrong one and none."""
    torch.manual_seed(0)
    images, labels = digits()
    train, held_out = slice(0, 1500), slice(1500, None)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    captions = Captions()
    model = UNet(
        in_channels=1,
        out_channels=1,
        channels=(16, 32),
        depth=1,
        attention_levels=(1,),
        norm={"num_groups": 8},
        attention={"head_dim": 16},
        transformer={"context_dim": WIDTH},
    )
    parameters = [*model.parameters(), *captions.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, STEPS)

    def error(images: Tensor, words: Tensor, timesteps: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        noisy = scheduler.add_noise(images, noise, timesteps)
        return (model(noisy, timesteps, captions(words)).sample - noise).square().mean()

    for _ in range(STEPS):
        chosen = torch.randint(train.stop, (32,))
        words = torch.where(torch.rand(32) < 0.1, 10, labels[chosen])
        timesteps = (1000 * torch.rand(32).sqrt()).long()  # more often late ones, where the picture tells little
        loss = error(images[chosen], words, timesteps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    errors = {}
    right, late = labels[held_out], torch.full((len(labels[held_out]),), STRONG_NOISE)
    for name, words in (("right", right), ("wrong", (right + 5) % 10), ("none", torch.full_like(right, 10))):
        torch.manual_seed(1)
        with torch.no_grad():
            errors[name] = error(images[held_out], words, late).item()
    print("error with the caption: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    if out is not None:
        draw(model, captions(torch.arange(10)).detach(), scheduler, out)
    return errors


@torch.no_grad()
def draw(model: UNet, contexts: Tensor, scheduler: DDIMScheduler, out: Path) -> None:
    """Sample and draw a digit for each word."""
    scheduler.set_timesteps(25)
    x = torch.randn(10, 1, 8, 8)
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep, contexts).sample, timestep, x).prev_sample
    figure = Figure(figsize=(10, 1.5), layout="constrained")
    for axes, image, word in zip(figure.subplots(1, 10), x, WORDS, strict=True):
        axes.imshow(image[0], cmap="gray")
        axes.set_title(word)
        axes.set_axis_off()
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, help="where to save the picture")
    main(parser.parse_args().out)
