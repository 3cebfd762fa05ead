"""The pipeline as people call it: what it draws, what it refuses before the first step, and what its folder does."""

import copy
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from PIL import Image

from tests.pipelines.cards import draw_by_card
from tests.pipelines.digits import assert_digits, digits_network
from unetgn import UNet
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.inputs import read_images, read_mask, read_seeds
from unetgn.pipelines.networks import facts_of
from unetgn.pipelines.planning import Settings
from unetgn.pipelines.schedulers import SCHEDULERS
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.pipeline import make_pipeline

ROOT = Path(__file__).parents[2]
CLASSES = list(range(10))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8))
HALF = Image.fromarray(np.repeat(np.array([[255] * 4 + [0] * 4], np.uint8), 8, axis=0))  # white on the left


def digits(scheduler: str = "ddim", prediction_type: str = "epsilon") -> UNetPipeline:
    """Make the pipeline of a trained network."""
    trained = make_scheduler(ObjectiveConfig(schedule="squared_cosine", prediction_type=prediction_type))
    pipeline = UNetPipeline(digits_network(prediction_type), trained)
    pipeline.use_scheduler(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


WAYS: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 3.0},
    "from an image": {"image": PHOTO, "strength": 0.7},
    "behind a mask": {"image": PHOTO, "mask_image": HALF, "guidance_scale": 2.0, "guidance_rescale": 0.5},
}
# Some that draw noise in every step, and one that does not, in one way each; all with `-m slow`.
EACH = [("ddpm", "guided"), ("sde-dpmsolver++", "from an image"), ("euler_ancestral", "behind a mask"),
        ("sa_solver", "from an image"), ("ddim", "guided")]  # fmt: skip
REST = [(name, way) for name in SCHEDULERS for way in WAYS if (name, way) not in EACH]


@pytest.mark.parametrize(("name", "way"), EACH + [pytest.param(*case, marks=pytest.mark.slow) for case in REST])
def test_an_image_is_the_same_in_every_batch(name: str, way: str) -> None:
    pipeline = digits(name)

    def draw(seeds: list[int]) -> np.ndarray:
        labels = [seed % 10 for seed in seeds]
        images = pipeline(seeds, class_labels=labels, num_inference_steps=8, **WAYS[way]).images
        return np.stack([np.asarray(image).astype(int) for image in images])

    together = draw(list(range(32)))
    for seeds in ([5], [31, 5, 0], [7, 6, 5, 4, 3, 2, 1, 0]):
        assert abs(draw(seeds) - together[seeds]).max() <= 1
    assert abs(together[5] - together[15]).max() > 20


def test_classes_and_guidance_are_followed() -> None:
    for labels, seeds in ((CLASSES * 2, range(20)), (torch.tensor(CLASSES), range(10)), (7, (0, 1, 2))):
        images = digits()(
            seeds, class_labels=labels, guidance_scale=2.0, num_inference_steps=20, output_type="pt"
        ).images
        wanted = [labels] * 3 if isinstance(labels, int) else [int(label) for label in labels]
        assert_digits(2 * images - 1, wanted) if not isinstance(labels, int) else None
        assert len(images) == len(wanted)


def test_what_is_returned_is_what_was_asked_for() -> None:
    pipeline, settings = digits(), {"class_labels": [1, 2], "num_inference_steps": 4}
    latent = pipeline([0, 1], output_type="latent", **settings).images
    (pt,) = pipeline([0, 1], output_type="pt", return_dict=False, **settings)
    array = pipeline([0, 1], output_type="np", **settings).images
    pictures = pipeline([0, 1], **settings).images
    assert latent.shape == pt.shape == (2, 1, 8, 8)
    assert torch.allclose(pt, latent / 2 + 0.5)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert abs(np.asarray(pictures[1]) - array[1, ..., 0] * 255).max() <= 0.51
    assert pipeline([0, 1], height=12, width=16, output_type="pt", **settings).images.shape == (2, 1, 12, 16)


def test_a_callback_sees_every_step_and_may_change_what_follows() -> None:
    seen: list[tuple[int, int]] = []

    def look(pipeline: UNetPipeline, step: int, timestep: torch.Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(kept["latents"])} if step == 3 else {}

    images = digits()(0, class_labels=1, num_inference_steps=4, output_type="latent", callback_on_step_end=look).images
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep in seen] == [999, 749, 499, 249]
    assert not images.any()


@pytest.mark.parametrize("kind", ["ours", "diffusers'"])
def test_a_saved_folder_draws_the_same_by_class_and_guided(kind: str, tmp_path: Path) -> None:
    pipeline = digits("dpmsolver++")
    settings = {"class_labels": CLASSES, "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "pt"}
    expected = pipeline(range(10), **settings).images
    if kind != "ours":
        scheduler = pipeline.scheduler
        pipeline = make_pipeline(pipeline.unet, make_scheduler(ObjectiveConfig(schedule="squared_cosine")), None)
        assert type(pipeline.unet) is UNet2DModel
        pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path)
    again = UNetPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is UNetPipeline
    assert type(again.unet) is (UNet if kind == "ours" else UNet2DModel)
    assert type(again.scheduler) is type(pipeline.scheduler)
    torch.testing.assert_close(again(range(10), **settings).images, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert not torch.equal(again(range(10), **settings | {"guidance_scale": 1.0}).images, expected)


@pytest.mark.thorough  # tests/test_readme.py draws with the folder's own files, too, but in this process
def test_the_line_of_the_card_draws_without_this_package(tmp_path: Path) -> None:
    """In a process that cannot import unetgn, somewhere else; the folder draws the class, the seed and the guidance."""
    folder = tmp_path / "saved"
    unet = digits_network("epsilon")
    make_pipeline(unet, make_scheduler(ObjectiveConfig(schedule="squared_cosine")), None).save_pretrained(folder)
    ours = UNetPipeline(unet, make_scheduler(ObjectiveConfig(schedule="squared_cosine")))
    (expected,) = ours([6], class_labels=3, guidance_scale=2).images
    assert abs(draw_by_card(folder, tmp_path, 6) - np.asarray(expected)).max() <= 1


def test_a_network_without_classes_is_diffusers_own_pipeline_too(tmp_path: Path) -> None:
    unet = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32], attention_levels=[], depth=1).eval()
    make_pipeline(unet, make_scheduler(ObjectiveConfig()), None).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is DDPMPipeline
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert len(UNetPipeline.from_pretrained(tmp_path)([0, 1], num_inference_steps=2).images) == 2


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    pipeline = digits()
    pipeline.save_pretrained(tmp_path)
    assert "pip install unetgn" in (tmp_path / "README.md").read_text()  # of our class, which diffusers has not
    (tmp_path / "README.md").write_text("# Mine\n")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


PALETTE = Image.new("P", (8, 8), 1)  # as label pictures are
PALETTE.putpalette([0, 0, 0, 128, 0, 0])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no seed": ({"seeds": []}, "seeds are"),
    "a negative seed": ({"seeds": [-1]}, "seeds are"),
    "a large seed": ({"seeds": 2**63}, "seeds are"),
    "half a seed": ({"seeds": [0.5]}, "seeds are"),
    "too few labels": ({"seeds": [0, 1, 2], "class_labels": [1, 2]}, "class_labels has 2 entries; 3 seeds take 1 or 3"),
    "a class that is not there": ({"class_labels": 10}, "classes are the numbers 0 to 9"),
    "half a class": ({"class_labels": 1.5}, "classes are the numbers 0 to 9"),
    "a prompt": ({"prompt": "a cat"}, "reads no text"),
    "embeddings of a text": ({"prompt_embeds": torch.zeros(1, 7, 24)}, "reads no text"),
    "a text to lead away from": ({"negative_prompt": "a dog"}, "negative_prompt was given, but this network reads no"),
    "embeddings of the empty text": ({"negative_prompt_embeds": torch.zeros(1, 7, 24)}, "reads no text"),
    "half a seed of torch's": ({"seeds": torch.tensor([0.5])}, "seeds are"),
    "half a seed of NumPy's": ({"seeds": np.float32(0.5)}, "seeds are"),
    "a truth for a seed": ({"seeds": [True]}, "seeds are"),
    "a text for a seed": ({"seeds": "12"}, "seeds are"),
    "rows of seeds": ({"seeds": np.zeros((2, 2), int)}, "seeds are"),
    "pixels of 32 bits": ({"image": Image.fromarray(np.full((8, 8), 70_000, np.int32))}, "from 0 to 65535"),
    "pixels below 0": ({"image": Image.fromarray(np.full((8, 8), -1, np.int32))}, "mode I from -1 to -1"),
    "floats beyond": ({"image": Image.fromarray(np.full((8, 8), 256, np.float32))}, "there they are from 0 to 255"),
    "a palette for a mask": ({"image": PHOTO, "mask_image": PALETTE}, "a palette of colours"),
    "guidance by nothing": ({"class_labels": None, "guidance_scale": 2.0}, "no class_labels and no prompt"),
    "guidance without a number": ({"guidance_scale": float("nan")}, "must be a finite number"),
    "an interval without guidance": ({"guidance_interval": (0, 1)}, "guidance_scale is 1, which is no guidance"),
    "a rescaling without guidance": ({"guidance_rescale": 0.5}, "guidance_scale is 1, which is no guidance"),
    "an interval that is none": ({"guidance_scale": 2, "guidance_interval": (3, 1)}, "0 <= low < high"),
    "an interval of no step": ({"guidance_scale": 2, "guidance_interval": (1e9, 2e9)}, "none of them in it"),
    "too much rescaling": ({"guidance_scale": 2, "guidance_rescale": 1.5}, "a share from 0 to 1"),
    "no steps": ({"num_inference_steps": 0}, "steps is 0"),
    "too many steps": ({"num_inference_steps": 1001}, "steps is 1001"),
    "steps that do not divide": ({"num_inference_steps": 600}, "takes a number that divides 1000 nearly"),
    "an output": ({"output_type": "png"}, "there are pil, np, pt, latent"),
    "a tensor for callbacks": ({"callback_on_step_end_tensor_inputs": ["noise"]}, "there is 'latents'"),
    "a strength of nothing": ({"strength": 0.5}, "strength was given without an image"),
    "a mask of nothing": ({"mask_image": HALF}, "mask_image was given without an image"),
    "a mask of 0 and 1": ({"image": PHOTO, "mask_image": Image.fromarray(np.asarray(HALF) // 255)}, "black all over"),
    "no strength": ({"image": PHOTO, "strength": 0.0}, "above 0 and at most 1"),
    "an image of other proportions": ({"image": Image.new("L", (8, 16))}, "crop it to the same proportions"),
    "an image beyond the range": ({"image": torch.full((1, 8, 8), -1.0)}, "have values in"),
    "an image of other channels": ({"image": torch.zeros(3, 8, 8)}, "has 3 channels; 1 are needed"),
    "a name for an image": ({"image": "cat.png"}, "image is str; give a PIL image"),
    "two images of one": ({"image": [PHOTO, PHOTO]}, "image is 2 pictures; 1 seeds take 1 or 1"),
    "noise of another shape": ({"latents": torch.zeros(1, 1, 4, 4)}, "one for each seed is"),
    "a width of no image": ({"width": 2**16 + 1}, "width is 65537"),
    "noise that is not finite": ({"latents": torch.full((1, 1, 8, 8), float("nan"))}, "latents has values"),
    "no height": ({"height": 0}, "height is 0; it must be from 1 to 65536"),
}  # fmt: skip


SEEDS = [3, np.int64(3), np.uint8(3), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3]), range(3, 4), (3,),
         {3}, iter([3]), [np.int32(3)], [torch.tensor(3)], {3: "a"}.keys()]  # fmt: skip


@pytest.mark.parametrize("seeds", SEEDS, ids=[f"{number} {type(each).__name__}" for number, each in enumerate(SEEDS)])
def test_a_seed_is_a_number_however_it_is_written(seeds: Any) -> None:
    (number,) = read_seeds(seeds)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize("seeds", [None, torch.Generator(), object()])
def test_what_lists_no_seeds_is_said(seeds: Any) -> None:
    with pytest.raises(TypeError, match="give one or more whole numbers"):
        digits()(seeds, class_labels=1)


SHADES = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4 + 2  # darkest 2, brightest 254
DEEP = {
    "I;16": Image.fromarray(SHADES.astype(np.uint16) * 257),
    "I;16B": Image.frombytes("I;16B", (8, 8), (SHADES.astype(">u2") * 257).tobytes()),
    "I of 16 bits": Image.fromarray(SHADES.astype(np.int32) * 257),
    "I of 8 bits": Image.fromarray(SHADES.astype(np.int32)),
    "F up to 1": Image.fromarray(SHADES.astype(np.float32) / 255),
    "F up to 255": Image.fromarray(SHADES.astype(np.float32)),
    "P of greys": Image.fromarray(SHADES).convert("P"),
    "RGB": Image.fromarray(SHADES).convert("RGB"),
    "LA": Image.fromarray(SHADES).convert("LA"),
}


@pytest.mark.parametrize("mode", DEEP)
def test_a_picture_of_any_depth_is_the_picture(mode: str) -> None:
    plain, picture = Image.fromarray(SHADES), DEEP[mode]
    for channels in (1, 3):
        expected = read_images(plain, (8, 8), channels, 1)
        torch.testing.assert_close(read_images(picture, (8, 8), channels, 1), expected, rtol=0, atol=0.01)
        small = read_images(picture, (4, 4), channels, 1)
        torch.testing.assert_close(small, read_images(plain, (4, 4), channels, 1), rtol=0, atol=0.02)
    assert torch.equal(read_mask(picture, (8, 8), 1), read_mask(plain, (8, 8), 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_an_array_of_any_depth_is_the_picture(dtype: type) -> None:
    white = np.iinfo(dtype).max // 255 if np.issubdtype(dtype, np.integer) else 1 / 255
    array = (SHADES * dtype(white))[..., None]
    for given in (array, torch.from_numpy(array).permute(2, 0, 1)):
        made = read_images(given, (8, 8), 1, 1)
        torch.testing.assert_close(made, read_images(Image.fromarray(SHADES), (8, 8), 1, 1), rtol=0, atol=1e-5)


def test_a_picture_of_one_bit_is_a_mask() -> None:
    for half in (HALF.convert("1"), HALF.convert("P"), Image.fromarray(np.asarray(HALF) > 0)):
        assert torch.equal(read_mask(half, (8, 8), 1), read_mask(HALF, (8, 8), 1))


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_a_callback_ends_the_drawing_as_in_diffusers(output_type: str) -> None:
    pipeline, kept = digits("euler"), []

    def interrupt(pipeline: UNetPipeline, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        kept.append(given["latents"])
        pipeline._interrupt = step == 2
        return given

    options = {"class_labels": [1, 2], "num_inference_steps": 8, "output_type": output_type}
    made = pipeline([0, 1], callback_on_step_end=interrupt, **options).images
    assert len(kept) == 3
    assert pipeline.interrupt
    if output_type == "latent":
        assert torch.equal(made, kept[-1].clamp(-1, 1).cpu())
    kept.clear()
    pipeline([0, 1], callback_on_step_end=lambda *given: kept.append(given[1]), **options)
    assert kept == list(range(8))  # the next call begins anew


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("name", ["ddpm", "ddpm_parallel", "dpmsolver++", "dpmsolver++_singlestep"])
def test_a_variance_that_no_network_here_predicts_is_refused_by_name(name: str, variance: str) -> None:
    pipeline = digits(name)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, variance_type=variance)
    with pytest.raises(ValueError, match=f"variance_type='{variance}'.* will do"):
        pipeline(0, class_labels=1)


def test_a_network_that_predicts_a_variance_is_refused_by_name() -> None:
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=2, block_out_channels=(32,),
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    with pytest.raises(ValueError, match=r"2 channels of 1; .*such as a variance \(learned_range\)"):
        UNetPipeline(unet, make_scheduler(ObjectiveConfig()))(0)


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_before_the_first_step(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = digits()
    monkeypatch.setattr(type(pipeline.unet), "forward", lambda *_, **__: pytest.fail("a step was made"))
    arguments, message = WRONG[what]
    given = {"seeds": 0, "class_labels": 1} | arguments
    with pytest.raises(ValueError, match=message):
        pipeline(**given)
    if "callback_on_step_end_tensor_inputs" not in given:
        with pytest.raises(ValueError, match=message):
            pipeline.plan(given.pop("seeds"), Settings(**given))


def test_settings_are_the_arguments_of_a_call_that_decide_on_its_images() -> None:
    taken = inspect.signature(UNetPipeline.__call__).parameters
    of_a_call = {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "return_dict"}
    expected = {name: taken[name].default for name in taken if name not in {"self", "seeds"} | of_a_call}
    assert vars(Settings()) == expected


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "it has a noise schedule of its own"),
        (PNDMScheduler(), "skip_prk_steps=True will do"),
        (DDIMScheduler(timestep_spacing="linspace"), "timestep_spacing='trailing' will do"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='discrete' will do"),
        (EulerDiscreteScheduler(num_train_timesteps=100), "ends with"),
        (DDPMScheduler(timestep_spacing="leading"), "begins at level 500 of 1000"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused_with_what_would_do(scheduler: Any, message: str) -> None:
    pipeline = digits()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipeline(0, class_labels=1, num_inference_steps=2)


def test_networks_that_do_not_predict_an_image_or_fit_no_picture_are_refused() -> None:
    def pipeline(**more: Any) -> UNetPipeline:
        return UNetPipeline(
            UNet(channels=(32,), attention_levels=[], depth=1, **more), make_scheduler(ObjectiveConfig())
        )

    with pytest.raises(ValueError, match="makes 6 channels of 3"):
        pipeline(out_channels=6)(0)
    with pytest.raises(ValueError, match="spatial_dims is 1, but images have 2 axes"):
        pipeline(spatial_dims=1)(0)
    with pytest.raises(ValueError, match="has no sample_size: give height and width"):
        pipeline()(0)
    with pytest.raises(ValueError, match="the network makes 4 channels, and pictures have 1"):
        pipeline(in_channels=4, out_channels=4, sample_size=8)(0)


@pytest.fixture
def latent() -> UNetPipeline:
    """A pipeline of latents with weights that nothing trained; a latent is four pixels wide."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    unet = UNet(in_channels=4, out_channels=4, sample_size=4, channels=(32,), attention_levels=[], depth=1)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    trained = make_scheduler(ObjectiveConfig(schedule="squared_cosine", clip_sample=False))
    pipeline = UNetPipeline(unet.eval(), trained, vae=vae.eval())
    pipeline.use_scheduler("euler_ancestral")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_decoded_and_pictures_are_encoded_as_the_autoencoder_says(
    latent: UNetPipeline, shift: float | None, tmp_path: Path
) -> None:
    latent.vae.register_to_config(shift_factor=shift)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    made = latent([3, 4], num_inference_steps=3, output_type="latent").images
    assert made.shape == (2, 4, 4, 4)
    decoded = latent.vae.decode(made / 0.5 + (shift or 0)).sample
    images = latent([3, 4], num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)

    mask = Image.fromarray(np.repeat([[255] * 8 + [0] * 8], 16, axis=0).astype(np.uint8))
    settings = {"num_inference_steps": 3, "image": photo, "mask_image": mask}
    together = latent([0, 1, 2], **settings).images
    alone = latent(1, **settings).images[0]
    drawn, wanted = (np.asarray(image).astype(int) for image in (together[1], photo))
    assert abs(drawn - np.asarray(alone)).max() <= 1
    assert np.array_equal(drawn[:, 8:], wanted[:, 8:])
    assert not np.array_equal(drawn[:, :8], wanted[:, :8])
    # One step from almost no noise gives the picture's own latents back, whatever the network says.
    latent.use_scheduler("ddim")
    kept = latent(0, image=photo, strength=0.001, num_inference_steps=900, output_type="latent").images
    clean = latent.vae.encode(torch.from_numpy(np.asarray(photo)).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
    assert abs(kept - (clean - (shift or 0)) * 0.5).max() < 0.1
    latent.use_scheduler("euler_ancestral")
    latent.save_pretrained(tmp_path)
    again = UNetPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(again([3, 4], num_inference_steps=3, output_type="latent").images, made)


def test_without_a_class_the_null_class_is_drawn_where_it_was_trained() -> None:
    images = digits()([0, 1], num_inference_steps=10, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    unet = UNet(sample_size=8, num_classes=3, channels=(32,), attention_levels=[], depth=1,
                condition={"null_class_trained": False})  # fmt: skip
    pipeline = UNetPipeline(unet, make_scheduler(ObjectiveConfig()))
    with pytest.raises(ValueError, match="give class_labels from 0 to 2"):
        pipeline(0)
    with pytest.raises(ValueError, match="guidance needs a network"):
        pipeline(0, class_labels=1, guidance_scale=2.0)


def with_its_own_network(pipeline: UNetPipeline) -> UNetPipeline:
    """Copy a pipeline with a network that may be changed: other tests draw with the same one."""
    unet = UNet.from_config(pipeline.unet.config).eval()
    unet.load_state_dict(pipeline.unet.state_dict())
    pipeline.register_modules(unet=unet)
    return pipeline


@pytest.mark.parametrize("how", ["bfloat16", "float16", "channels_last"])
def test_precision_and_layout_change_the_image_little(how: str) -> None:
    settings = {"class_labels": CLASSES, "num_inference_steps": 10, "output_type": "pt"}
    expected = digits()(range(10), **settings).images
    pipeline = with_its_own_network(digits())
    if how == "channels_last":
        pipeline.unet.to(memory_format=torch.channels_last)
    else:
        pipeline.to(getattr(torch, how))
    images = pipeline(range(10), **settings).images
    assert images.dtype == torch.float32
    assert (images - expected).abs().mean() < {"bfloat16": 0.03, "float16": 0.003, "channels_last": 1e-4}[how]


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("in place", "eager"),
        pytest.param("assigned", "aot_eager", marks=pytest.mark.slow),
        pytest.param("assigned", "inductor", marks=pytest.mark.slow),
        pytest.param("in place", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_network_draws_and_saves_the_same_pictures(way: str, backend: str, tmp_path: Path) -> None:
    """In one graph: nothing of the network is left to Python."""
    settings = {"class_labels": [1, 2], "num_inference_steps": 3}
    torch.manual_seed(0)
    unet = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[8], depth=1, attention_levels=[0],
                num_classes=10, norm={"num_groups": 4}).eval()  # fmt: skip
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    pipeline = UNetPipeline(unet, make_scheduler(ObjectiveConfig()))
    expected = [np.asarray(image).astype(int) for image in pipeline([3, 4], **settings).images]
    torch._dynamo.reset()
    if way == "assigned":
        pipeline.unet = torch.compile(pipeline.unet, backend=backend, fullgraph=True)
    else:
        pipeline.unet.compile(backend=backend, fullgraph=True)
    drawn = pipeline([3, 4], **settings).images
    pipeline.save_pretrained(tmp_path)
    again = UNetPipeline.from_pretrained(tmp_path)([3, 4], **settings).images
    for images in (drawn, again):
        assert max(abs(np.asarray(image) - wanted).max() for image, wanted in zip(images, expected, strict=True)) <= 1


def test_every_part_is_brought_to_the_device_before_it_computes(
    latent: UNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `enable_model_cpu_offload` does, also where a part computes by another method than its forward."""
    settings = {"image": Image.fromarray(np.zeros((16, 16, 3), np.uint8)), "num_inference_steps": 3, "strength": 0.7}
    expected = np.stack([np.asarray(image) for image in latent([3, 4], **settings).images])
    brought: list[str] = []
    before = CpuOffload.pre_forward

    def bring(self: CpuOffload, module: torch.nn.Module, *arguments: Any, **more: Any) -> Any:
        brought.append(type(module).__name__)
        return before(self, module, *arguments, **more)

    monkeypatch.setattr(CpuOffload, "pre_forward", bring)
    latent.enable_model_cpu_offload(device="cpu")
    drawn = np.stack([np.asarray(image) for image in latent([3, 4], **settings).images])
    assert np.array_equal(drawn, expected)
    assert (brought[0], "UNet" in brought, brought[-1]) == ("AutoencoderKL", True, "AutoencoderKL")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pipeline_is_offloaded_and_draws_on_a_gpu_what_it_draws_on_the_cpu() -> None:
    pipeline, settings = digits("euler_ancestral"), {"class_labels": CLASSES, "num_inference_steps": 10}
    expected = np.stack([np.asarray(image).astype(int) for image in pipeline(range(10), **settings).images])
    unet = UNet.from_config(pipeline.unet.config).eval()
    unet.load_state_dict(pipeline.unet.state_dict())
    for how in ("moved", "offloaded"):
        there = UNetPipeline(unet, pipeline.scheduler)
        there.to("cuda") if how == "moved" else there.enable_model_cpu_offload()
        drawn = np.stack([np.asarray(image).astype(int) for image in there(range(10), **settings).images])
        assert abs(drawn - expected).max() <= 2
        unet.to("cpu")


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "pndm"])
def test_a_folder_with_another_scheduler_is_not_diffusers_own_pipeline(name: str, tmp_path: Path) -> None:
    """DDPMPipeline would clip no image."""
    unet = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32], attention_levels=[], depth=1).eval()
    pipeline = make_pipeline(unet, make_scheduler(ObjectiveConfig()), None)
    pipeline.use_scheduler(name)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == ["pipeline", "UNetPipeline"]
    assert "DDPMPipeline" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("dpmsolver++", {"prediction_type": "v-prediction"}, "prediction_type='v-prediction'"),
    ],
)
def test_a_configuration_that_would_not_be_followed_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    pipeline = digits(name)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    with pytest.raises(ValueError, match=message):
        pipeline(0, class_labels=1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_ancestral_draws_numbers_in_few_steps(prediction: str) -> None:
    """Of float32 it takes the root of less than nothing at three steps of the cosine schedule."""
    images = digits("euler_ancestral", prediction)([0, 1], class_labels=[1, 2], num_inference_steps=3, output_type="pt")
    assert images.images.isfinite().all()
    assert images.images.std() > 0.05


@functools.cache
def straight(name: str) -> Any:
    """Make the scheduler that comes right after the network's own."""
    network = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32], attention_levels=[], depth=1)
    pipeline = UNetPipeline(network, make_scheduler(ObjectiveConfig()))
    pipeline.use_scheduler(name)
    return pipeline.scheduler


@pytest.mark.parametrize("first", SCHEDULERS)
def test_a_scheduler_is_the_same_whichever_was_there_before(first: str) -> None:
    """Their options have the same names, and other values: algorithm_type, solver_type, timestep_spacing."""
    network = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32], attention_levels=[], depth=1)
    pipeline = UNetPipeline(network, make_scheduler(ObjectiveConfig()))
    pipeline.use_scheduler(first)
    pipeline.use_scheduler("unipc")  # which keeps what it has no use for
    before = pipeline.scheduler
    for second in SCHEDULERS:
        pipeline.scheduler = before
        pipeline.use_scheduler(second)
        expected = straight(second)
        assert type(pipeline.scheduler) is type(expected)
        assert dict(pipeline.scheduler.config) == dict(expected.config)


@pytest.mark.parametrize("keys", [{}, {"num_classes": 10}])
def test_a_network_of_ours_is_known_as_one_though_its_configuration_answers_for_diffusers_options(keys) -> None:
    unet = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32], attention_levels=[], depth=1, **keys)
    facts = facts_of(unet, None)
    assert (facts.ours, facts.num_classes, facts.null_class) == (True, keys.get("num_classes"), None)
    assert facts.unlabelled


def test_images_that_are_not_finite_are_an_error_and_no_black_pictures() -> None:
    pipeline = digits()
    pipeline.unet = copy.deepcopy(pipeline.unet)  # other tests draw with the same one
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the network's images are not finite"):
        pipeline(range(2), class_labels=[1, 2], num_inference_steps=2)


def small_network(size: tuple[int, int]) -> UNet:
    return UNet(in_channels=3, out_channels=3, channels=[8, 8, 8], depth=1, attention_levels=[],
                norm={"num_groups": 4}, sample_size=size)  # fmt: skip


@pytest.mark.parametrize(("size", "plain"), [((12, 20), True), ((10, 20), False), ((12, 18), False)])
def test_what_a_finished_run_leaves_draws_at_the_size_that_it_was_trained_on(
    size: tuple[int, int], plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where diffusers' class cannot, because a level has an odd side, it is saved as ours, and that is said."""
    pipeline = make_pipeline(small_network(size), make_scheduler(ObjectiveConfig()), None)
    assert isinstance(pipeline.unet, UNet2DModel) == plain
    assert ("multiples of 4, and not" in caplog.text) != plain
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline(seeds=[0], num_inference_steps=2).images
    assert (picture.height, picture.width) == size


def test_a_size_that_a_network_of_diffusers_cannot_make_is_refused() -> None:
    pipeline = make_pipeline(small_network((12, 20)), make_scheduler(ObjectiveConfig()), None)
    with pytest.raises(ValueError, match="multiples of 4, and not 12×18"):
        pipeline.plan([0], Settings(width=18))
    assert pipeline.plan([0], Settings(height=16, width=8)).shape == (3, 16, 8)
