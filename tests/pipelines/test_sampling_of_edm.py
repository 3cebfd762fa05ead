"""Samples digits with a network that was trained with EDM's objective, in every way that the others are sampled in."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests.pipelines.cards import draw_by_card
from tests.pipelines.digits import assert_digits, digits_network
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.levels import levels_of
from unetgn.pipelines.schedulers import EDM_SCHEDULERS
from unetgn.training.edm import EDMConfig
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.pipeline import make_pipeline

CLASSES = [seed % 10 for seed in range(20)]
OBJECTIVE = ObjectiveConfig(edm=EDMConfig(sigma_data=0.75), label_dropout=0.1)


def edm_digits(scheduler: str | None = None) -> UNetPipeline:
    pipeline = make_pipeline(digits_network("edm"), make_scheduler(OBJECTIVE), None)
    if scheduler is not None:
        pipeline.use_scheduler(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", [None, *EDM_SCHEDULERS])
def test_the_digits_are_those_that_were_asked_for(name: str | None, guidance_scale: float) -> None:
    made = edm_digits(name)(
        range(20), class_labels=CLASSES, guidance_scale=guidance_scale, num_inference_steps=16, output_type="pt"
    ).images
    assert_digits(2 * made - 1, CLASSES)


@pytest.mark.parametrize("name", EDM_SCHEDULERS)
def test_an_image_depends_on_its_seed_alone(name: str) -> None:
    image, mask = torch.full((1, 8, 8), 0.3), torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    for more in ({}, {"image": image, "strength": 0.7}, {"image": image, "mask_image": mask}):
        options = {"num_inference_steps": 6, "output_type": "pt", "guidance_scale": 2.0, **more}
        together = edm_digits(name)([3, 4, 5], class_labels=7, **options).images
        alone = edm_digits(name)([4], class_labels=7, **options).images
        assert (together[1] - alone[0]).abs().max() < 1e-4


def test_a_part_that_a_mask_keeps_is_kept_and_little_strength_changes_little() -> None:
    image, mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    options = {"class_labels": 3, "num_inference_steps": 10, "output_type": "pt", "image": image}
    made = edm_digits()([0], mask_image=mask, **options).images[0]
    torch.testing.assert_close(made[..., 4:], image[..., 4:])
    assert (made[..., :4] - image[..., :4]).abs().mean() > 0.1
    assert (edm_digits()([0], strength=0.1, **options).images[0] - image).abs().mean() < 0.05


def test_the_folder_has_the_scheduler_and_says_so(tmp_path: Path) -> None:
    edm_digits().save_pretrained(tmp_path)
    again = UNetPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.EDMDPMSolverMultistepScheduler
    facts = {name: again.scheduler.config[name] for name in ("sigma_data", "sigma_min", "sigma_max")}
    assert facts == {"sigma_data": 0.75, "sigma_min": 0.002, "sigma_max": 80.0}
    plain = diffusers.EDMDPMSolverMultistepScheduler.from_pretrained(tmp_path / "scheduler")
    assert plain.config.sigma_data == 0.75
    card = (tmp_path / "README.md").read_text()
    assert 'use_scheduler("edm_euler")' in card
    assert "own `DDPMPipeline" not in card
    again.use_scheduler("edm_euler")
    with pytest.raises(ValueError, match="does not fit a network with EDM's preconditioning"):
        again.use_scheduler("dpmsolver++")


@pytest.mark.parametrize("clip_sample", [True, False])
def test_clipping_is_as_the_objective_says_through_every_scheduler(clip_sample: bool, tmp_path: Path) -> None:
    objective = ObjectiveConfig(edm=EDMConfig(), clip_sample=clip_sample)
    pipeline = make_pipeline(digits_network("edm"), make_scheduler(objective), None)
    pipeline.save_pretrained(tmp_path)
    for name in EDM_SCHEDULERS:
        for each in (pipeline, UNetPipeline.from_pretrained(tmp_path)):
            each.use_scheduler(name)
            each.set_progress_bar_config(disable=True)
            made = each(range(6), class_labels=1, guidance_scale=9.0, num_inference_steps=4, output_type="latent")
            assert bool(made.images.abs().max() > 1) is not clip_sample


@pytest.mark.slow  # of a network with classes it is tried in every run of the tests
def test_the_line_of_the_card_draws_without_this_package(tmp_path: Path) -> None:
    """Of a network without classes, which diffusers' own class expresses."""
    from unetgn import UNet

    unet = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32], attention_levels=[], depth=1).eval()
    folder = tmp_path / "saved"
    made = make_pipeline(unet, make_scheduler(OBJECTIVE), None)
    assert isinstance(made.unet, diffusers.UNet2DModel)
    made.save_pretrained(folder)
    (expected,) = UNetPipeline(unet, make_scheduler(OBJECTIVE))([6]).images
    assert abs(draw_by_card(folder, tmp_path, 6) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("sigma", [2e-4, 1e-6])
def test_the_factors_of_little_noise_are_those_of_the_scheduler(sigma: float) -> None:
    """1 / (1 + sigma²) is 1 in float32."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=sigma)
    scheduler.set_timesteps(5)
    levels, one, none = levels_of(scheduler), torch.ones(()), torch.zeros(())
    lowest = torch.tensor(scheduler.sigmas[4].item())
    skip, out = levels._factors(levels.at(4, scheduler.timesteps[4]))
    assert torch.allclose(skip, scheduler.precondition_outputs(one, none, lowest), rtol=1e-6)
    assert torch.allclose(out, scheduler.precondition_outputs(none, one, lowest), rtol=1e-6)
    assert out > 0
