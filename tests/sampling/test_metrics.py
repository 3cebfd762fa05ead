"""FID, KID, precision and recall against closed forms, against their definitions, and against torch-fidelity."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from tests.traced import peak_of
from unetgn.sampling import metrics
from unetgn.sampling.metrics import fid, kid, measure, precision_recall, squared_discrepancy

RANDOM = np.random.default_rng(7)


def sets(count: int, others: int, width: int, shift: float = 0.3, scale: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """Draw two sets of correlated features, in float32 as networks make them."""
    mix = RANDOM.standard_normal((width, width)) / np.sqrt(width)
    first, second = (RANDOM.standard_normal((n, width)) @ mix for n in (count, others))
    return (shift + scale * first).astype(np.float32), second.astype(np.float32)


CASES = [(50, 60, 3), (300, 200, 16), (40, 400, 64), (2100, 1500, 8)]


@pytest.mark.parametrize(("count", "others", "width"), CASES)
def test_fid_is_what_the_matrix_square_root_gives(count: int, others: int, width: int) -> None:
    """Also of sets with fewer images than features, whose covariance is singular."""
    first, second = (part.astype(np.float64) for part in sets(count, others, width))
    one, two = (np.cov(part, rowvar=False) for part in (first, second))
    root = np.real(sqrtm(one @ two))
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root)
    assert fid(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert fid(first, second) == pytest.approx(fid(second, first), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_fid_of_gaussians_is_their_distance(shift: float) -> None:
    """|m|² + Σ (s1 - s2)² for diagonal covariances, met to the accuracy of 50,000 draws."""
    deviations = np.array([0.5, 1, 2])
    first, second = RANDOM.standard_normal((50_000, 3)) + shift, RANDOM.standard_normal((50_000, 3)) * deviations
    assert fid(first, second) == pytest.approx(3 * shift**2 + ((1 - deviations) ** 2).sum(), abs=0.15)


def definition_of_kid(first: np.ndarray, second: np.ndarray) -> float:
    """Sum over pairs, one after another, in float64."""
    width = first.shape[1]

    def mean(left: np.ndarray, right: np.ndarray, *, same: bool) -> float:
        values = [
            (float(np.dot(a.astype(np.float64), b.astype(np.float64))) / width + 1) ** 3
            for i, a in enumerate(left)
            for j, b in enumerate(right)
            if not (same and i == j)
        ]
        return float(np.mean(values))

    return mean(first, first, same=True) + mean(second, second, same=True) - 2 * mean(first, second, same=False)


def test_kid_is_its_definition() -> None:
    first, second = sets(40, 40, 5)
    expected = definition_of_kid(first, second)
    assert squared_discrepancy(first, second) == pytest.approx(expected, rel=1e-12)
    assert kid(first, second) == (pytest.approx(expected, rel=1e-12), pytest.approx(0, abs=1e-12))  # each subset is all


def test_kid_of_gaussians_is_unbiased() -> None:
    """E (x·y/D + 1)³ has a closed form for independent x, y ~ N(m, I): a = x·y/D has moments of its own."""
    width, shift, count = 4, 0.5, 20
    mean = np.full(width, shift)

    def expected_kernel(left: np.ndarray, right: np.ndarray) -> float:
        """Integrate by many more draws than the test compares with."""
        random = np.random.default_rng(1)
        x, y = (random.standard_normal((200_000, width)) + m for m in (left, right))
        return float((((x * y).sum(1) / width + 1) ** 3).mean())

    zero = np.zeros(width)
    expected = expected_kernel(zero, zero) + expected_kernel(mean, mean) - 2 * expected_kernel(zero, mean)
    values = [
        squared_discrepancy(RANDOM.standard_normal((count, width)), RANDOM.standard_normal((count, width)) + shift)
        for _ in range(1500)
    ]
    assert np.mean(values) == pytest.approx(expected, abs=5 * np.std(values) / np.sqrt(len(values)) + 0.03)
    same = [squared_discrepancy(*RANDOM.standard_normal((2, count, width))) for _ in range(1500)]
    assert abs(np.mean(same)) < 5 * np.std(same) / np.sqrt(len(same))


def test_subsets_of_kid_are_those_of_the_seed_and_as_large_as_both_sets_allow() -> None:
    first, second = sets(300, 90, 4)
    assert kid(first, second, seed=3) == kid(first, second, seed=3) != kid(first, second, seed=4)
    subset = kid(first, second, subsets=400, size=50)
    assert subset[0] == pytest.approx(squared_discrepancy(first, second), abs=4 * subset[1] / 20)


def definition_of_precision(points: np.ndarray, centres: np.ndarray, neighbour: int) -> float:
    radii = np.sort(cdist(centres, centres), 1)[:, neighbour]
    return float((cdist(points, centres) <= radii).any(1).mean())


@pytest.mark.parametrize("chunk", [7, 64, 4096])
@pytest.mark.parametrize("neighbour", [1, 3, 5])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_precision_and_recall_are_their_definitions_for_every_chunk(
    chunk: int, neighbour: int, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    first, second = (part.astype(np.float64) + mean for part in sets(130, 90, 6, shift=0.8))
    expected = definition_of_precision(first, second, neighbour), definition_of_precision(second, first, neighbour)
    assert precision_recall(first, second, neighbour=neighbour) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_known_sets() -> None:
    first, second = sets(200, 200, 6, shift=0, scale=1)
    assert precision_recall(first, first) == (1, 1)
    assert precision_recall(first, first + 1000) == (0, 0)
    assert precision_recall(first[:100], second + 0)[0] > 0.5
    narrow = first[:1] + 1e-3 * RANDOM.standard_normal((200, 6))  # all beside one real image: no diversity
    precision, recall = precision_recall(narrow.astype(np.float32), first)
    assert precision == 1
    assert recall < 0.05


@pytest.mark.parametrize("chunk", [3, 17, 1024])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_copies_lie_in_balls_without_extent(offset: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five copies of each image: the third neighbour is at distance 0, and rounding must not part it from them."""
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    images = (RANDOM.standard_normal((20, 777)) + offset).astype(np.float32)
    assert precision_recall(images, np.repeat(images, 5, axis=0)) == (1, 1)


def test_memory_does_not_grow_with_the_square_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 100)

    def peak(count: int) -> int:
        first, second = RANDOM.standard_normal((2, count, 4))
        return peak_of(lambda: precision_recall(first, second))

    few, many = peak(500), peak(1500)
    assert many - few < 1000 * 4 * 8 * 8  # rows of features, not pairs of them


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), "3 samples; 4 or more"),
        (np.zeros((9, 2)), np.zeros((2, 2)), "2 real images; 4 or more"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "2 features, real images 3"),
        (np.full((9, 2), np.inf), np.zeros((9, 2)), "samples are not all finite"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), "real images are not all finite"),
        (np.zeros((9, 2, 2)), np.zeros((9, 2)), r"shape \(9, 2, 2\)"),
    ],
)
def test_sets_without_metrics_are_refused(first: np.ndarray, second: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(first, second)


@pytest.fixture(scope="module")
def fidelity() -> dict[str, Callable[..., dict[str, float]]]:
    try:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is for another torch
        pytest.skip(f"torch-fidelity cannot be imported: {error}")

    def fid_features_to_metric(*sets: torch.Tensor, verbose: bool) -> dict[str, float]:
        return fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose)

    return {"fid": fid_features_to_metric, "kid": kid_features_to_metric, "prc": prc_features_to_metric}


@pytest.mark.parametrize(("count", "others", "width"), CASES)
def test_torch_fidelity_says_the_same(count: int, others: int, width: int, fidelity: dict[str, Any]) -> None:
    first, second = sets(count, others, width)
    given = tuple(torch.from_numpy(part).double() for part in (first, second))
    ours = measure(first, second)
    theirs = fidelity["fid"](*given, verbose=False)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6, abs=1e-6)
    theirs = fidelity["prc"](*given, verbose=False)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    size = min(count, others)
    same = tuple(part[:size] for part in given)  # a subset that is all of the set is the same for both
    theirs = fidelity["kid"](*same, kid_subsets=2, kid_subset_size=size, verbose=False)
    mean, _ = kid(first[:size], second[:size], subsets=2, size=size)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    subsets, theirs = (kid(first, second, size=30), fidelity["kid"](*given, kid_subset_size=30, verbose=False))
    error = 5 * theirs["kernel_inception_distance_std"] / 10
    assert subsets[0] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=error)
