"""Compares two sets of features (N, D) of images: FID, KID, precision and recall, all in float64.

Features are numbers that a network makes of an image (unetgn/sampling/extractors.py). The same formulas hold for any;
figures of different extractors cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unetgn.sampling.figures import frechet_distance

SUBSETS, SUBSET = 100, 1000  # of KID: how many subsets of each set are compared, and features in one
NEIGHBOUR = 3  # of precision and recall: the neighbour that a ball reaches to
CHUNK = 1024  # features whose distances to as many others are held at one time
ROUNDING = 1e-13  # squared distances below this share of the squared norms are none: float64 knows no better


def measure(samples: np.ndarray, real: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Compute all metrics: fid, kid, kid_std (over its subsets), precision and recall."""
    check(samples, real)
    mean, deviation = kid(samples, real, seed=seed)
    precision, recall = precision_recall(samples, real)
    return {"fid": fid(samples, real), "kid": mean, "kid_std": deviation, "precision": precision, "recall": recall}


def check(samples: np.ndarray, real: np.ndarray) -> None:
    """Raise ValueError where the metrics of two sets are not defined."""
    for name, features in (("samples", samples), ("real images", real)):
        if features.ndim != 2:
            raise ValueError(f"the features of the {name} have the shape {features.shape}; one row an image is needed")
        if len(features) <= NEIGHBOUR:
            raise ValueError(f"there are {len(features)} {name}; {NEIGHBOUR + 1} or more are needed")
        if not np.isfinite(features).all():
            raise ValueError(f"the features of the {name} are not all finite: the extractor overflows")
    if samples.shape[1] != real.shape[1]:
        raise ValueError(f"samples have {samples.shape[1]} features, real images {real.shape[1]}: take one extractor")


def fid(samples: np.ndarray, real: np.ndarray) -> float:
    """Compute the Fréchet distance of Gaussians fitted to features, the FID of Heusel et al. 2017 (arXiv 1706.08500).

    It is biased upward where images are few: compare values of equal numbers of images.
    """
    return frechet_distance(samples.astype(np.float64), real.astype(np.float64))


def kid(
    samples: np.ndarray, real: np.ndarray, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0
) -> tuple[float, float]:
    """Compute the squared maximum mean discrepancy of Bińkowski et al. 2018 (arXiv 1801.01401, section 4), unbiased.

    Mean and standard deviation over random subsets of `size` features, or of all where a set has fewer. About 0, also
    below, where both sets are of one distribution.
    """
    size = min(size, len(samples), len(real))
    random = np.random.default_rng(seed)
    values = [
        squared_discrepancy(*(part[random.choice(len(part), size, replace=False)] for part in (samples, real)))
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def squared_discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the unbiased squared MMD of two sets (M, D), with the kernel k(x, y) = (x·y / D + 1)³.

    The mean of k over pairs of different features of each set, less twice its mean over pairs of both sets (Gretton et
    al. 2012, JMLR 13, equation 3).
    """
    first, second = first.astype(np.float64), second.astype(np.float64)

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left @ right.T / left.shape[1] + 1) ** 3

    def within(features: np.ndarray) -> float:
        values, count = kernel(features, features), len(features)
        return (values.sum() - np.trace(values)) / (count * (count - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def precision_recall(samples: np.ndarray, real: np.ndarray, *, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Compute precision and recall by nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991, section 2).

    Precision is the share of samples that lie in a ball around a real image, whose radius is the distance to its third
    nearest other real image; recall is the share of real images that lie in such a ball around a sample.
    """
    centre = real.mean(0, dtype=np.float64)  # distances do not change, and lose fewer digits
    samples, real = samples - centre, real - centre
    return covered(samples, real, neighbour), covered(real, samples, neighbour)


def covered(points: np.ndarray, centres: np.ndarray, neighbour: int) -> float:
    """Compute the share of points that lie in the ball of a centre, border included."""
    radii = squared_radii(centres, neighbour)
    inside = [
        np.logical_or.reduce([(part <= radii[columns]).any(1) for columns, part in parts])
        for parts in distances(points, centres)
    ]
    return float(np.concatenate(inside).mean())


def squared_radii(features: np.ndarray, neighbour: int) -> np.ndarray:
    """Compute the squared distance of each feature to its nearest others' last, (N,)."""
    radii = []
    for parts in distances(features, features):
        least: np.ndarray | None = None
        for _, part in parts:  # of all distances so far the smallest; each feature's to itself is among them
            together = part if least is None else np.concatenate([least, part], 1)
            kept = min(neighbour, together.shape[1] - 1)
            least = np.partition(together, kept, 1)[:, : kept + 1]
        assert least is not None
        radii.append(least.max(1))
    return np.concatenate(radii)


def distances(rows: np.ndarray, columns: np.ndarray) -> Iterator[Iterator[tuple[slice, np.ndarray]]]:
    """Give for each chunk of rows its squared distances to chunks of columns: which columns, and (rows, columns)."""
    norms = np.square(columns).sum(1)

    def parts(chunk: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        own = np.square(chunk).sum(1)[:, None]
        for start in range(0, len(columns), CHUNK):
            which = slice(start, start + CHUNK)
            scale = own + norms[which]
            squares = scale - 2 * chunk @ columns[which].T
            squares[squares <= ROUNDING * scale] = 0
            yield which, squares

    for start in range(0, len(rows), CHUNK):
        yield parts(rows[start : start + CHUNK])
