"""Checks the U-Net as a whole: sizes, modes, files, and recomputation."""

import json
import logging
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from peft import LoraConfig, get_peft_model

from tests import tensors
from tests.tensors import randomized
from unetgn import UNet

noise = partial(tensors.noise, seed=1, dtype=torch.float32)
SMALL = {"channels": (32, 64), "depth": 1, "attention_levels": (1,)}


@pytest.fixture
def unet():
    return randomized(UNet(**SMALL, num_classes=10)).eval()


# Sizes and axes.


@pytest.mark.parametrize("shape", [(2, 1, 31, 33), (2, 1, 1, 17), (1, 1, 1, 1), (0, 1, 8, 8), (2, 1, 6, 16)])
@pytest.mark.parametrize(
    "resample",
    [
        {"kind": "conv"},
        {"kind": "plain"},
        {"kind": "resblock"},
        {"kind": "resblock", "taps": (1, 3, 3, 1)},
        {"kind": "plain", "taps": (1, 3, 3, 1)},
    ],
)
@pytest.mark.parametrize("residual_input", [False, True])
def test_any_size_works_with_one_channel(shape, resample, residual_input):
    unet = UNet(
        in_channels=1,
        out_channels=1,
        channels=(8, 16, 16),
        depth=1,
        attention_levels=(2,),
        norm={"num_groups": 4},
        resample=resample,
        encoder={"residual_input": residual_input},
    )
    output = unet(noise(*shape), 5).sample
    assert output.shape == shape
    assert output.isfinite().all()


def test_padding_at_the_end_needs_two_pixels():
    unet = UNet(**SMALL, resample={"padding": "end"})
    assert unet(noise(1, 3, 31, 33), 5).sample.shape == (1, 3, 31, 33)
    with pytest.raises(ValueError, match=r"resample\.padding='end' cannot halve \(1, 17\) pixels; use 'both'"):
        unet(noise(1, 3, 1, 17), 5)


@pytest.mark.parametrize("kind", ["conv", "plain", "resblock"])
def test_an_image_that_is_constant_along_an_axis_is_a_network_of_fewer_axes(kind):
    """The three-dimensional network with its kernels summed along one axis is the two-dimensional one."""
    options = {**SMALL, "resample": {"kind": kind}, "transformer": {"context_dim": 6}}
    flat = randomized(UNet(**options)).eval()
    deep = UNet(**options | {"spatial_dims": 3, "resample": {"kind": kind, "strides": (1, 2, 2)}}).eval()
    weights = {}
    for key, like in deep.state_dict().items():
        value = flat.state_dict()[key]
        weights[key] = torch.zeros_like(like)
        if like.ndim == 5:
            weights[key][:, :, like.shape[2] // 2] = value  # a kernel that does not look along the new axis
        else:
            weights[key] = value
    deep.load_state_dict(weights)
    x, context = noise(2, 3, 8, 8), noise(2, 5, 6)
    with torch.no_grad():
        expected = flat(x, 5, context).sample
        output = deep(x[:, :, None].expand(-1, -1, 3, -1, -1), 5, context).sample
    torch.testing.assert_close(output, expected[:, :, None].expand_as(output), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_one_source_serves_one_two_and_three_axes(spatial_dims):
    unet = UNet(**SMALL, spatial_dims=spatial_dims, transformer={"context_dim": 6}, resample={"kind": "resblock"})
    x = noise(2, 3, *[9] * spatial_dims)
    output = unet(x, 5, noise(2, 4, 6)).sample
    output.square().sum().backward()
    assert output.shape == x.shape
    assert all(parameter.grad is not None for parameter in unet.parameters())


# Modes.


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    """Not even in training: there are no statistics over the batch. In float64, so that only rounding differs."""
    unet = randomized(UNet(**SMALL, num_classes=10, transformer={"context_dim": 6})).double().train()
    x, context, t = noise(3, 3, 8, 8).double(), noise(3, 5, 6).double(), torch.tensor([3, 500, 999])
    labels = torch.tensor([0, 4, 10])
    with torch.no_grad():
        together = unet(x, t, context, class_labels=labels).sample
        others = unet(torch.cat([x[:1], 100 * x[1:] + 7]), t, context, class_labels=labels).sample
        alone = unet(x[:1], t[:1], context[:1], class_labels=labels[:1]).sample
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-12 * float(together.abs().max()))
    torch.testing.assert_close(others[:1], together[:1], rtol=0, atol=1e-12 * float(together.abs().max()))


def test_training_and_evaluation_agree_without_dropout(unet):
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(unet.train()(x, 5).sample, unet.eval()(x, 5).sample)


def test_dropout_acts_in_training_only():
    unet = randomized(UNet(**SMALL, dropout=0.5))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        expected = unet.eval()(x, 5).sample
        assert not torch.equal(unet.train()(x, 5).sample, expected)
        assert torch.equal(unet.eval()(x, 5).sample, expected)


def test_there_are_no_running_statistics(unet):
    assert not list(unet.buffers())
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    unet.train()(noise(2, 3, 8, 8), 5)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_new_network_predicts_zero():
    assert not UNet(**SMALL)(noise(2, 3, 8, 8), 5).sample.any()


def test_silu_once_or_in_each_block_is_the_same():
    each, once = (randomized(UNet(**SMALL, resblock={"activate_embedding": flag})) for flag in (True, False))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(each(x, 5).sample, once(x, 5).sample)


def test_channels_last_gives_the_same_numbers_and_keeps_the_layout(unet):
    x = noise(2, 3, 16, 16)
    with torch.no_grad():
        expected = unet(x, 5).sample
        output = unet.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), 5).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_give_nearly_the_same(dtype, caplog):
    unet = randomized(UNet(**SMALL, time={"features": "fourier", "fourier_scale": 4.0}, transformer={"context_dim": 6}))
    frequencies, x, context = unet.time_proj.weight.clone(), noise(2, 3, 8, 8), noise(2, 5, 6)
    with torch.no_grad():
        expected = unet(x, 0.3, context).sample
        output = unet.to(dtype)(x.to(dtype), 0.3, context.to(dtype)).sample
    assert output.dtype == dtype
    assert torch.equal(unet.time_proj.weight, frequencies)  # in float32 still
    error = torch.linalg.vector_norm(output.float() - expected) / torch.linalg.vector_norm(expected)
    assert error < 20 * torch.finfo(dtype).eps


# Files and pipelines.


def test_a_saved_network_comes_back(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.unet_config == unet.unet_config
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(unet(x, 5).sample, again(x, 5).sample)


def test_a_network_with_buffers_comes_back_in_sixteen_bits(tmp_path):
    options = {"time": {"features": "fourier"}, "resample": {"kind": "resblock", "taps": (1, 3, 3, 1)}}
    unet = randomized(UNet(**SMALL, **options))
    unet.save_pretrained(tmp_path, variant="fp16")
    again = UNet.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float16}
    assert torch.equal(again.time_proj.weight, unet.time_proj.weight)


def pipeline_images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_pipelines_run_and_come_back(unet, tmp_path, pipeline, scheduler):
    unet.register_to_config(sample_size=8)
    images = pipeline_images(pipeline(unet, scheduler()))
    assert images.shape == (1, 8, 8, 3)
    pipeline(unet, scheduler()).save_pretrained(tmp_path)
    again = pipeline_images(DiffusionPipeline.from_pretrained(tmp_path))
    np.testing.assert_allclose(again, images, rtol=0, atol=1e-5)  # weights in a mapped file are aligned otherwise


def test_a_saved_pipeline_names_our_class_and_loads_in_a_new_process(unet, tmp_path):
    unet.register_to_config(sample_size=8)
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["unetgn.unet", "UNet"]
    code = f"""
import numpy, torch, unetgn.unet  # diffusers takes components from modules that are imported, and from no others
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
images = pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), pipeline_images(pipeline), rtol=0, atol=1e-5)


LORA = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "init_lora_weights": False}


def test_lora_through_peft_trains_and_merges():
    torch.manual_seed(0)
    unet = randomized(UNet(**SMALL, transformer={"context_dim": 6}))
    x, context = noise(2, 3, 8, 8), noise(2, 5, 6)
    with torch.no_grad():
        plain = unet(x, 5, context).sample
    tuned = get_peft_model(unet, LoraConfig(**LORA))
    output = tuned(x, 5, context).sample
    output.square().sum().backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not torch.allclose(output, plain)
    with torch.no_grad():
        torch.testing.assert_close(tuned.merge_and_unload()(x, 5, context).sample, output, rtol=1e-3, atol=1e-3)


def test_lora_through_diffusers_can_be_switched_off():
    torch.manual_seed(0)
    unet = randomized(UNet(**SMALL))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        plain = unet(x, 5).sample
        unet.add_adapter(LoraConfig(**LORA))
        assert not torch.allclose(unet(x, 5).sample, plain)
        unet.disable_adapters()
        assert torch.equal(unet(x, 5).sample, plain)


# Recomputation in the backward pass.


def gradients(unet, x):
    unet.zero_grad()
    (unet(x, 5).sample * noise(*x.shape, seed=3)).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])


def saved_bytes(unet, x):
    """Count the bytes kept for the backward pass, each storage once, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(x, 5)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("grade", ["activations", "blocks"])
@pytest.mark.parametrize("options", [{}, {"resample": {"kind": "resblock"}, "resblock": {"embedding": "scale_shift"}}])
def test_recomputation_changes_no_gradient(grade, options):
    unet = randomized(UNet(**SMALL, **options))
    x = noise(2, 3, 8, 8)
    expected = gradients(unet, x)
    unet.set_checkpointing(grade)
    torch.testing.assert_close(gradients(unet, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grade", ["activations", "blocks"])
def test_recomputation_repeats_the_dropout(grade):
    unet = randomized(UNet(**SMALL, dropout=0.5)).train()
    x = noise(2, 3, 8, 8)
    torch.manual_seed(0)
    expected = gradients(unet, x)
    unet.set_checkpointing(grade)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(unet, x), expected, rtol=1e-5, atol=1e-5)


def test_each_grade_of_recomputation_keeps_less():
    unet, x = randomized(UNet(channels=(32, 64), depth=2, attention_levels=(1,))), noise(2, 3, 16, 16)
    kept = []
    for grade in ("none", "activations", "blocks"):
        unet.set_checkpointing(grade)
        kept.append(saved_bytes(unet, x))
    assert kept[1] < 0.75 * kept[0]
    assert kept[2] < 0.75 * kept[1]


def test_diffusers_names_for_recomputation_work(unet):
    assert not unet.is_gradient_checkpointing
    unet.enable_gradient_checkpointing()
    assert unet.checkpointing == "blocks"
    assert unet.is_gradient_checkpointing
    unet.disable_gradient_checkpointing()
    assert unet.checkpointing == "none"
    with pytest.raises(ValueError, match="'none', 'activations' or 'blocks', got 'all'"):
        unet.set_checkpointing("all")


@pytest.mark.parametrize(
    "function",
    [
        partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
        lambda block, *inputs: torch.utils.checkpoint.checkpoint(block.__call__, *inputs, use_reentrant=False),
    ],
    ids=["as PyTorch has it", "as diffusers calls it"],
)
def test_blocks_are_recomputed_by_the_function_that_is_given(function):
    unet, calls = randomized(UNet(**SMALL)), []

    def counted(block, *inputs):
        calls.append(len(inputs))
        return function(block, *inputs)

    x = noise(2, 3, 8, 8)
    expected = torch.autograd.grad(unet(x, 3).sample.square().sum(), list(unet.parameters()))
    unet.enable_gradient_checkpointing(counted)
    for got, want in zip(
        torch.autograd.grad(unet(x, 3).sample.square().sum(), list(unet.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(got, want)
    blocks = sum(len(level.resnets) for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks))
    assert calls == [3] * blocks
    with torch.no_grad():
        unet(x, 3)
    assert len(calls) == blocks


def test_a_change_of_dtype_says_nothing_where_there_is_nothing_to_say():
    said = []
    logger = logging.getLogger("diffusers.models.modeling_utils")
    handler = logging.Handler()
    handler.emit = said.append
    logger.addHandler(handler)
    try:
        unet = UNet(channels=(32,), depth=1)
        unet.to(torch.float16), unet.to("cpu", torch.float64), unet.to(dtype=torch.float32)
        assert said == []
        UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).to(
            torch.float16
        )
        assert len(said) == 1
    finally:
        logger.removeHandler(handler)
