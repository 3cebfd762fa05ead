"""Runs our U-Net in diffusers' pipelines of other families, in their own code: the images are those of their U-Net."""

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    KandinskyV22Pipeline,
    PriorTransformer,
    StableDiffusionXLImg2ImgPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

from tests.interop.test_pipelines import XL, texts
from tests.tensors import noise, randomized
from unetgn import UNet

Convert = Callable[[Any], Any]  # what a pipeline is given in the place of each U-Net: itself, or ours
SIMPLE = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 8, "block_out_channels": (32, 64), "layers_per_block": 1},
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    **{"attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift", "cross_attention_dim": 24},
}
PICTURES = {**SIMPLE, "in_channels": 3, "out_channels": 6}
TALL = {
    **{"sample_size": 16, "in_channels": 6, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1},
    **{"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2},
}


def autoencoder(cls: type = AutoencoderKL, **options: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return randomized(cls(block_out_channels=(8, 8), **blocks, norm_num_groups=4, **options), seed=4).eval()


def unet_of(cls: type = UNet2DConditionModel, seed: int = 0, **config: Any) -> Any:
    return randomized(cls(**config), seed=seed).eval()


def drawn(pipeline: Any, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(**arguments, generator=torch.Generator().manual_seed(5)).images
    return torch.from_numpy(made) if isinstance(made, np.ndarray) else made


def xl_from_an_image(convert: Convert) -> torch.Tensor:
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    unet = convert(unet_of(**XL))
    pipeline = StableDiffusionXLImg2ImgPipeline(
        **parts, vae=autoencoder(), unet=unet, scheduler=scheduler, add_watermarker=False
    )
    pipeline.text_encoder_2 = SimpleNamespace(config=SimpleNamespace(projection_dim=16), dtype=torch.float32)
    given = texts(pooled_prompt_embeds=(16,), negative_pooled_prompt_embeds=(16,))
    given |= {"image": noise(1, 3, 16, 16, dtype=torch.float32).sigmoid(), "strength": 0.7}
    return drawn(pipeline, **given, num_inference_steps=4, output_type="latent")


def kolors(convert: Convert) -> torch.Tensor:
    with mock.patch.dict(sys.modules, sentencepiece=mock.MagicMock(__spec__=None)):  # of the tokenizer: none is made
        kolors = importlib.import_module("diffusers.pipelines.kolors.pipeline_kolors")
    unet = convert(unet_of(**XL, encoder_hid_dim=20, encoder_hid_dim_type="text_proj"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipeline = kolors.KolorsPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler
    )
    given = {
        f"{sign}{name}": noise(*shape, seed=len(sign), dtype=torch.float32)
        for sign in ("", "negative_")
        for name, shape in (("prompt_embeds", (1, 5, 20)), ("pooled_prompt_embeds", (1, 16)))
    }
    return drawn(pipeline, **given, num_inference_steps=3, output_type="latent")


def karlo(convert: Convert) -> torch.Tensor:
    decoder = convert(unet_of(**PICTURES, class_embed_type="identity"))
    first, last = (convert(unet_of(UNet2DModel, seed, **TALL)) for seed in (1, 2))
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=12, num_embeddings=5
    )
    projection = UnCLIPTextProjModel(clip_embeddings_dim=12, time_embed_dim=128, cross_attention_dim=24)
    learned = UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon", num_train_timesteps=1000)
    fixed = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon", num_train_timesteps=1000)
    pipeline = UnCLIPPipeline(
        prior=randomized(prior, seed=6).eval(),
        decoder=decoder,
        text_encoder=None,
        tokenizer=None,
        text_proj=randomized(projection, seed=7).eval(),
        super_res_first=first,
        super_res_last=last,
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=learned,
        super_res_scheduler=fixed,
    )
    words = SimpleNamespace(input_ids=torch.zeros(1, 5), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    pipeline.tokenizer = mock.MagicMock(return_value=words, model_max_length=5)
    read = SimpleNamespace(text_embeds=noise(1, 12, dtype=torch.float32))
    read.last_hidden_state = noise(1, 5, 12, dtype=torch.float32)
    pipeline.text_encoder = lambda ids: read
    given = {"text_model_output": (-read.text_embeds, -read.last_hidden_state)}
    given |= {"text_attention_mask": torch.ones(1, 5, dtype=torch.bool), "output_type": "np"}
    steps = {f"{part}_num_inference_steps": 2 for part in ("prior", "decoder", "super_res")}
    return drawn(pipeline, **given, **steps)


def kandinsky(convert: Convert) -> torch.Tensor:
    options = {"addition_embed_type": "image", "encoder_hid_dim": 12, "encoder_hid_dim_type": "image_proj"}
    unet = convert(unet_of(**SIMPLE, **options))
    movq = autoencoder(VQModel, latent_channels=4, num_vq_embeddings=12, vq_embed_dim=4)
    pipeline = KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler(variance_type="learned_range"), movq=movq)
    given = {
        name: noise(1, 12, seed=len(name), dtype=torch.float32) for name in ("image_embeds", "negative_image_embeds")
    }
    return drawn(pipeline, **given, height=32, width=32, num_inference_steps=3, output_type="latent")


def deepfloyd_if(convert: Convert) -> torch.Tensor:
    options = {"encoder_hid_dim": 20, "addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    unet = convert(
        unet_of(**{**PICTURES, **options, "cross_attention_dim": 32}, act_fn="gelu", cross_attention_norm="group_norm")
    )
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    scheduler = DDPMScheduler(variance_type="learned_range", thresholding=True)
    pipeline = IFPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    given = {
        name: noise(1, 5, 20, seed=len(name), dtype=torch.float32)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    return drawn(pipeline, **given, num_inference_steps=3, output_type="pt")


RUNS = {
    "SDXL img2img": xl_from_an_image,
    "Kolors": kolors,
    "Karlo": karlo,
    "Kandinsky 2.2": kandinsky,
    "DeepFloyd IF": deepfloyd_if,
}
QUICK = ("SDXL img2img", "Karlo")


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_the_images_are_those_of_diffusers_u_net(family):
    """And so is what the network gives in each step: of random weights images are often black and white."""
    theirs, ours = ([], []), ([], [])

    def watched(unet: Any, made: tuple[list[Any], list[torch.Tensor]]) -> Any:
        made[0].append(unet)
        unet.register_forward_hook(lambda _, given, result: made[1].append(result[0]))
        return unet

    expected = RUNS[family](lambda unet: watched(unet, theirs))
    images = RUNS[family](lambda unet: watched(UNet.from_diffusers(unet), ours))
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    assert len(ours[1]) >= 2
    assert {type(unet) for unet in ours[0]} == {UNet}
