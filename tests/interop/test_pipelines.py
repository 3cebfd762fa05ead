"""Runs our U-Net in diffusers' pipelines, in their own code: the images are the same as with their U-Net."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.tensors import randomized
from unetgn import UNet

STABLE = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
XL = {
    **STABLE,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def texts(seed=3, **pooled):
    """Draw text embeddings in the place of a text encoder's, for the prompt and the negative prompt."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(1, *shape, generator=generator)
        for name, shape in (("prompt_embeds", (5, 24)), ("negative_prompt_embeds", (5, 24)), *pooled.items())
    }


def images(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline(**arguments, num_inference_steps=3, generator=generator, output_type="latent").images


def stable_diffusion(unet, vae, scheduler=None):
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_stable_diffusion_makes_the_same_latents_with_our_unet(vae):
    theirs = randomized(UNet2DConditionModel(**STABLE)).eval()
    expected = images(stable_diffusion(theirs, vae), **texts(), guidance_scale=5.0)
    ours = images(stable_diffusion(UNet.from_diffusers(theirs), vae), **texts(), guidance_scale=5.0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_stable_diffusion_xl_makes_the_same_latents_with_our_unet(vae):
    theirs = randomized(UNet2DConditionModel(**XL)).eval()
    given = texts(pooled_prompt_embeds=(16,), negative_pooled_prompt_embeds=(16,))

    def run(unet):
        pipeline = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            add_watermarker=False,
        )
        pipeline.text_encoder_2 = _Projection()
        return images(pipeline, **given, guidance_scale=5.0)

    torch.testing.assert_close(run(UNet.from_diffusers(theirs)), run(theirs), rtol=1e-4, atol=1e-4)


class _Projection:
    """Answers what the pipeline asks of its second text encoder where the embeddings are given: the pooled width."""

    class config:
        projection_dim = 16

    dtype = torch.float32


def test_a_distilled_network_gets_its_guidance_scale(vae):
    theirs = randomized(UNet2DConditionModel(**STABLE, time_cond_proj_dim=6)).eval()
    given = {"prompt_embeds": texts()["prompt_embeds"], "guidance_scale": 8.0}
    expected = images(stable_diffusion(theirs, vae, LCMScheduler(steps_offset=1)), **given)
    ours = images(stable_diffusion(UNet.from_diffusers(theirs), vae, LCMScheduler(steps_offset=1)), **given)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_controlnet_residuals_reach_our_unet(vae):
    theirs = randomized(UNet2DConditionModel(**STABLE)).eval()
    control = randomized(ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=(8, 8)), seed=1).eval()
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def run(unet):
        pipeline = StableDiffusionControlNetPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            controlnet=control,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return images(pipeline, **texts(), image=picture, guidance_scale=5.0)

    torch.testing.assert_close(run(UNet.from_diffusers(theirs)), run(theirs), rtol=1e-4, atol=1e-4)


def test_a_pipeline_with_our_unet_is_saved_and_loaded(vae, tmp_path):
    pipeline = stable_diffusion(UNet.from_diffusers(randomized(UNet2DConditionModel(**STABLE)).eval()), vae)
    expected = images(pipeline, **texts())
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(
        tmp_path, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, image_encoder=None
    )
    assert type(again.unet) is UNet
    assert torch.equal(images(again, **texts()), expected)
