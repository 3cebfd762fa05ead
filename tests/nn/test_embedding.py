"""Checks embeddings against their formulas, and against diffusers where it has them."""

import math

import pytest
import torch
from diffusers.models.embeddings import GaussianFourierProjection, get_timestep_embedding

from unetgn.nn import (
    AugmentEmbedding,
    ClassEmbedding,
    FourierFeatures,
    SinusoidalFeatures,
    TimeConfig,
    TimestepEmbedding,
)

TIMESTEPS = torch.tensor([0, 1, 17, 999])


@pytest.mark.parametrize("order", ["cos_sin", "sin_cos"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("frequencies", ["exp", "power"])
def test_sinusoids_are_their_formula(order, shift, frequencies):
    features = SinusoidalFeatures(8, order=order, frequency_shift=shift, frequencies=frequencies)(
        TIMESTEPS, torch.float64
    )
    for row, timestep in zip(features.tolist(), TIMESTEPS.tolist(), strict=True):
        phases = [timestep * 10_000 ** (-i / (4 - shift)) for i in range(4)]
        cosines, sines = [math.cos(phase) for phase in phases], [math.sin(phase) for phase in phases]
        expected = cosines + sines if order == "cos_sin" else sines + cosines
        assert row == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("order", ["cos_sin", "sin_cos"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("width", [8, 9])
def test_sinusoids_in_float32_are_those_of_diffusers_bit_for_bit(order, shift, width):
    ours = SinusoidalFeatures(width, order=order, frequency_shift=shift)(TIMESTEPS)
    theirs = get_timestep_embedding(TIMESTEPS, width, flip_sin_to_cos=order == "cos_sin", downscale_freq_shift=shift)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("order", ["cos_sin", "sin_cos"])
def test_fourier_features_are_those_of_diffusers(order):
    theirs = GaussianFourierProjection(4, log=False, flip_sin_to_cos=order == "cos_sin")
    ours = FourierFeatures(8, order=order)
    ours.load_state_dict({"weight": theirs.weight})
    levels = torch.tensor([0.25, 1.5])
    torch.testing.assert_close(ours(levels), theirs(levels), rtol=1e-5, atol=1e-5)
    assert ours(levels, torch.float64).dtype == torch.float64


def test_fourier_frequencies_stay_in_float32_and_are_no_parameters():
    features = FourierFeatures(8)
    before = features.weight.clone()
    assert torch.equal(features.to(torch.bfloat16).weight, before)
    assert not list(features.parameters())
    assert features.double().weight.dtype == torch.float64


def test_the_mlp_is_its_formula():
    layer = TimestepEmbedding(6, 5, cond_channels=3).double()
    features, condition = (
        torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).double()[0],
        torch.ones(2, 3).double(),
    )
    first = layer.linear_1(features + condition @ layer.cond_proj.weight.T)
    torch.testing.assert_close(layer(features, condition), layer.linear_2(first * torch.sigmoid(first)))
    with pytest.raises(ValueError, match="time_cond_proj_dim is None"):
        TimestepEmbedding(6, 5)(features.float(), condition)


def test_class_rows_and_indices_agree_with_bias_and_scale():
    table = ClassEmbedding(4, 3, bias=True, scale=2.0, null_class=False, missing="zeros")
    with torch.no_grad():
        table.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    indices = torch.tensor([2, 0])
    expected = 2 * table.weight[indices] + table.bias
    torch.testing.assert_close(table(indices, 2), expected)
    torch.testing.assert_close(table(torch.eye(4)[indices], 2), expected)
    torch.testing.assert_close(table(None, 2), table.bias.expand(2, 3))  # EDM: zeros in, so the bias is left


def test_the_null_class_is_one_more_last_row():
    table = ClassEmbedding(4, 3)
    assert table.weight.shape == (5, 3)
    assert torch.equal(table(None, 2), table.weight[[4, 4]])
    assert torch.equal(table(torch.tensor([4, 1]), 2), table.weight[[4, 1]])
    mixed = torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.5]])
    torch.testing.assert_close(table(mixed, 1), (table.weight[3:4] + table.weight[4:5]) / 2)
    with pytest.raises(ValueError, match=r"class_labels are missing: this network has 4 classes and no null class"):
        ClassEmbedding(4, 3, null_class=False)(None, 2)


def test_augmentation_is_linear_without_a_bias():
    layer = AugmentEmbedding(4, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert not layer(torch.zeros(2, 4)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeConfig(features="learned"), r"time\.features must be 'sinusoidal' or 'fourier', got 'learned'"),
        (lambda: TimeConfig(order="cos"), r"time\.order must be 'cos_sin' or 'sin_cos', got 'cos'"),
        (lambda: TimeConfig(fourier_scale=3.0), r"time\.fourier_scale=3\.0 needs time\.features='fourier'"),
        (lambda: TimeConfig(width=0), r"time\.width must be at least 1, got 0"),
        (lambda: TimeConfig(embedding_width=0), r"time\.embedding_width must be at least 1, got 0"),
        (lambda: ClassEmbedding(4, 3, missing="null"), "missing must be 'zeros' or 'error', got 'null'"),
        (
            lambda: ClassEmbedding(4, 3)(torch.tensor([0, 5]), 2),
            "class_labels has 5; this network's classes are 0 to 4",
        ),
        (
            lambda: ClassEmbedding(4, 3)(torch.tensor([-1, 0]), 2),
            "class_labels has -1; this network's classes are 0 to 4",
        ),
        (lambda: ClassEmbedding(4, 3)(torch.tensor([1]), 2), "one entry for each of 2 samples, got 1"),
        (lambda: ClassEmbedding(4, 3)(torch.eye(4)[:1], 2), "one entry for each of 2 samples, got 1"),
        (lambda: ClassEmbedding(4, 3)(torch.tensor(1), 1), r"must be \(N,\) integers or"),
        (lambda: TimeConfig(frequencies="log"), r"time\.frequencies must be 'exp' or 'power'"),
        (lambda: SinusoidalFeatures(2, frequency_shift=1.0), "too narrow"),
        (lambda: FourierFeatures(5), r"time\.width must be even"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
