"""Judges samples against real images: the figures, and the facts without which they cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator

from unetgn.programs.last_words import say
from unetgn.sampling.extractors import Extractor
from unetgn.sampling.features import compute_features, kept_features
from unetgn.sampling.figures import (
    Moments,
    agreement,
    distance,
    distance_of_moments,
    fit_classifier,
    moments,
    spacing,
)
from unetgn.sampling.metrics import NEIGHBOUR, measure
from unetgn.sampling.sets import EvaluationError, Pictures, check_shape, check_shapes, open_samples, shape_of
from unetgn.training.processes import ask_main
from unetgn.training.run_directory import OF_FEATURES

NEEDED = {
    "label_agreement": "samples of classes, and a --config whose images are of several",
    "novelty": "a --config with real images that are held out, and are no copies of others",
}
FITTED = 5000  # real images that the classifier is fitted to at most

Part = Literal["held_out", "training", "all"]


@dataclass(frozen=True)
class Real:
    """Holds the real images that samples are compared with."""

    all: Pictures
    training: Pictures
    held_out: Pictures
    labels: Callable[[Pictures], np.ndarray]
    """Reads the labels of pictures, -1 where there are none."""
    source: str = ""
    """Says where they are: the configuration, or the path."""
    data: str = ""
    """The configuration's data.name, which has an extractor of its own or not."""


@dataclass(frozen=True)
class Ahead:
    """Tells what samples will be that are not drawn yet."""

    count: int
    shape: tuple[int, ...]
    """(C, H, W) of each."""
    labelled: bool
    """Says whether they are of classes."""


@dataclass(frozen=True)
class Judge:
    """Compares sets of samples with the same real images, in the same features."""

    real: Real
    accelerator: Accelerator
    part: Part
    """Names the real images whose features are the reference."""
    extractor: Extractor | None
    """Makes the features; None leaves the metrics out that need them."""
    kept: Path
    """Folder where features of real images are kept."""

    def check(self, ahead: Ahead, metric: str | None = None) -> None:
        """Raise EvaluationError where samples could not be judged, or not in `metric`. None need be there.

        Figures of the real images alone are computed, and kept for `judge`.
        """
        least = 2 if self.extractor is None else NEIGHBOUR + 1
        if ahead.count < least:
            raise EvaluationError(f"there are {ahead.count} samples; {least} or more are needed")
        ask_main(self.accelerator, lambda: self._check_real(ahead, metric))
        if self.extractor is not None:
            kept_features(self.extractor, self._reference()[0], self.accelerator, folder=self.kept)

    def _check_real(self, ahead: Ahead, metric: str | None) -> None:
        check_shape("what the checkpoint draws", ahead.shape, shape_of(self.real.all))
        there = self.figures(labelled=ahead.labelled)
        if metric is not None and metric not in there:
            needed = NEEDED.get(metric, "an --extractor")
            raise EvaluationError(f"--metric {metric} needs {needed}; without, there are {', '.join(there)}")
        _ = self._real_moments  # which reads every real image

    def figures(self, *, labelled: bool) -> list[str]:
        """Name the figures that can be measured of samples, of classes or not; on the main process."""
        return [
            *(["label_agreement"] if labelled and self._has_classes else []),
            "frechet_distance",
            *(["novelty"] if self._unit is not None else []),
            *(OF_FEATURES if self.extractor is not None else []),
        ]

    @cached_property
    def _fitted(self) -> Pictures:
        return spread(self.real.training, FITTED)

    @cached_property
    def _has_classes(self) -> bool:
        classes = self.real.labels(self._fitted)
        return bool(classes.min() >= 0 and len(set(classes)) > 1)

    @cached_property
    def _real_moments(self) -> Moments:
        return moments(self.real.all)

    @cached_property
    def _unit(self) -> float | None:
        """Return the unit of novelty; None where there is none, which is said."""
        if not len(self.real.held_out):
            return None
        try:
            return spacing(self.real.training, self.real.held_out)
        except ValueError as error:
            say(f"evaluate.py: novelty is left out: {error}; give a --config whose images differ")
            return None

    def judge(self, samples: Path) -> dict[str, Any]:
        """Compute the figures of a set, with the number of samples; on all but the main process only its share.

        Figures of real images, which are what samples could reach, end in _of_real. Raises EvaluationError.
        """
        pictures, labels = open_samples(samples)
        pictures = check_shapes(pictures, shape_of(self.real.all))
        metrics = {} if self.extractor is None else self._metrics(self.extractor, pictures)
        if not self.accelerator.is_main_process:
            return {}
        return {"samples": len(pictures), **self._pixels(pictures, labels), **metrics}

    def _reference(self) -> tuple[Pictures, Pictures]:
        """Return the images whose features are the reference, and the others. Raises EvaluationError for too few."""
        reference, others = {
            "held_out": (self.real.held_out, self.real.training),
            "training": (self.real.training, self.real.held_out),
            "all": (self.real.all, self.real.all.part(slice(0))),
        }[self.part]
        if len(reference) <= NEIGHBOUR:
            raise EvaluationError(
                f"{self.real.source} has {len(reference)} images in its part {self.part}: give another --reference"
            )
        return reference, others

    def _metrics(self, extractor: Extractor, pictures: Pictures) -> dict[str, Any]:
        reference, others = self._reference()
        real, digest = kept_features(extractor, reference, self.accelerator, folder=self.kept)
        found = compute_features(extractor, pictures, self.accelerator)
        chosen = spread(others, len(pictures))
        enough = len(chosen) > NEIGHBOUR
        unseen = kept_features(extractor, chosen, self.accelerator, folder=self.kept)[0] if enough else None
        if not self.accelerator.is_main_process:
            return {}
        try:
            figures: dict[str, Any] = measure(found, real)
            if unseen is not None:
                figures |= {f"{name}_of_real": figure for name, figure in measure(unseen, real).items()}
                figures["images_of_real"] = len(unseen)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        return {
            **figures,
            "extractor": {"name": extractor.name, "sha256": extractor.digest, "features": real.shape[1]},
            "reference": {"source": self.real.source, "part": self.part, "images": len(reference), "sha256": digest},
        }

    def _pixels(self, pictures: Pictures, labels: np.ndarray) -> dict[str, float]:
        real, figures = self.real, {}
        there = self.figures(labelled=bool(labels.min() >= 0))
        if "label_agreement" in there:
            classifier = fit_classifier(np.stack(list(self._fitted)), real.labels(self._fitted))
            figures["label_agreement"] = agreement(classifier, pictures, labels)
            if len(real.held_out):
                figures["label_agreement_of_real"] = agreement(classifier, real.held_out, real.labels(real.held_out))
        figures["frechet_distance"] = distance_of_moments(moments(pictures), self._real_moments)
        if self._unit is not None:
            figures["novelty"] = distance(pictures, real.training) / self._unit
        return figures


def spread(pictures: Pictures, count: int) -> Pictures:
    """Return `count` of the pictures, or all where there are fewer, evenly spread."""
    return pictures.part(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int))
