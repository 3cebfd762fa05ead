"""The three figures against their definitions, and against what is known of the digits."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unetgn.sampling import evaluate
from unetgn.sampling.evaluate import Pictures, frechet_distance, label_agreement, main, novelty
from unetgn.sampling.figures import moments
from unetgn.training.data.config import split
from unetgn.training.data.images import Digits


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


@pytest.mark.parametrize("scale", [1 / 16, 16, 255])
def test_the_machine_takes_its_scale_from_the_images(scale: float) -> None:
    pixels, labels = digits()
    shares = [label_agreement(k * pixels[1500:], labels[1500:], k * pixels[:800], labels[:800]) for k in (1, scale)]
    assert min(shares) > 0.9
    assert shares[0] == pytest.approx(shares[1], abs=0.01)


def test_moments_of_blocks_are_those_of_numpy_at_any_mean() -> None:
    rows = np.random.default_rng(0).standard_normal((700, 5)) + 1e6
    mean, covariance = moments(iter(rows))
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-8)


def test_large_images_are_averaged_down() -> None:
    image = np.arange(2 * 64 * 96, dtype=np.float64).reshape(2, 64, 96)
    (row,) = Pictures(lambda number: image, [0])
    expected = image.reshape(2, 32, 2, 32, 3).mean((2, 4)).transpose(1, 2, 0).ravel()
    np.testing.assert_allclose(row, expected)


def write_samples(folder: Path) -> None:
    """Write real digits, the first 200, as if they were samples."""
    images = Digits()
    lines = ["file,seed,class_label"]
    for seed in range(200):
        grey = ((images.image(seed)[0] + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{seed:06d}.png")
        lines.append(f"{seed:06d}.png,{seed},{images.label(seed)}")
    (folder / "samples.csv").write_text("\n".join(lines) + "\n")


def test_figures_are_said_before_a_file_is_written_and_with_their_ceiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_samples(tmp_path)
    monkeypatch.setattr("unetgn.sampling.evaluate.write_json", write)
    assert main(["--samples", str(tmp_path), "--out", str(tmp_path / "evaluation.json")]) == 1
    said = capsys.readouterr()
    figures = dict(line.split() for line in said.out.splitlines())
    assert float(figures["label_agreement"]) > 0.95
    assert 0.9 < float(figures["label_agreement_of_real"]) < 1
    assert float(figures["novelty"]) < 0.05  # copies
    assert "the figures above are whole" in said.err


def test_a_sample_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "000007.png")
    assert main(["--samples", str(tmp_path)]) == 2
    assert "000007.png has the shape (C, H, W) (3, 8, 8), the real images have (1, 8, 8)" in capsys.readouterr().err


def test_novelty_is_one_for_unseen_images_and_zero_for_copies() -> None:
    pixels, _ = digits()
    training, held = split(len(pixels), 0.1)
    assert novelty(pixels[held], pixels[training], pixels[held]) == 1
    assert novelty(pixels[training[:300]], pixels[training], pixels[held]) == 0
    noisy = pixels[training[:300]] + 0.001 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).numpy()
    assert novelty(noisy, pixels[training], pixels[held]) < 0.05


@pytest.mark.parametrize("copied", [0, 4, 6, 10])
@pytest.mark.filterwarnings("error")
def test_novelty_is_left_out_where_the_held_out_images_are_copies(
    copied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of ten being copies, the distance that novelty is measured in is 0."""
    random = np.random.default_rng(0)
    images = random.random((60, 1, 8, 8))
    images[:copied] = images[50 : 50 + copied]
    parts = [Pictures(images.__getitem__, numbers) for numbers in (range(60), range(10, 60), range(10))]
    monkeypatch.setattr(
        evaluate, "open_real", lambda config: evaluate.Real(*parts, lambda part: np.full(len(part), -1))
    )
    write_samples(tmp_path)
    assert main(["--samples", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert all(math.isfinite(figure) for figure in figures.values())
    assert ("novelty" in figures) == (copied < 5)
    assert ("novelty is left out" in capsys.readouterr().err) == (copied > 5)
