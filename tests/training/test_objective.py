"""The objective against its definition in float64, and against diffusers where it has one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from unetgn.pipelines.schedulers import training_of
from unetgn.training.edm import EDMConfig
from unetgn.training.errors import CheckpointError
from unetgn.training.objective import Objective, ObjectiveConfig, described_scheduler, level_weights, make_scheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Oracle(nn.Module):
    """Predicts what it was told to."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor | None = None, class_labels: Tensor | None = None
    ) -> SimpleNamespace:
        self.noisy, self.timesteps, self.text, self.labels = noisy, timesteps, text, class_labels
        return SimpleNamespace(sample=self.prediction)


def make_batch(count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1,
        "noise": torch.randn(count, 3, 4, 4, generator=generator),
        "label": torch.arange(count) % 3,
        "time": torch.linspace(0, 0.999, count, dtype=torch.float64),
        "drop": torch.linspace(0, 0.999, count, dtype=torch.float64),
    }


def true_target(kind: str, image: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    a = alpha.view(-1, 1, 1, 1)
    return {"epsilon": noise, "sample": image, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * image}[kind]


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine", "zero_terminal_snr"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_the_mean_squared_error_of_the_target(kind: str, schedule: str) -> None:
    if (kind, schedule) == ("epsilon", "zero_terminal_snr"):
        pytest.skip("refused, and tested below")
    objective = Objective(ObjectiveConfig(prediction_type=kind, schedule=schedule), num_classes=None)
    batch = make_batch()
    oracle = Oracle(torch.zeros(6, 3, 4, 4))
    loss = objective.losses(oracle, objective.prepare(batch)).mean()
    alpha = objective.scheduler.alphas_cumprod[(batch["time"] * 1000).long()].double()
    image, noise = batch["image"].double(), batch["noise"].double()
    a = alpha.view(-1, 1, 1, 1)
    assert torch.allclose(oracle.noisy.double(), a.sqrt() * image + (1 - a).sqrt() * noise, atol=1e-6)
    assert torch.allclose(loss.double(), true_target(kind, image, noise, alpha).square().mean(), rtol=1e-5)
    perfect = Oracle(true_target(kind, image, noise, alpha).float())
    assert objective.losses(perfect, objective.prepare(batch)).max() < 1e-10


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squared_cosine", "zero_terminal_snr"])
@pytest.mark.parametrize("levels", [1, 10, 1000, 50_000])
def test_weights_of_levels_are_numbers_on_every_schedule(kind: str, schedule: str, levels: int) -> None:
    """Of 50,000 levels most are pure noise in float32: their ratio of signal to noise is 0."""
    if (kind, schedule) == ("epsilon", "zero_terminal_snr"):
        pytest.skip("refused, and tested below")
    options = {"prediction_type": kind, "schedule": schedule, "num_train_timesteps": levels}
    try:
        ObjectiveConfig(**options)
    except ValueError as error:
        pytest.skip(f"refused: {error}")
    for gamma in (1e-3, 5.0, 1e6):
        weights = Objective(ObjectiveConfig(**options, weighting="min_snr", min_snr_gamma=gamma), None).weights
        assert weights.isfinite().all()
        assert (weights >= 0).all()


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_min_snr_weighs_the_error_of_the_clean_image_by_min_snr_gamma(kind: str) -> None:
    """Whatever is predicted, the loss is min(SNR, gamma) times the error of the image that the prediction implies."""
    config = ObjectiveConfig(prediction_type=kind, weighting="min_snr", min_snr_gamma=3.0)
    scheduler = make_scheduler(config)
    alpha = scheduler.alphas_cumprod.double()
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    weights = level_weights(alpha / (1 - alpha), config)
    # An error d of the prediction is this error of the clean image:
    per_image_error = {"epsilon": snr.rsqrt(), "sample": torch.ones(1000), "v_prediction": (snr + 1).rsqrt()}[kind]
    assert torch.allclose(weights, snr.clamp(max=3.0) * per_image_error**2, rtol=1e-4)


def test_the_zero_terminal_snr_schedule_ends_in_pure_noise_and_sampling_starts_there() -> None:
    scheduler = make_scheduler(ObjectiveConfig(prediction_type="v_prediction", schedule="zero_terminal_snr"))
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


def test_labels_are_dropped_to_the_null_class_with_the_asked_probability() -> None:
    objective = Objective(ObjectiveConfig(label_dropout=0.3), num_classes=10)
    drop = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = objective.labels(torch.full((20000,), 4), drop)
    assert labels is not None
    assert set(labels.tolist()) == {4, 10}
    assert abs((labels == 10).double().mean() - 0.3) < 0.02


def test_dropped_texts_are_replaced_by_the_empty_one_and_the_network_reads_them() -> None:
    empty = torch.full((5, 2), -1.0)
    objective = Objective(ObjectiveConfig(label_dropout=0.3), num_classes=3, empty_text=empty)
    text = torch.rand(6, 5, 2, generator=torch.Generator().manual_seed(0))
    oracle = Oracle(torch.zeros(6, 3, 4, 4))
    objective.losses(oracle, objective.prepare(make_batch() | {"text": text}))
    dropped = make_batch()["drop"] < 0.3
    assert dropped.tolist() == [True, True, False, False, False, False]
    assert torch.equal(oracle.text, torch.where(dropped[:, None, None], empty, text))
    assert torch.equal(oracle.labels == 3, dropped)  # one draw drops both


def test_scaled_linear_betas_have_linear_roots_between_those_that_were_asked_for() -> None:
    config = ObjectiveConfig(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    expected = (1 - roots.square()).cumprod(0)
    assert torch.allclose(make_scheduler(config).alphas_cumprod.double(), expected, rtol=1e-5)


def test_without_classes_no_labels_are_passed() -> None:
    oracle = Oracle(torch.zeros(6, 3, 4, 4))
    objective = Objective(ObjectiveConfig(), num_classes=None)
    objective.losses(oracle, objective.prepare(make_batch()))
    assert oracle.labels is None


def test_every_level_is_drawn_and_none_beyond() -> None:
    objective = Objective(ObjectiveConfig(num_train_timesteps=10, schedule="squared_cosine"), num_classes=None)
    levels = objective.timesteps(torch.linspace(0, 1 - 1e-12, 1000, dtype=torch.float64))
    assert levels.unique().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "zero_terminal_snr"}, "zero_terminal_snr cannot go with objective.prediction_type epsilon"),
        ({"min_snr_gamma": 0.0}, "objective.min_snr_gamma is 0.0; it must be above 0"),
        ({"label_dropout": 1.0}, "objective.label_dropout is 1.0"),
        ({"num_train_timesteps": 0}, "objective.num_train_timesteps is 0"),
        ({"num_train_timesteps": 100}, "objective.schedule linear over 100 levels ends with 0.36 of the image's"),
        ({"beta_end": 1e-3}, "objective.schedule linear over 1000 levels ends with 0.58 of the image's"),
    ],
)
def test_contradictory_objectives_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**keys)


OTHERWISE = [None, "epsilon", 7, -1, 0.5, [], {"step": 1}, [0.1, 0.2], True, "nothing", 10**9]


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(schedule="squared_cosine"),
                                       ObjectiveConfig(edm=EDMConfig())], ids=["ddpm", "cosine", "edm"])  # fmt: skip
def test_a_scheduler_of_a_checkpoint_that_is_not_its_objectives_is_damage(objective: ObjectiveConfig) -> None:
    """Built as it says, it would raise anything, or draw with another schedule without a word."""
    right = dict(make_scheduler(objective).config)
    right["_class_name"] = type(make_scheduler(objective)).__name__

    def described(keys: dict[str, Any]) -> Any:
        return described_scheduler(SimpleNamespace(path="step-000001", scheduler_config=lambda: keys), objective)

    assert dict(described(right).config) == dict(make_scheduler(objective).config)
    for key in ("_class_name", *training_of(make_scheduler(objective))):
        for value in OTHERWISE:
            if value == right[key]:
                continue
            with pytest.raises(
                CheckpointError, match=rf"scheduler_config\.json says that {key} is .*config\.yaml"
            ) as said:
                described({**right, key: value})
            assert str(said.value).isprintable()
        if right[key] is not None:
            with pytest.raises(CheckpointError, match=f"says that {key} is None"):
                described({name: value for name, value in right.items() if name != key})


@pytest.mark.parametrize("levels", [0, -1, 10**6 + 1, 10**12])
def test_a_number_of_noise_levels_has_bounds(levels: int) -> None:
    with pytest.raises(ValueError, match=rf"num_train_timesteps is {levels}; 1 to 1000000 are possible"):
        ObjectiveConfig(num_train_timesteps=levels)
