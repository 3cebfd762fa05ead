"""Draws what a run shows of itself: sampled images, a strip from noise to image, the loss curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unetgn import UNet
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.pictures import to_grid
from unetgn.pipelines.schedulers import check_name, default_name
from unetgn.pipelines.strips import Moments
from unetgn.training.data.autoencoder import Autoencoder, load_autoencoder
from unetgn.training.files import write_png, writing

COLUMNS = 16  # of classes; more are laid out as a square
BATCH = 64  # images that are drawn at a time
AUTO = "auto"
STRIP = 10  # pictures in a strip from noise to image
# Of a plot, in shares of the figure: what matplotlib finds by itself takes as long again as drawing does.
MARGINS = {"left": 0.15, "right": 0.98, "bottom": 0.13, "top": 0.92}
SAMPLES, STRIPS = "samples", "denoise"  # folders of a run


@dataclass(frozen=True)
class PreviewConfig:
    """Configures the images drawn during training: from the same seeds every time, with the averaged weights."""

    every: int = 1000
    """Steps between two previews, and there is one at the end; 0 is off."""
    first: int = 0
    """Step of an early first preview; others follow at twice its step, four times, …, as long as these are below
    `every`. 0: none early."""
    count: int = 16
    """Images a preview; image n has seed n, classes cycle, and so do the captions of the first training images."""
    scheduler: str = AUTO
    """Scheduler, by its name in unetgn/pipelines/schedulers.py or in diffusers; auto takes ddim, and with objective.edm
    edm_dpmsolver++."""
    steps: int = 50
    """Sampling steps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is off."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"preview.every is {self.every}; it must not be negative (0 is off)")
        if self.first < 0:
            raise ValueError(f"preview.first is {self.first}; it must not be negative (0: none early)")
        if self.count < 1:
            raise ValueError(f"preview.count is {self.count}; it must be at least 1 (preview.every 0 is off)")
        try:
            if self.scheduler != AUTO:
                check_name(self.scheduler)
        except ValueError as error:
            raise ValueError(f"preview.scheduler: {error}") from error
        if self.steps < 1:
            raise ValueError(f"preview.steps is {self.steps}; it must be at least 1")

    def early_steps(self) -> list[int]:
        """List the steps of the early previews: first, 2·first, 4·first, …, below every."""
        steps, step = [], self.first
        while 0 < step < self.every:
            steps.append(step)
            step *= 2
        return steps

    def is_at(self, step: int) -> bool:
        """Return True where a preview is drawn after this step; the one after a run's last step is not known here."""
        return self.every > 0 and (step % self.every == 0 or step in self.early_steps())

    def next_step(self, step: int) -> int | None:
        """Return the step of the next preview; None where they are off."""
        if not self.every:
            return None
        return min([early for early in self.early_steps() if early > step] + [(step // self.every + 1) * self.every])

    def plan(self, last: int) -> str:
        """Say when samples come in a run to this last step; an empty text where none come."""
        early = [step for step in self.early_steps() if step < last]
        said = [f"after step {', '.join(map(str, early))}"] if early else []
        return " and ".join([*said, f"every {min(self.every, last)} steps"]) if self.every else ""

    def scheduler_for(self, trained: Any) -> str:
        """Name the scheduler to draw with, for a network that was trained with `trained`."""
        return default_name(trained, "ddim") if self.scheduler == AUTO else self.scheduler


def preview_file(run: Path, step: int) -> Path:
    """Name the file of the sampled images of a step."""
    return run / SAMPLES / f"step-{step:06d}.png"


@dataclass(frozen=True)
class Conditions:
    """Holds what the images of a preview are drawn with beside their noise, and what makes images of latents."""

    shape: tuple[int, ...]
    """(C, H, W) of what the network makes."""
    texts: Tensor | None = None
    """Captions of some training images (N, tokens, width), which the images cycle through."""
    empty_text: Tensor | None = None
    """The empty caption (tokens, width), for guidance."""
    autoencoder: Path | None = None
    """Folder of what makes images of latents; None where the network makes images."""


def draw_preview(
    unet: UNet,
    scheduler: Any,
    conditions: Conditions,
    config: PreviewConfig,
    run: Path,
    step: int,
    *,
    on_step: Callable[[], None],
) -> dict[str, Image.Image]:
    """Write samples/step-*.png and denoise/step-*.png below `run`, and return both pictures, by these names.

    `on_step` is called between sampling steps.
    """
    moments = Moments(4, conditions.shape)
    made = draw_images(unet, scheduler, conditions, config, on_step=on_step, moments=moments)
    strip, columns = moments.strip(STRIP)
    if conditions.autoencoder is not None:
        autoencoder = load_autoencoder(conditions.autoencoder)  # for these moments only: it takes memory
        strip, *made = (decode(autoencoder, latents.to(unet.device), on_step) for latents in (strip, *made))
    samples = to_grid(torch.cat(made), columns=class_columns(config.count, unet.config.num_classes))
    pictures = {SAMPLES: samples, STRIPS: to_grid(strip, columns=columns)}
    write_png(run / STRIPS / f"step-{step:06d}.png", pictures[STRIPS])
    write_png(preview_file(run, step), pictures[SAMPLES])
    return pictures


def class_columns(count: int, num_classes: int | None) -> int | None:
    """Return how many columns have one class each, of images whose classes cycle; None where they cannot."""
    few = num_classes is not None and 2 <= num_classes <= min(COLUMNS, count - 1)
    return num_classes if few else None


def draw_images(
    unet: UNet,
    scheduler: Any,
    conditions: Conditions,
    config: PreviewConfig,
    *,
    on_step: Callable[[], None],
    moments: Moments | None = None,
) -> list[Tensor]:
    """Draw what the network makes, in batches (N, C, H, W); `moments` collects those of the first batch."""
    num_classes, texts = unet.config.num_classes, conditions.texts
    pipeline = UNetPipeline(unet, scheduler)
    pipeline.use_scheduler(config.scheduler_for(scheduler))
    pipeline.set_progress_bar_config(disable=True)

    def look(_: UNetPipeline, step: int, timestep: Tensor, kept: dict[str, Tensor]) -> None:
        if moments is not None and batch == batches[0]:
            moments.add(kept["latents"])
        on_step()

    batches = [range(first, min(first + BATCH, config.count)) for first in range(0, config.count, BATCH)]
    made = []
    for batch in batches:
        embeds = None if texts is None else texts[[seed % len(texts) for seed in batch]]
        made.append(
            pipeline(
                batch,
                class_labels=None if num_classes is None else [seed % num_classes for seed in batch],
                prompt_embeds=embeds,
                negative_prompt_embeds=None if config.guidance_scale == 1 else conditions.empty_text,
                guidance_scale=config.guidance_scale,
                num_inference_steps=config.steps,
                height=conditions.shape[1],
                width=conditions.shape[2],
                output_type="latent",
                callback_on_step_end=look,
            ).images
        )
    return made


def decode(autoencoder: Autoencoder, latents: Tensor, on_step: Callable[[], None]) -> Tensor:
    """Decode latents to images on the CPU, one by one: it takes its time, and a signal should not have to wait."""
    images = []
    for latent in latents:
        on_step()
        images.append(autoencoder.decode(latent[None]).cpu())
    return torch.cat(images)


def import_pyplot() -> Any:
    """Import what draws to files. Raises ModuleNotFoundError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_loss(training: tuple[list[int], list[float]], held_out: tuple[list[int], list[float]], path: Path) -> None:
    """Draw losses against steps: every logged one, the mean over the last twentieth of them, and the held-out ones."""
    pyplot = import_pyplot()
    steps, losses = training
    window = max(1, len(losses) // 20)
    smooth = [sum(part) / len(part) for part in (losses[max(0, i - window) : i + 1] for i in range(len(losses)))]
    figure, axes = pyplot.subplots(figsize=(7, 4), gridspec_kw=MARGINS)
    axes.plot(steps, losses, alpha=0.35, linewidth=0.8, label="logged")
    axes.plot(steps, smooth, linewidth=1.5, label="running mean")
    if held_out[0]:
        axes.plot(*held_out, "o-", markersize=3, linewidth=1, label="held out, averaged weights")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    with writing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)


def draw_levels(step: int, losses: Sequence[float], path: Path) -> None:
    """Draw the held-out loss of a step in each range of noise levels; a range that had none (NaN) has no bar.

    The ranges are equally probable in training, the least noise first.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), gridspec_kw=MARGINS)
    axes.bar(range(1, len(losses) + 1), losses, width=0.9)
    axes.set(xlabel=f"noise levels of training in {len(losses)} equally probable ranges, the least noise first",
             ylabel="held-out loss", title=f"step {step}", xticks=range(1, len(losses) + 1))  # fmt: skip
    axes.grid(alpha=0.3, axis="y")
    with writing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)
