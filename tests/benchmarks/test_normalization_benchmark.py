"""The normalization benchmark: its network, its data, its averages and its plot."""

import pytest
import torch

from benchmarks import normalization


def row(norm, batch_size, seed, error):
    return {
        "norm": norm,
        "weight_standardization": False,
        "batch_size": batch_size,
        "seed": seed,
        "validation_error": error,
    }


def test_training_and_validation_images_are_disjoint_halves():
    images, labels, held_out, held_out_labels = normalization.digits()
    assert (len(images), len(held_out)) == (896, 901)
    assert images.min() >= -1
    assert images.max() <= 1
    assert set(labels.tolist()) == set(held_out_labels.tolist()) == set(range(10))


def test_whole_batches_of_every_size_make_up_the_seen_images():
    assert all(896 % size == 0 for size in normalization.BATCH_SIZES)
    assert normalization.SEEN_IMAGES % 896 == 0


@pytest.mark.parametrize("norm", normalization.KINDS)
@pytest.mark.parametrize("standardize", [False, True])
def test_only_batch_normalization_has_running_statistics(norm, standardize):
    network = normalization.resnet(norm, standardize)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert bool(list(network.buffers())) == (norm == "batch")


def test_a_run_learns_and_repeats_itself(monkeypatch):
    monkeypatch.setattr(normalization, "SEEN_IMAGES", 896)
    runs = [normalization.train("group", True, 32, 0, normalization.digits()) for _ in range(2)]
    assert runs[0]["validation_error"] < 0.3  # chance is 0.9
    assert runs[0]["validation_error"] == runs[1]["validation_error"]


def test_errors_are_averaged_over_seeds_by_batch_size():
    rows = [row("group", 4, 0, 0.1), row("group", 4, 1, 0.3), row("group", 2, 0, 0.5), row("layer", 4, 0, 0.9)]
    assert normalization.mean_errors(rows, "group", False) == pytest.approx({4: 0.2, 2: 0.5})
    assert normalization.mean_errors(rows, "group", True) == {}


def test_the_plot_is_drawn_from_what_has_been_run(tmp_path):
    normalization.draw([row("group", 4, 0, 0.1), row("batch", 2, 0, 0.2)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
