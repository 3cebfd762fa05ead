"""Judges samples against real images: the figures, and the facts without which they cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator

from unetgn.programs.last_words import say
from unetgn.sampling.extractors import Extractor
from unetgn.sampling.features import compute_features, kept_features
from unetgn.sampling.figures import agreement, fit_classifier, frechet_distance, novelty
from unetgn.sampling.metrics import NEIGHBOUR, measure
from unetgn.sampling.sets import EvaluationError, Pictures, check_shapes, open_samples

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

    def check(self, count: int) -> None:
        """Raise EvaluationError where `count` samples like the real images could not be judged. None need be there."""
        if self.extractor is None:
            if count < 2:
                raise EvaluationError(f"there are {count} samples; a distribution needs several")
        elif count <= NEIGHBOUR:
            raise EvaluationError(f"there are {count} samples; {NEIGHBOUR + 1} or more are needed")
        else:
            kept_features(self.extractor, self._reference()[0], self.accelerator, folder=self.kept)

    def judge(self, samples: Path) -> dict[str, Any]:
        """Compute the figures of a set, with the number of samples; on all but the main process only its share.

        Figures of real images, which are what samples could reach, end in _of_real. Raises EvaluationError.
        """
        pictures, labels = open_samples(samples)
        pictures = check_shapes(pictures, self.real.all)
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
        fitted = spread(real.training, FITTED)
        classes = real.labels(fitted)
        if labels.min() >= 0 and classes.min() >= 0 and len(set(classes)) > 1:
            classifier = fit_classifier(np.stack(list(fitted)), classes)
            figures["label_agreement"] = agreement(classifier, pictures, labels)
            if len(real.held_out):
                figures["label_agreement_of_real"] = agreement(classifier, real.held_out, real.labels(real.held_out))
        figures["frechet_distance"] = frechet_distance(pictures, real.all)
        if len(real.held_out):
            try:
                figures["novelty"] = novelty(pictures, real.training, real.held_out)
            except ValueError as error:
                say(f"evaluate.py: novelty is left out: {error}; give a --config whose images differ")
        return figures


def spread(pictures: Pictures, count: int) -> Pictures:
    """Return `count` of the pictures, or all where there are fewer, evenly spread."""
    return pictures.part(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int))
