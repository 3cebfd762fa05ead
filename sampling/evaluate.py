"""Judges samples against real images: python sampling/evaluate.py --samples DIR [--config NAME] [--out FILE]

Three figures, without a network that has to be downloaded, for small images such as the embedded digits:
label_agreement, frechet_distance and novelty. They are printed, and written as JSON.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from training.config_files import find_config, load_config
from training.data.config import open_images, split
from training.data.pictures import open_picture
from training.errors import ConfigError
from training.files import user_path, write_json


class EvaluationError(Exception):
    """Says that the samples cannot be judged, and why."""


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of vectors (N, D).

    |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), Dowson & Landau 1982; on Inception features it is the FID (Heusel et al.
    2017, arXiv 1706.08500). Here the vectors are the pixels themselves, in [0, 1].
    """
    mean = first.mean(0) - second.mean(0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The trace of the root is the sum of the eigenvalues' roots; these are real and not negative, but for rounding.
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    return float(mean @ mean + np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(eigenvalues).sum())


def label_agreement(samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Compute the share of samples in which a support vector machine, fitted to real images, sees the right class."""
    machine = SVC(
        gamma=0.001 * 16**2
    )  # 0.001 suits digits in 0 .. 16 (scikit-learn's example); here they are in 0 .. 1
    return float((machine.fit(real, real_labels).predict(samples) == labels).mean())


def novelty(samples: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> float:
    """Compute the median distance of samples to their nearest training image, over that of real held-out images.

    1: as far from the training images as unseen real ones are; near 0: the samples are copies.
    """
    return float(np.median(cdist(samples, training).min(1)) / np.median(cdist(held_out, training).min(1)))


def read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read pixels (N, D) in [0, 1] and class labels (N,), -1 without classes, as sampling/sample.py wrote them."""
    listing = folder / "samples.csv"
    if not listing.is_file():
        raise EvaluationError(f"{folder} holds no samples.csv: make samples with sampling/sample.py --out {folder}")
    with listing.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if len(rows) < 2:
        raise EvaluationError(f"{folder} holds {len(rows)} sample(s); a distribution needs several")
    try:
        pixels = [np.asarray(open_picture(folder / row["file"]), dtype=np.float64).ravel() / 255 for row in rows]
        return np.stack(pixels), np.array([int(row["class_label"] or -1) for row in rows])
    except (KeyError, ValueError, OSError) as error:
        raise EvaluationError(f"{listing} and its images are not as sampling/sample.py writes them: {error}") from error


def read_real(config: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read real pixels (N, D) in [0, 1], their labels, and the numbers of the training and of the held-out ones."""
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
    pixels = np.stack([(images.image(i).transpose(1, 2, 0).ravel().astype(np.float64) + 1) / 2 for i in usable])
    training, held_out = split(len(usable), run.data.held_out)
    if not len(held_out):
        raise EvaluationError(f"{config} holds nothing out (data.held_out is 0), so novelty cannot be measured")
    return pixels, np.array([images.label(i) for i in usable]), training, held_out


def evaluate(samples: Path, config: str) -> dict[str, float | int]:
    """Compute the three figures, with the number of samples."""
    pixels, labels = read_samples(samples)
    real, real_labels, training, held_out = read_real(config)
    if pixels.shape[1] != real.shape[1]:
        raise EvaluationError(f"the samples have {pixels.shape[1]} values, the images of {config} {real.shape[1]}")
    figures: dict[str, float | int] = {"samples": len(pixels)}
    if labels.min() >= 0 and real_labels.min() >= 0:
        figures["label_agreement"] = label_agreement(pixels, labels, real, real_labels)
    figures["frechet_distance"] = frechet_distance(pixels, real)
    figures["novelty"] = novelty(pixels, real[training], real[held_out])
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 2 where the request cannot be met."""
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
    try:
        figures = evaluate(parsed.samples, parsed.config)
        out = parsed.out or parsed.samples / "evaluation.json"
        write_json(out, figures)
    except (EvaluationError, ConfigError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    for name, figure in figures.items():
        print(f"{name:>18}  {figure:.4g}")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
