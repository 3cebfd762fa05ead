"""Judges a run while it trains: images of the averaged weights against those held out, by features of an extractor.

It is what sampling/evaluate.py does afterwards, with fewer images. What makes features is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unetgn import UNet
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.errors import ConfigError
from unetgn.training.preview import BATCH, Conditions, PreviewConfig, draw_images

LEAST = 4  # images, of either side: the metrics look at third neighbours


@dataclass(frozen=True)
class EvaluateConfig:
    """Configures the judgement during training, for which images are drawn as those of a preview are."""

    every: int = 0
    """Steps between two judgements, in evaluation.csv and for the trackers; 0 is off. It needs data.held_out."""
    count: int = 256
    """Images drawn, of the same seeds every time; figures of other numbers of images do not compare."""
    metric: Literal["fid", "kid"] = "fid"
    """Metric that the best checkpoint has the least of: it is saved, stays, and checkpoints/best leads to it."""
    extractor: str | None = None
    """Network that makes features, as for sampling/evaluate.py --extractor; null takes that of the data."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"evaluate.every is {self.every}; it must not be negative (0 is off)")
        if self.count < LEAST:
            raise ValueError(f"evaluate.count is {self.count}; at least {LEAST} images are needed")


class Evaluator:
    """Draws images and measures how far their features are from those of the images held out."""

    def __init__(
        self,
        config: EvaluateConfig,
        preview: PreviewConfig,
        held_out: IndexedSamples,
        conditions: Conditions,
        *,
        data: str,
        device: torch.device,
    ) -> None:
        """Compute the features of the real images. Raises ConfigError where there are too few, or no extractor."""
        from unetgn.sampling.extractors import default_name, open_extractor
        from unetgn.sampling.sets import EvaluationError

        self.drawing, self.conditions = replace(preview, count=config.count), conditions
        if len(held_out.indices) < LEAST:
            raise ConfigError(
                f"evaluate.every is {config.every}, but data.held_out leaves {len(held_out.indices)} images to compare "
                f"with: at least {LEAST} are needed; raise data.held_out, or set evaluate.every to 0"
            )
        try:
            self.extractor: Any = open_extractor(config.extractor or default_name(data), device)
            self.real = self.features(held_out.images.image(int(index)) for index in held_out.indices)
        except EvaluationError as error:
            raise ConfigError(
                f"evaluate.every is {config.every}, but there are no features (evaluate.extractor is "
                f"{config.extractor or 'null'}, data.name {data}): {error}"
            ) from error

    def features(self, images: Iterable[np.ndarray | Tensor]) -> np.ndarray:
        """Compute the features (N, D) of images (C, H, W) in [-1, 1], as files of 8 bits have them.

        They are read a batch at a time: no memory grows with their number.
        """
        left, parts = iter(images), []
        while batch := [torch.as_tensor(image).float() for image in islice(left, BATCH)]:
            pixels = ((torch.stack(batch) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            parts.append(self.extractor(pixels).numpy())
        return np.concatenate(parts)

    def judge(self, unet: UNet, scheduler: Any, *, on_step: Callable[[], None]) -> dict[str, float]:
        """Draw images and compute fid, kid, precision and recall; `on_step` is called between sampling steps."""
        from unetgn.sampling.metrics import measure

        drawn: list[Tensor] = draw_images(unet, scheduler, self.conditions, self.drawing, on_step=on_step)
        figures = measure(self.features(torch.cat(drawn).cpu()), self.real)
        return {name: figures[name] for name in ("fid", "kid", "precision", "recall")}
