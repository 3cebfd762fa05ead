"""The three figures against their definitions, and against what is known of the digits."""

import numpy as np
import pytest
import torch

from sampling.evaluate import frechet_distance, label_agreement, novelty
from training.data.config import split
from training.data.images import Digits


def digits() -> tuple[np.ndarray, np.ndarray]:
    images = Digits()
    pixels = np.stack([(images.image(i).ravel().astype(np.float64) + 1) / 2 for i in range(len(images))])
    return pixels, np.array([images.label(i) for i in range(len(images))])


def test_the_frechet_distance_of_known_gaussians_is_the_closed_form() -> None:
    """For diagonal covariances it is |m1 - m2|² + Σ (s1 - s2)²; whitening makes sets with exactly these moments."""
    random = np.random.default_rng(0)

    def with_moments(mean: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        raw = random.standard_normal((50, 3))
        raw -= raw.mean(0)
        white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
        return mean + white * deviations

    means, deviations = np.array([[0, 1, 2.0], [1, 1, 0]]), np.array([[1, 2, 3.0], [2, 2, 0.5]])
    first, second = (with_moments(m, d) for m, d in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_two_halves_of_the_digits_are_as_far_apart_as_is_known() -> None:
    pixels, _ = digits()
    order = np.random.default_rng(0).permutation(len(pixels))
    assert 0.055 < frechet_distance(pixels[order[:898]], pixels[order[898:]]) < 0.08


def test_the_machine_agrees_with_true_labels_and_not_with_wrong_ones() -> None:
    pixels, labels = digits()
    assert label_agreement(pixels[1200:], labels[1200:], pixels[:1200], labels[:1200]) > 0.95
    assert label_agreement(pixels[1200:], (labels[1200:] + 1) % 10, pixels[:1200], labels[:1200]) < 0.05


def test_novelty_is_one_for_unseen_images_and_zero_for_copies() -> None:
    pixels, _ = digits()
    training, held = split(len(pixels), 0.1)
    assert novelty(pixels[held], pixels[training], pixels[held]) == 1
    assert novelty(pixels[training[:300]], pixels[training], pixels[held]) == 0
    noisy = pixels[training[:300]] + 0.001 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).numpy()
    assert novelty(noisy, pixels[training], pixels[held]) < 0.05
