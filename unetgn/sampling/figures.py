"""Compares sets of images without a network that has to be downloaded: distribution, classes, copies.

A set is anything that gives its images one after another, as often as asked, each a vector (D,): an array (N, D), or
files that are read on the way. No memory grows with N but a number for each image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

BLOCK = 256  # images that are looked at together
KEPT = 4096  # images that are kept while others are read past them

Rows = Iterable[np.ndarray]
Moments = tuple[np.ndarray, np.ndarray]


def blocks(rows: Rows, size: int) -> Iterator[np.ndarray]:
    """Give the rows in arrays of `size` of them, the last one of what is left."""
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield np.stack(part)


def moments(rows: Rows) -> Moments:
    """Compute mean (D,) and covariance (D, D), as numpy.cov does, block by block.

    Each block is centred on its own mean (Chan, Golub & LeVeque 1983, The American Statistician 37, 242-247).
    """
    count, mean, scatter = 0, np.zeros(1), np.zeros(1)
    for block in blocks(rows, BLOCK):
        added, own = len(block), block.mean(0)
        total, step = count + added, own - mean
        centred = block - own
        scatter = scatter + centred.T @ centred + np.outer(step, step) * (count * added / total)
        mean, count = mean + step * (added / total), total
    return mean, np.atleast_2d(scatter / (count - 1))


def frechet_distance(first: Rows, second: Rows) -> float:
    """Compute the squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of vectors (N, D).

    |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), Dowson & Landau 1982; on Inception features it is the FID (Heusel et al.
    2017, arXiv 1706.08500). Here the vectors are the pixels themselves, in [0, 1].
    """
    return distance_of_moments(moments(first), moments(second))


def distance_of_moments(first: Moments, second: Moments) -> float:
    """Compute the same of means (D,) and covariances (D, D)."""
    (mean1, one), (mean2, two) = first, second
    step = mean1 - mean2
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(values.clip(min=0))  # root @ root.T is `one`
    # (S1 S2) has the eigenvalues of root.T S2 root, which is symmetric: they are not negative, but for rounding.
    eigenvalues = np.linalg.eigvalsh(root.T @ two @ root).clip(min=0)
    return float(step @ step + np.trace(one + two) - 2 * np.sqrt(eigenvalues).sum())


def fit_classifier(real: np.ndarray, labels: np.ndarray) -> SVC:
    """Train a support vector machine on images (N, D); its kernel's width follows the spread of their values."""
    return SVC(gamma="scale").fit(real, labels)


def agreement(classifier: SVC, rows: Rows, labels: np.ndarray) -> float:
    """Compute the share of images in which the classifier sees their label."""
    seen = np.concatenate([classifier.predict(block) for block in blocks(rows, BLOCK)])
    return float((seen == labels).mean())


def label_agreement(samples: Rows, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Compute the share of samples in which a support vector machine, fitted to real images, sees the right class."""
    return agreement(fit_classifier(real, real_labels), samples, labels)


def nearest(rows: Rows, others: Rows) -> np.ndarray:
    """Compute the distance of each row to the nearest of the others, (N,)."""
    distances = []
    for kept in blocks(rows, KEPT):
        least = np.full(len(kept), np.inf)
        for block in blocks(others, BLOCK):
            least = np.minimum(least, cdist(kept, block).min(1))
        distances.append(least)
    return np.concatenate(distances)


def distance(rows: Rows, training: Rows) -> float:
    """Compute the median distance of rows to their nearest training image."""
    return float(np.median(nearest(rows, training)))


def spacing(training: Rows, held_out: Rows) -> float:
    """Compute the distance of real held-out images, the unit of novelty.

    Raises ValueError where the held-out images are copies themselves, half of them or more.
    """
    if (unit := distance(held_out, training)) == 0:
        raise ValueError("half of the held-out images or more are also among the training images")
    return unit


def novelty(samples: Rows, training: Rows, held_out: Rows) -> float:
    """Compute the median distance of samples to their nearest training image, over that of real held-out images.

    1: as far from the training images as unseen real ones are; near 0: the samples are copies. Raises ValueError as
    `spacing` does.
    """
    return distance(samples, training) / spacing(training, held_out)
