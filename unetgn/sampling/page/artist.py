"""Draws what visitors of the page ask for, one after the other, and shows how it comes to be."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.inputs import image_size
from unetgn.pipelines.pictures import columns_in_turn, tile_pixels, to_grid
from unetgn.pipelines.schedulers import set_to_steps
from unetgn.pipelines.strips import Moments
from unetgn.sampling.page.asked import IN_TURN, Asked
from unetgn.sampling.strips import MOMENTS, SHOWN, pixels_of
from unetgn.sampling.trained import Trained, load_trained, open_autoencoder, open_pipeline, read_text_encoder
from unetgn.training.checkpoint import CHECKPOINTS, Checkpoint, find_checkpoint, list_checkpoints
from unetgn.training.data.text import TextEncoder

PAUSE = 0.2  # seconds between two looks at a drawing, at least


class LeftError(Exception):
    """Says that nobody waits for a drawing any more."""


@dataclass(frozen=True)
class Look:
    """Holds what there is to see of a drawing."""

    words: str
    strip: Image.Image | None = None
    """The first images from noise on, one a row; white where they have not come to."""
    grid: Image.Image | None = None
    """The images that are done."""
    settings: PngInfo | None = None
    """Settings that made them, for the file; None until all are done."""


@dataclass(frozen=True)
class Studio:
    """Holds a checkpoint that is ready to draw with."""

    checkpoint: Checkpoint
    trained: Trained
    pipeline: UNetPipeline
    text_encoder: TextEncoder | None

    def cut_off(self, asked: Asked) -> str:
        """Say, to go on with, that the end of a prompt is not read; "" where all of it is."""
        given = {"prompt": asked.prompt, "negative prompt": asked.negative_prompt}
        encoder = self.text_encoder
        cut = [name for name, text in given.items() if text and encoder is not None and encoder.too_long([text])]
        if encoder is None or not cut:
            return ""
        return f"; the {' and the '.join(cut)} {'is' if len(cut) == 1 else 'are'} cut off after {encoder.tokens} tokens"


class Artist:
    """Draws with the newest checkpoint of a run, or with the one checkpoint that `path` is.

    One drawing is made at a time, in a thread of its own, for the pipeline has one state; others wait.
    """

    def __init__(
        self,
        path: Path,
        *,
        weights: Literal["ema", "raw"] = "ema",
        autoencoder: Path | None = None,
        text_encoder: Path | None = None,
        batch_size: int = 16,
    ) -> None:
        self.path, self.weights, self.batch_size = path, weights, batch_size
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="artist")
        self._closed = threading.Event()
        self._known: list[Path] | None = None
        self._studio: Studio | None = None

    def draw(self, asked: Asked) -> Iterator[Look]:
        """Draw, with a look at it now and then; the last one has the images. Closing the iterator stops it.

        Raises what loading and the pipeline raise where something does not fit.
        """
        looks: queue.SimpleQueue[Look | None] = queue.SimpleQueue()
        left = threading.Event()

        def work() -> None:
            try:
                self._draw(asked, looks.put, left)
            finally:
                looks.put(None)

        done = self._thread.submit(work)
        try:
            yield Look("waiting for the one before")
            while (look := looks.get()) is not None:
                yield look
            done.result()
        finally:
            left.set()

    def close(self) -> None:
        """Stop what is being drawn, and draw no more."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def open(self) -> Studio:
        """Load the newest checkpoint, where it is another than before. Raises CheckpointError where there is none."""
        known = [*list_checkpoints(self.path), *list_checkpoints(self.path / CHECKPOINTS)]
        if self._studio is None or known != self._known:
            trained = load_trained(checkpoint := find_checkpoint(self.path), self.weights)
            autoencoder = open_autoencoder(trained, self.autoencoder)
            text_encoder = read_text_encoder(trained, self.text_encoder)
            pipeline = open_pipeline(trained, autoencoder, text_encoder)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
            self._studio, self._known = Studio(checkpoint, trained, pipeline, text_encoder), known
        return self._studio

    def _draw(self, asked: Asked, show: Callable[[Look], None], left: threading.Event) -> None:
        def check() -> None:
            if left.is_set() or self._closed.is_set():
                raise LeftError("the drawing was stopped")

        check()
        show(Look("loading the newest checkpoint"))
        studio = self.open()
        trained, pipeline = studio.trained, studio.pipeline
        if trained.reads_text:
            asked = replace(asked, prompt=asked.prompt or "")
            trained.check_prompts([asked.prompt or ""], "prompt")
        texts = [text for text in (asked.prompt, asked.negative_prompt) if text is not None]
        trained.check_guidance(asked.guidance_scale, "guidance", prompts=texts if trained.reads_text else None)
        factor = pipeline.vae_scale_factor
        size = pipeline.facts().sample_size
        asked.check_size(None if size is None else (size[0] * factor, size[1] * factor), factor)
        height, width = asked.height_and_width(size, factor)
        pipeline.scheduler = trained.scheduler  # not the one before's
        pipeline.use_scheduler(asked.scheduler)
        labels = asked.labels(trained.unet.config.num_classes)
        classes = trained.unet.config.num_classes if asked.subject == IN_TURN else None
        columns = columns_in_turn(len(asked.seeds), classes)
        pictures: list[Image.Image] = []
        strip = Strip(pipeline, asked, asked.seeds[: min(SHOWN, self.batch_size)])
        shown = 0.0

        def look(_: object, step: int, timestep: Tensor, kept: dict[str, Tensor]) -> None:
            nonlocal shown
            check()
            changed = not pictures and strip.take(step + 1, kept["latents"])
            if changed or time.monotonic() > shown + PAUSE:
                words = f"step {step + 1} of {strip.steps}"
                if len(asked.seeds) > self.batch_size:
                    words = f"{len(pictures)} of {len(asked.seeds)} images are done; {words}"
                show(Look(words, strip.picture(), to_one(pictures, columns)))
                shown = time.monotonic()

        started = time.monotonic()
        for first in range(0, len(asked.seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            pictures += pipeline(
                asked.seeds[part],
                class_labels=None if labels is None else labels[part],
                prompt=asked.prompt,
                negative_prompt=asked.negative_prompt,
                guidance_scale=asked.guidance_scale,
                num_inference_steps=asked.steps,
                height=height,
                width=width,
                callback_on_step_end=look,
            ).images
        seconds = time.monotonic() - started
        words = f"{len(pictures)} images of step {studio.checkpoint.step} in {seconds:.1f} s"
        words += studio.cut_off(asked)
        show(Look(words, strip.picture(), to_one(pictures, columns), settings_of(asked, studio)))


class Strip:
    """Keeps what the first images of a drawing look like on their way from noise, and lays it out."""

    def __init__(self, pipeline: UNetPipeline, asked: Asked, seeds: Sequence[int]) -> None:
        facts = pipeline.facts()
        factor = pipeline.vae_scale_factor
        size = image_size(*asked.height_and_width(facts.sample_size, factor), facts.sample_size, factor)
        self.decode = pipeline.decode if pipeline.vae is not None else lambda images: images
        self.moments = Moments(len(seeds), (facts.channels, size[0] // factor, size[1] // factor), seeds)
        self.steps = len(set_to_steps(pipeline.scheduler, asked.steps).timesteps)
        self.columns = min(MOMENTS, self.steps + 1)
        self.taken = set(torch.linspace(0, self.steps, self.columns).round().long().tolist())
        self.images = [self.decode(self.moments.moments[0])]

    def take(self, step: int, kept: Tensor) -> bool:
        """Take what the scheduler keeps after `step` steps, where the strip shows that. Return True where it does."""
        if step not in self.taken:
            return False
        self.moments.add(kept)
        self.images.append(self.decode(self.moments.moments[-1]))
        return True

    def picture(self) -> Image.Image:
        """Lay the strip out, an image a row, and white what has not come yet."""
        white = [torch.ones_like(self.images[0])] * (self.columns - len(self.images))
        return to_grid(torch.stack([*self.images, *white], dim=1).flatten(0, 1), self.columns)


def to_one(pictures: list[Image.Image], columns: int | None) -> Image.Image | None:
    """Lay pictures out as one; None where there are none yet."""
    return tile_pixels(torch.stack([pixels_of(picture) for picture in pictures]), columns) if pictures else None


def settings_of(asked: Asked, studio: Studio) -> PngInfo:
    """Write down what made the images, as the text "unetgn" of their PNG: JSON."""
    info = PngInfo()
    settings = asdict(asked) | {"network": studio.trained.digest, "step": studio.checkpoint.step}
    info.add_text("unetgn", json.dumps(settings))
    return info
