"""Checks that every scheduler finds the image that the network knows, and that an image depends on its seed alone."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from tests.pipelines.test_sampling_by_distribution import WITHOUT_RESCALED_BETAS
from unetgn.pipelines.sampling import sample
from unetgn.pipelines.schedulers import EVEN, SCHEDULERS, class_of, make_sampling_scheduler
from unetgn.training.objective import ObjectiveConfig, make_scheduler


class Network(nn.Module):
    """Predicts `rule(noisy, timestep)` in the place of a U-Net, and 0.2 more where there is a label."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule, self.calls, self.texts = rule, [], []

    def forward(
        self, noisy: Tensor, timestep: Tensor, text: Tensor | None = None, class_labels: Tensor | None = None
    ) -> SimpleNamespace:
        self.calls.append((float(timestep), class_labels))
        self.texts.append(text)
        prediction = self.rule(noisy, timestep).expand_as(noisy)
        return SimpleNamespace(sample=prediction if class_labels is None else prediction + 0.2)


def trained(prediction_type: str = "sample", schedule: str = "linear", levels: int = 1000):
    betas = {} if schedule == "squared_cosine" else {"beta_end": 20 / levels}  # which end in noise
    return make_scheduler(
        ObjectiveConfig(prediction_type=prediction_type, schedule=schedule, num_train_timesteps=levels, **betas)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("cut", [1, 10, 100, 400])
def test_a_schedule_that_was_cut_short_is_refused(cut: int, prediction_type: str) -> None:
    short = DDPMScheduler(num_train_timesteps=cut, prediction_type=prediction_type)
    for name in SCHEDULERS:
        with pytest.raises(ValueError, match=rf"over {cut} levels ends with 0?\.?\d+ of the image's variance"):
            make_sampling_scheduler(name, short, 1)


PICTURE = torch.linspace(-0.9, 0.9, 3 * 4 * 4).view(3, 4, 4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("steps", "levels"), [(7, 1000), (120, 200), (200, 200)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_a_network_that_knows_the_image_leads_every_scheduler_to_it(
    name: str, steps: int, levels: int, prediction_type: str
) -> None:
    training_scheduler = trained(prediction_type, levels=levels)
    if steps == 120 and class_of(name)[0].__name__ in EVEN:
        with pytest.raises(ValueError, match=r"takes a number that divides 200 nearly, such as \[100, 200\]"):
            make_sampling_scheduler(name, training_scheduler, steps)
        return

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        alpha = training_scheduler.alphas_cumprod[int(timestep)]
        return PICTURE if prediction_type == "sample" else (noisy - alpha.sqrt() * PICTURE) / (1 - alpha).sqrt()

    scheduler = make_sampling_scheduler(name, training_scheduler, steps)
    images = sample(Network(predict), scheduler, [0, 1], (3, 4, 4))
    assert images.shape == (2, 3, 4, 4)
    # A last step that ends at the first noise level, not at zero noise, leaves that level's noise: sigma about 0.01.
    assert (images - PICTURE).abs().max() < 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_depends_on_its_seed_and_not_on_the_batch(name: str) -> None:
    def draw(seeds: list[int]) -> Tensor:
        network = Network(lambda noisy, _: torch.tanh(noisy) * 0.5)
        return sample(network, make_sampling_scheduler(name, trained("epsilon"), 5), seeds, (1, 4, 4))

    together, alone = draw([3, 11, 7]), draw([11])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_guidance_extrapolates_from_unconditional_to_conditional() -> None:
    """One DDIM step from the last level with 'sample' prediction returns the guided prediction itself."""
    for scale, expected in ((1.0, 0.3), (0.0, 0.1), (2.0, 0.5)):
        network = Network(lambda noisy, _: torch.full_like(noisy, 0.1))
        scheduler = make_sampling_scheduler("ddim", trained(), 1)
        scheduler.register_to_config(set_alpha_to_one=True)
        scheduler.final_alpha_cumprod = torch.tensor(1.0)
        images = sample(network, scheduler, [0], (1, 2, 2), class_labels=[4], guidance_scale=scale)
        assert torch.allclose(images, torch.tensor(expected), atol=1e-6)
        assert len(network.calls) == (1 if scale == 1 else 2)


def test_guidance_reads_the_empty_text_where_it_is_without_conditions() -> None:
    network = Network(lambda noisy, _: torch.zeros_like(noisy))
    texts, empty = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)), torch.full((5, 3), -1.0)
    scheduler = make_sampling_scheduler("ddim", trained(), 1)
    sample(network, scheduler, [0, 1], (1, 2, 2), texts=texts, empty_text=empty, guidance_scale=2.0)
    with_text, without = network.texts
    assert torch.equal(with_text, texts)
    assert torch.equal(without, empty.expand(2, 5, 3))


def test_latents_are_not_clipped_to_the_range_of_pixels() -> None:
    network = Network(lambda noisy, _: torch.full_like(noisy, 3.0))
    training_scheduler = make_scheduler(ObjectiveConfig(prediction_type="sample", clip_sample=False))
    for clip, expected in ((True, 1.0), (False, 3.0)):
        scheduler = make_sampling_scheduler("ddim", training_scheduler, 10)
        images = sample(network, scheduler, [0], (1, 2, 2), clip=clip)
        assert (images - expected).abs().max() < 0.05


def test_zero_terminal_snr_sampling_begins_at_the_last_level() -> None:
    network = Network(lambda noisy, _: torch.zeros_like(noisy))
    scheduler = make_sampling_scheduler("ddim", trained("v_prediction", "zero_terminal_snr"), 4)
    sample(network, scheduler, [0], (1, 2, 2))
    assert network.calls[0][0] == 999


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_begins_at_the_last_level_whatever_the_number_of_steps(name: str) -> None:
    for steps in (2, 30, 50, 500):
        assert float(make_sampling_scheduler(name, trained("epsilon"), steps).timesteps[0]) == pytest.approx(999, abs=1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_that_a_scheduler_cannot_follow_is_refused(name: str) -> None:
    training_scheduler = trained("v_prediction", "zero_terminal_snr")
    if name in WITHOUT_RESCALED_BETAS:  # they have no rescaled betas
        with pytest.raises(ValueError, match=f"{re.escape(repr(name))} cannot follow the noise schedule"):
            make_sampling_scheduler(name, training_scheduler, 5)
    else:
        scheduler = make_sampling_scheduler(name, training_scheduler, 5)
        assert torch.allclose(scheduler.alphas_cumprod, training_scheduler.alphas_cumprod, atol=1e-6)


def test_every_moment_from_noise_to_image_is_shown() -> None:
    moments: list[Tensor] = []
    network = Network(lambda noisy, _: torch.zeros_like(noisy))
    images = sample(network, make_sampling_scheduler("ddim", trained(), 5), [0], (1, 2, 2), on_step=moments.append)
    assert len(moments) == 6
    assert torch.equal(moments[0][0], torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(moments[-1], images)


def test_unknown_schedulers_and_impossible_step_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scheduler 'dpm' is unknown; there are ddpm, ddim"):
        make_sampling_scheduler("dpm", trained(), 5)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}; the network was trained on 1000 noise levels"):
            make_sampling_scheduler("ddpm", trained(), steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_number_of_steps_has_its_levels(name: str) -> None:
    """Rounding gives diffusers' "trailing" timesteps a level -1 at 61 of 1000, 103 and others."""
    second_order = class_of(name)[0].order == 2  # slow to set
    for steps in (2, 3, 61, 103, 201) if second_order else (*range(2, 130), 201, 333, 1000):
        if class_of(name)[0].__name__ in EVEN and 1000 / steps > 1.1 * (1000 // steps):
            continue  # refused
        levels = make_sampling_scheduler(name, trained("epsilon"), steps).timesteps.tolist()
        assert len(levels) == (2 * steps - 1 if second_order else steps) + (name == "pndm")
        assert all(before > after - 0.01 for before, after in itertools.pairwise(levels))
        assert levels[-1] >= 0


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [61, 103])
def test_where_rounding_gives_a_level_too_many_the_image_is_found(name: str, steps: int) -> None:
    training_scheduler = trained("epsilon")

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        alpha = training_scheduler.alphas_cumprod[int(timestep)]
        return (noisy - alpha.sqrt() * PICTURE) / (1 - alpha).sqrt()

    images = sample(Network(predict), make_sampling_scheduler(name, training_scheduler, steps), [0, 1], (3, 4, 4))
    assert (images - PICTURE).abs().max() < 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_not_used_up(name: str) -> None:
    network = Network(lambda noisy, _: torch.tanh(noisy) * 0.5)
    scheduler = make_sampling_scheduler(name, trained("epsilon"), 5)
    first, second = (sample(network, scheduler, [3], (1, 4, 4)) for _ in range(2))
    assert torch.equal(first, second)
    assert scheduler.config.prediction_type == "epsilon"


def test_an_image_that_nothing_clips_is_not_looked_for_in_pure_noise() -> None:
    network = Network(lambda noisy, _: noisy)
    clipped = make_scheduler(ObjectiveConfig(schedule="squared_cosine"))
    with pytest.raises(ValueError, match=r"would begin with 2e-09 of the image's variance.*clip_sample=False"):
        sample(network, make_sampling_scheduler("ddim", clipped, 5), [0], (1, 2, 2), clip=False)
    as_told = make_scheduler(ObjectiveConfig(schedule="squared_cosine", clip_sample=False))
    assert sample(network, make_sampling_scheduler("ddim", as_told, 5), [0], (1, 2, 2), clip=False).isfinite().all()


@pytest.mark.parametrize("clip", [True, False])
def test_more_steps_than_levels_that_are_used_are_refused(clip: bool) -> None:
    whole = make_scheduler(ObjectiveConfig(schedule="squared_cosine", clip_sample=clip))
    assert len(make_sampling_scheduler("euler", whole, 900).timesteps) == 900
    with pytest.raises(ValueError, match=r"trained on 1000 noise levels, of which 'heun' uses 97\d, so 1 to 97\d will"):
        make_sampling_scheduler("heun", whole, 1000)
