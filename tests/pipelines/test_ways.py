"""Ways to sample: diffusers' schedulers and their configurations, images and masks to begin with, guidance, strips."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image, ImageSequence

from tests.pipelines.test_sampling_by_distribution import MEANS, SPREAD, Gaussian, objective
from unetgn.pipelines.sampling import Guidance, Start, draw_noise, sample, slerp
from unetgn.pipelines.schedulers import (
    CLASSES,
    EDM_SCHEDULERS,
    NOT_FOLLOWED,
    SCHEDULERS,
    begin_later,
    class_like,
    class_of,
    make_sampling_scheduler,
    set_to_steps,
)
from unetgn.pipelines.strips import Moments, draws_noise, noise_between, write_animation
from unetgn.training.objective import ObjectiveConfig, make_scheduler

SDES = {"ddpm", "ddpm_parallel", "sde-dpmsolver++", "sa_solver", "euler_ancestral", "kdpm2_ancestral",
        "edm_sde-dpmsolver++"}  # fmt: skip
OF_DIFFUSERS = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)
)


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_every_scheduler_of_diffusers_is_taken_or_refused_with_the_reason(name: str) -> None:
    if name in CLASSES:
        assert class_of(name)[0] is getattr(diffusers, name)
        return
    with pytest.raises(ValueError, match=rf"scheduler '{name}' (does not fit: .{{20}}|has not been tried here)"):
        class_of(name)


CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *itertools.product(
        ("dpmsolver++", "dpmsolver++_singlestep", "euler", "heun", "unipc", "deis", "sa_solver", "lms", "kdpm2"),
        ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}),
    ),
    *itertools.product(("ddim", "ddpm", "dpmsolver++", "unipc", "euler"), ({"timestep_spacing": "leading"},)),
    ("dpmsolver++", {"timestep_spacing": "linspace", "solver_order": 3, "use_lu_lambdas": True}),
    ("dpmsolver++", {"algorithm_type": "dpmsolver++", "solver_type": "heun", "euler_at_final": True}),
    ("unipc", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("sa_solver", {"predictor_order": 1, "corrector_order": 1}),
]


FOLLOWED = [case for case in CONFIGURATIONS if not any(
    class_of(case[0])[0].__name__ in classes and case[1].get(key) == wrong for classes, key, wrong, _ in NOT_FOLLOWED
)]  # fmt: skip


@pytest.mark.parametrize(("classes", "key", "wrong", "would_do"), NOT_FOLLOWED)
def test_a_configuration_that_is_refused_has_one_that_would_do(
    classes: Any, key: str, wrong: Any, would_do: Any
) -> None:
    trained = make_scheduler(objective("scaled_linear", "v_prediction", True))
    for name in ("ddim", "pndm", "euler", "unipc", "sa_solver", "lms"):
        scheduler_class, extra = class_of(name)
        if scheduler_class.__name__ not in classes or key not in scheduler_class().config:
            continue
        with pytest.raises(ValueError, match=f"{key}={would_do!r} will do"):
            set_to_steps(scheduler_class.from_config(trained.config, **extra | {key: wrong}), 20)
        set_to_steps(scheduler_class.from_config(trained.config, **extra | {key: would_do}), 20)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        pytest.param(*case, marks=pytest.mark.slow) if number % 4 or case[0] == "kdpm2" else case
        for number, case in enumerate(FOLLOWED)
    ],
)
def test_what_a_configuration_says_is_followed_to_the_right_distribution(name: str, keys: dict[str, Any]) -> None:
    trained = make_scheduler(objective("scaled_linear", "v_prediction", True))
    scheduler_class, extra = class_of(name)
    scheduler = set_to_steps(scheduler_class.from_config(trained.config, **extra | keys), 25)
    assert all(scheduler.config[key] == value for key, value in keys.items())
    images = sample(Interpolated(trained), scheduler, range(6), (1, 16, 16))
    assert images.mean() == pytest.approx(MEANS[None], abs=0.04)
    assert 0.7 < images.std() / SPREAD < 1.2


class Interpolated(Gaussian):
    """Knows the levels between those of training, too."""

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, text: None = None, class_labels: Any = None) -> Any:
        whole, shares = int(timestep), self.shares
        between = shares[whole] ** (1 - (float(timestep) - whole)) * shares[min(whole + 1, 999)] ** (
            float(timestep) - whole
        )
        self.shares = torch.full_like(shares, float(between))
        try:
            return super().forward(noisy, timestep, text, class_labels)
        finally:
            self.shares = shares


# Those whose steps are of their own kind; the rest with `-m slow`.
OWN_KIND = ("ddpm", "ddim", "pndm", "dpmsolver++", "dpmsolver++_singlestep", "lms", "heun", "euler_ancestral")
NAMES = [name if name in OWN_KIND else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [0.4, pytest.param(0.65, marks=pytest.mark.slow)])
def test_images_to_begin_with_keep_the_distribution_that_they_are_of(name: str, strength: float) -> None:
    """What is of the distribution, is made noisy and is denoised again is of the distribution."""
    trained = make_scheduler(objective("squared_cosine", "epsilon", True))
    scheduler = make_sampling_scheduler(name, trained, 20)
    begin_later(scheduler, strength)
    steps = (len(scheduler.timesteps) + (scheduler.order == 2)) // scheduler.order - (name == "pndm")
    assert steps == pytest.approx(20 * strength, abs=1)
    levels = scheduler.timesteps.tolist()
    twice = ("pndm", "heun", "kdpm2_ancestral")
    assert (levels[1] == levels[2]) == (name in twice)  # which go to their second level twice
    image = SPREAD * draw_noise(range(100, 106), (1, 16, 16))[0]
    made = sample(Gaussian(trained), scheduler, range(6), (1, 16, 16), start=Start(image))
    assert made.mean() == pytest.approx(MEANS[None], abs=0.04)
    assert 0.75 < made.std() / SPREAD < 1.15
    # How much of an image is left in one that was made of it: all that its noisy version says of it, where no more
    # noise is drawn; and as much as one image of the posterior says of another where it is drawn anew in every step.
    share = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
    said = share.sqrt() * SPREAD / (share * SPREAD**2 + 1 - share).sqrt()
    likeness = (made * image).mean() / made.std() / image.std()
    assert said**2 - 0.06 < likeness < said + 0.06
    if name in ("ddim", "pndm", "dpmsolver++", "unipc", "euler", "heun", "kdpm2", "lms"):
        assert likeness == pytest.approx(float(said), abs=0.06)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [pytest.param(0.5, marks=pytest.mark.thorough), 1.0])
def test_behind_a_mask_all_is_drawn_and_the_rest_stays(name: str, strength: float) -> None:
    trained = make_scheduler(objective("squared_cosine", "epsilon", True))
    scheduler = make_sampling_scheduler(name, trained, 25)
    begin_later(scheduler, strength)
    image = SPREAD * draw_noise(range(100, 106), (1, 16, 16))[0]
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    made = sample(Gaussian(trained), scheduler, range(6), (1, 16, 16), start=Start(image, mask))
    assert torch.equal(made[..., 8:], image[..., 8:])
    drawn = made[..., :8]
    assert drawn.mean() == pytest.approx(MEANS[None], abs=0.05)
    assert 0.7 < drawn.std() / SPREAD < 1.2
    if strength == 1:
        assert abs((drawn * image[..., :8]).mean()) / SPREAD**2 < 0.15  # nothing of what was behind the mask


def test_guidance_acts_in_its_interval_only() -> None:
    """Where sigma = sqrt((1 - share) / share) is in (low, high], and nowhere else."""
    trained = make_scheduler(objective("squared_cosine", "epsilon", True))
    sigmas = ((1 - trained.alphas_cumprod) / trained.alphas_cumprod).sqrt()
    network = Gaussian(trained)
    calls: list[tuple[int, bool]] = []
    network.register_forward_pre_hook(
        lambda _, given, named: calls.append((int(given[1]), named.get("class_labels") is not None)), with_kwargs=True
    )
    settings = {"class_labels": [0], "guidance_scale": 3.0, "guidance_interval": (0.5, 4.0)}
    sample(network, make_sampling_scheduler("ddim", trained, 25), [0], (1, 4, 4), **settings)
    without = {level for level, labelled in calls if not labelled}
    assert without == {level for level, _ in calls if 0.5 < sigmas[level] <= 4.0}
    assert 3 < len(without) < 20


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_rescaled_guidance_has_the_spread_of_what_is_not_guided(rescale: float) -> None:
    one, other = draw_noise([0, 1], (3, 8, 8))[0][:, None].expand(2, 2, 3, 8, 8).clone()
    one[1] *= 3  # each image by itself
    guided = Guidance(5.0, rescale=rescale)(one, other)
    plain = other + 5.0 * (one - other)
    torch.testing.assert_close(guided, rescale_noise_cfg(plain, one, guidance_rescale=rescale))
    if rescale == 1:
        torch.testing.assert_close(guided.std((1, 2, 3)), one.std((1, 2, 3)))


def test_what_lies_between_two_seeds_is_as_likely_as_they_are() -> None:
    """Norm and spread stay; the ends are the seeds' own noise; the angle grows evenly (Shoemake 1985)."""
    way = noise_between(3, 8, 9, (3, 16, 16))
    (one, other), _ = draw_noise((3, 8), (3, 16, 16))
    assert torch.equal(way[0], one)
    assert torch.equal(way[-1], other)
    norms = way.flatten(1).norm(dim=1)
    assert norms.min() > 0.97 * min(one.norm(), other.norm())
    unit = way.flatten(1) / norms[:, None]
    angles = torch.acos((unit[:-1] * unit[1:]).sum(1))
    assert angles.max() / angles.min() < 1.1
    assert torch.allclose(slerp(one, one, 0.5), one)
    with pytest.raises(ValueError, match="at least 2"):
        noise_between(3, 8, 1, (1, 2, 2))


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_the_moments_of_a_strip_are_shown_whatever_a_scheduler_keeps(name: str) -> None:
    trained = make_scheduler(ObjectiveConfig())
    moments = Moments(2, (1, 16, 16))
    sample(Gaussian(trained), make_sampling_scheduler(name, trained, 50), [0, 1, 2], (1, 16, 16),
           on_step_end=lambda step, timestep, kept: (moments.add(kept), kept)[1])  # fmt: skip
    strip, columns = moments.strip(5)
    assert (strip.shape, columns) == ((10, 1, 16, 16), 5)
    assert torch.equal(strip[0], draw_noise([0], (1, 16, 16))[0][0])
    spreads = strip.unflatten(0, (2, 5)).std((0, 2, 3, 4))
    assert spreads.max() < 1.1
    assert spreads[-1] == pytest.approx(SPREAD, rel=0.25)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animation_has_every_picture_and_stays_at_the_last(format: str, tmp_path: Path) -> None:
    pictures = [Image.new("L", (20, 10), shade) for shade in (0, 90, 180, 255)]
    write_animation(tmp_path / "a", pictures, format=format)
    with Image.open(tmp_path / "a") as animation:
        assert animation.format == format
        shades = [frame.convert("L").getpixel((5, 5)) for frame in ImageSequence.Iterator(animation)]
    assert shades == pytest.approx([0, 90, 180, 255], abs=2)


class Preconditioned(torch.nn.Module):
    """Predicts F of EDM, which the scheduler's factors make the most likely image of; it sees ln(sigma)/4."""

    device, dtype, sigma_data, mean = torch.device("cpu"), torch.float32, 0.5, 0.2

    def forward(self, seen: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None) -> SimpleNamespace:
        sigma, data = math.exp(4 * float(timestep)), self.sigma_data
        x = seen * math.sqrt(sigma**2 + data**2)
        image = (SPREAD**2 * x + sigma**2 * self.mean) / (SPREAD**2 + sigma**2)
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
        return SimpleNamespace(sample=(image - skip * x) / out)


@pytest.mark.parametrize("name", EDM_SCHEDULERS)
@pytest.mark.parametrize("way", ["noise", "an image", "a mask"])
def test_networks_of_edm_sample_what_they_know_through_their_preconditioning(name: str, way: str) -> None:
    scheduler_class, extra = class_like(name, diffusers.EDMEulerScheduler())
    scheduler = set_to_steps(scheduler_class(**extra), 40)
    image = Preconditioned.mean + SPREAD * draw_noise(range(100, 106), (1, 16, 16))[0]
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    start = {"noise": None, "an image": Start(image), "a mask": Start(image, mask)}[way]
    if way == "an image":
        begin_later(scheduler, 0.5)
    made = sample(Preconditioned(), scheduler, range(6), (1, 16, 16), start=start)
    assert made.mean() == pytest.approx(Preconditioned.mean, abs=0.03)
    assert 0.8 < made.std() / SPREAD < 1.1
    if way == "a mask":
        assert torch.equal(made[..., 8:], image[..., 8:])
        assert abs(((made - 0.2) * (image - 0.2))[..., :8].mean()) / SPREAD**2 < 0.15
    both = sample(Preconditioned(), scheduler, [3, 4], (1, 16, 16))
    assert torch.equal(both[1:], sample(Preconditioned(), scheduler, [4], (1, 16, 16)))


@pytest.mark.parametrize("name", [*SCHEDULERS, *EDM_SCHEDULERS])
def test_it_is_known_whether_a_scheduler_draws_noise_between_its_steps(name: str) -> None:
    """Where it does, two images that begin with the same noise are not the same."""
    trained = diffusers.EDMEulerScheduler() if name in EDM_SCHEDULERS else make_scheduler(ObjectiveConfig())
    scheduler = make_sampling_scheduler(name, trained, 20)
    network = Preconditioned() if name in EDM_SCHEDULERS else Gaussian(trained)
    noise = draw_noise([2], (1, 4, 4))[0]
    one, other = (sample(network, scheduler, [seed], (1, 4, 4), noise=noise) for seed in (0, 1))
    assert draws_noise(scheduler) == (not torch.equal(one, other))
    assert draws_noise(scheduler) == (name in SDES)


def test_schedulers_of_edm_and_others_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="it is for networks with EDM's preconditioning"):
        class_like("EDMEulerScheduler", make_scheduler(ObjectiveConfig()))
    with pytest.raises(ValueError, match="does not fit a network with EDM's preconditioning; there are edm_euler"):
        class_like("ddim", diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="sampling begins in pure noise"):
        set_to_steps(diffusers.EDMEulerScheduler(sigma_max=1.0), 10)
