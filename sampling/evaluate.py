"""Judges samples against real images: python sampling/evaluate.py --samples DIR [--config NAME] [--out FILE]

Three figures, without a network that has to be downloaded, for small images such as the embedded digits:
label_agreement, with what real images that were held out reach, frechet_distance and novelty. They are printed, then
written as JSON. Images above 32 pixels are first averaged down to that.
"""

from __future__ import annotations

from training.last_words import last_words  # the first of all

# isort: split
import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sampling.figures import agreement, fit_classifier, frechet_distance, label_agreement, novelty
from sampling.folder import read_pixels
from training.config_files import find_config, load_config
from training.data.config import open_images, split_images
from training.errors import ConfigError
from training.files import user_path, write_json

__all__ = ["evaluate", "frechet_distance", "label_agreement", "novelty", "read_real", "read_samples"]

LARGEST = 32  # pixels: height and width that images are judged at
FITTED = 5000  # real images that the classifier is fitted to at most


class EvaluationError(Exception):
    """Says that the samples cannot be judged, and why."""


@dataclass(frozen=True)
class Pictures:
    """Gives images as vectors (D,) in [0, 1], each read when it is asked for."""

    read: Callable[[int], np.ndarray]
    """Reads image n as (C, H, W) in [0, 1]."""
    numbers: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in self.numbers:
            image = torch.from_numpy(np.ascontiguousarray(self.read(int(number)), dtype=np.float64))
            size = min(image.shape[1], LARGEST), min(image.shape[2], LARGEST)
            yield torch.nn.functional.adaptive_avg_pool2d(image, size).permute(1, 2, 0).numpy().ravel()


def read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read samples (N, D) in [0, 1] and their classes (N,), -1 without, all at once: as many as the memory holds."""
    pictures, labels = open_samples(folder)
    return np.stack(list(pictures)), labels


def open_samples(folder: Path) -> tuple[Pictures, np.ndarray]:
    """Open samples, as sampling/sample.py wrote them, with their classes (N,), -1 without."""
    listing = folder / "samples.csv"
    if not listing.is_file():
        raise EvaluationError(f"{folder} holds no samples.csv: make samples with sampling/sample.py --out {folder}")
    try:
        with listing.open(newline="") as lines:
            rows = [(row["file"], int(row["class_label"] or -1)) for row in csv.DictReader(lines)]
    except (KeyError, ValueError, TypeError) as error:
        raise EvaluationError(f"{listing} is not as sampling/sample.py writes it: {error!r}") from error
    if len(rows) < 2:
        raise EvaluationError(f"{folder} holds {len(rows)} sample(s); a distribution needs several")

    def read(number: int) -> np.ndarray:
        file = folder / rows[number][0]
        try:
            image = read_pixels(file).transpose(2, 0, 1) / 255
        except OSError as error:
            raise EvaluationError(f"{file}, which {listing} names, cannot be read: {error}") from error
        return image

    return Pictures(read, range(len(rows))), np.array([label for _, label in rows])


def check_shapes(pictures: Pictures, real: Pictures) -> Pictures:
    """Return `pictures` so that reading one of another shape than real images have is an EvaluationError."""
    shape = real.read(int(real.numbers[0])).shape

    def read(number: int) -> np.ndarray:
        image = pictures.read(number)
        if image.shape != shape:
            raise EvaluationError(
                f"sample {number} has the shape (C, H, W) {image.shape}, the real images have {shape}"
            )
        return image

    return Pictures(read, pictures.numbers)


@dataclass(frozen=True)
class Real:
    """Holds the real images that samples are compared with."""

    all: Pictures
    training: Pictures
    held_out: Pictures
    labels: Callable[[Pictures], np.ndarray]
    """Reads the labels of pictures, -1 where there are none."""


def open_real(config: str) -> Real:
    """Open the real images that a configuration names, training and held-out ones."""
    run = load_config(find_config(config))
    if run.data.name == "latents":
        raise EvaluationError(
            f"{config} trains on latents: give as --config one whose keys data.* name the real images"
        )
    try:
        images = open_images(run.data, run.model.in_channels)
        usable = images.usable()
    except ValueError as error:
        raise EvaluationError(f"the real images of {config}: {error}") from error
    training, held_out = split_images(images, usable, run.data.held_out)
    if not len(held_out):
        raise EvaluationError(f"{config} holds nothing out (data.held_out is 0), so novelty cannot be measured")

    def read(number: int) -> np.ndarray:
        return (images.image(number) + 1) / 2

    return Real(
        Pictures(read, usable),
        Pictures(read, training),
        Pictures(read, held_out),
        lambda pictures: np.array([images.label(int(number)) for number in pictures.numbers]),
    )


def read_real(config: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read real images (N, D) in [0, 1], their labels, and the numbers of training and held-out ones, all at once."""
    real = open_real(config)
    place = {int(number): place for place, number in enumerate(real.all.numbers)}
    training, held_out = ([place[int(number)] for number in part.numbers] for part in (real.training, real.held_out))
    return np.stack(list(real.all)), real.labels(real.all), np.array(training), np.array(held_out)


def evaluate(samples: Path, config: str) -> dict[str, float | int]:
    """Compute the figures, with the number of samples."""
    real = open_real(config)
    pictures, labels = open_samples(samples)
    pictures = check_shapes(pictures, real.all)
    figures: dict[str, float | int] = {"samples": len(pictures)}
    evenly = np.linspace(0, len(real.training) - 1, min(FITTED, len(real.training))).round().astype(int)
    fitted = Pictures(real.training.read, np.asarray(real.training.numbers)[evenly])
    classes = real.labels(fitted)
    if labels.min() >= 0 and classes.min() >= 0 and len(set(classes)) > 1:
        classifier = fit_classifier(np.stack(list(fitted)), classes)
        figures["label_agreement"] = agreement(classifier, pictures, labels)
        figures["label_agreement_of_real"] = agreement(classifier, real.held_out, real.labels(real.held_out))
    figures["frechet_distance"] = frechet_distance(pictures, real.all)
    figures["novelty"] = novelty(pictures, real.training, real.held_out)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 where the request cannot be met."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=user_path, required=True, help="folder that sampling/sample.py wrote")
    parser.add_argument("--config", default="digits8_ddpm", help="configuration that names the real images, such as "
                        "RUN/config.yaml (default: digits8_ddpm)")  # fmt: skip
    parser.add_argument(
        "--out", type=user_path, help="JSON file to write (default: evaluation.json beside the samples)"
    )
    parsed = parser.parse_args(arguments)
    out = parsed.out or parsed.samples / "evaluation.json"
    try:
        figures = evaluate(parsed.samples, parsed.config)
        for name, figure in figures.items():
            print(f"{name:>23}  {figure:.4g}", flush=True)
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("evaluate.py", error)
    except (EvaluationError, ConfigError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    try:
        write_json(out, figures)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"evaluate.py: {error}; the figures above are whole", file=sys.stderr)
        return 1
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
