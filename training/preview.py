"""What a run shows of itself while it trains: sampled images, a strip from noise to image, the loss curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sampling.pictures import save_png, to_grid
from sampling.sampler import SCHEDULERS, make_sampling_scheduler, sample
from unetgn import UNet

STRIP = 10  # pictures in a strip from noise to image


@dataclass(frozen=True)
class PreviewConfig:
    """Samples drawn during training, from the same seeds every time, with the averaged weights."""

    count: int = 16
    """Images a preview; image n has seed n, classes cycle."""
    scheduler: str = "ddim"
    """Scheduler, by its name in sampling/sampler.py."""
    steps: int = 50
    """Sampling steps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is off."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"preview.count is {self.count}; it must be at least 1 (train.sample_every 0 is off)")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"preview.scheduler {self.scheduler!r} is unknown; there are {', '.join(SCHEDULERS)}")
        if self.steps < 1:
            raise ValueError(f"preview.steps is {self.steps}; it must be at least 1")


def preview_file(run: Path, step: int) -> Path:
    """Where the sampled images of a step go."""
    return run / "samples" / f"step-{step:06d}.png"


def draw_preview(
    unet: UNet,
    scheduler: Any,
    shape: tuple[int, ...],
    config: PreviewConfig,
    run: Path,
    step: int,
    *,
    on_step: Callable[[], None],
) -> None:
    """Write samples/step-*.png and denoise/step-*.png below `run`; `on_step` is called between sampling steps."""
    seeds = list(range(config.count))
    num_classes = unet.config.num_classes
    labels = None if num_classes is None else [seed % num_classes for seed in seeds]
    sampler = make_sampling_scheduler(config.scheduler, scheduler, config.steps)
    path_of_first: list[torch.Tensor] = []

    def look(noisy: torch.Tensor) -> None:
        path_of_first.append(noisy[:4].cpu())
        on_step()

    images = sample(
        unet,
        sampler,
        seeds,
        shape,
        class_labels=labels,
        guidance_scale=config.guidance_scale,
        on_step=look,
    )
    chosen = torch.linspace(0, len(path_of_first) - 1, min(STRIP, len(path_of_first))).round().long().tolist()
    strip = torch.stack([path_of_first[i] for i in chosen], dim=1)  # (images, moments, C, H, W)
    save_png(to_grid(strip.flatten(0, 1), columns=len(chosen)), run / "denoise" / f"step-{step:06d}.png")
    save_png(to_grid(images), preview_file(run, step))


def draw_loss(training: tuple[list[int], list[float]], held_out: tuple[list[int], list[float]], path: Path) -> None:
    """Losses against steps: every logged value, the mean over the last twentieth of them, and the held-out ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = training
    window = max(1, len(losses) // 20)
    smooth = [sum(part) / len(part) for part in (losses[max(0, i - window) : i + 1] for i in range(len(losses)))]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, alpha=0.35, linewidth=0.8, label="logged")
    axes.plot(steps, smooth, linewidth=1.5, label="running mean")
    if held_out[0]:
        axes.plot(*held_out, "o-", markersize=3, linewidth=1, label="held out, averaged weights")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path.with_name(f".tmp-{path.name}"), format="png", dpi=120)
    pyplot.close(figure)
    path.with_name(f".tmp-{path.name}").replace(path)
