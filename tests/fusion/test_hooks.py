"""Hooks on the modules of a fused model run as they did, whoever puts them there and whenever."""

import copy

import pytest
import torch
from torch import nn

import unetgn
from tests.fusion.models import CASES, SMALL


def output(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**SMALL.inputs()).sample


def seen_by_hooks(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return what forward hooks on every norm and activation see in one run, in order."""
    seen: list[tuple[str, torch.Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _m, _args, result, path=path: seen.append((path, result.clone())))
        for path, module in model.named_modules()
        if isinstance(module, (nn.GroupNorm, nn.SiLU))
    ]
    output(model)
    for handle in handles:
        handle.remove()
    return seen


def test_forward_hooks_on_norms_and_activations_see_what_they_saw_before():
    model = SMALL.model()
    expected = seen_by_hooks(model)
    unetgn.fuse(model)
    got = seen_by_hooks(model)
    assert [path for path, _ in got] == [path for path, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))


def test_a_place_is_fused_again_once_its_hook_is_gone(calls):
    model = SMALL.model()
    unetgn.fuse(model)
    handle = model.conv_norm_out.register_forward_pre_hook(lambda *_: None)
    output(model)
    hooked = len(calls)
    handle.remove()
    output(model)
    assert (hooked, len(calls) - hooked) == (SMALL.places - 1, SMALL.places)


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_full_backward_hook", "register_forward_hook"])
def test_every_kind_of_hook_on_a_norm_runs(kind):
    model = SMALL.model()
    unetgn.fuse(model)
    ran = []
    getattr(model.conv_norm_out, kind)(lambda *_: ran.append(1) and None)
    SMALL.run(model)
    assert ran == [1]


def test_a_hook_for_all_modules_sees_norms_and_activations(calls):
    model = SMALL.model()
    unetgn.fuse(model)
    seen = set()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _args: seen.add(type(module)))
    output(model)
    handle.remove()
    assert {nn.GroupNorm, nn.SiLU} <= seen
    assert not calls


def test_a_norm_that_was_replaced_after_fusing_is_the_one_that_runs():
    model = SMALL.model()
    unetgn.fuse(model)
    model.conv_norm_out = nn.BatchNorm2d(32)
    plain = copy.deepcopy(model)
    unetgn.unfuse(plain)
    torch.testing.assert_close(output(model), output(plain))


@pytest.mark.parametrize("order", ["fuse first", "offload first"])
def test_weights_that_stay_elsewhere_until_a_hook_brings_them_are_found(order):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = SMALL.model()
    expected = output(model)
    for step in (unetgn.fuse, cpu_offload)[:: 1 if order == "fuse first" else -1]:
        step(model, execution_device=torch.device("cpu")) if step is cpu_offload else step(model)
    assert model.conv_norm_out.weight.device.type == "meta"
    torch.testing.assert_close(output(model), expected)
    remove_hook_from_submodules(model)
    unetgn.unfuse(model)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("order", ["fuse first", "offload first"])
def test_the_hook_of_model_offloading_and_the_fused_tail_both_run(order, calls):
    from accelerate import cpu_offload_with_hook

    model = SMALL.model()
    expected = output(model)
    if order == "fuse first":
        unetgn.fuse(model)
    model, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    if order == "offload first":
        assert len(unetgn.fuse(model).fused) == SMALL.places
    torch.testing.assert_close(output(model), expected)
    assert len(calls) == SMALL.places
    unetgn.unfuse(model)
    assert torch.equal(output(model), expected)
    assert len(calls) == SMALL.places
    hook.remove()
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("order", ["fuse first", "cast first"])
def test_layerwise_casting_gives_what_it_gives_without_fusing(order):
    plain, model = SMALL.model(), SMALL.model()
    plain.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    if order == "fuse first":
        unetgn.fuse(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    if order == "cast first":
        assert len(unetgn.fuse(model).fused) == SMALL.places
    assert model.conv_in.weight.dtype == torch.bfloat16
    torch.testing.assert_close(output(model), output(plain))
    unetgn.unfuse(model)
    assert torch.equal(output(model), output(plain))


@pytest.mark.parametrize("order", ["fuse first", "hook first"])
def test_a_diffusers_hook_on_the_model_runs_around_the_fused_forward(order, calls):
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        runs = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.runs += 1
            return args, kwargs

    model = SMALL.model()
    expected = output(model)
    if order == "fuse first":
        unetgn.fuse(model)
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Counting(), "counting")
    if order == "hook first":
        unetgn.fuse(model)
    torch.testing.assert_close(output(model), expected)
    assert (Counting.runs, len(calls)) == (1, SMALL.places)
    unetgn.unfuse(model)
    assert torch.equal(output(model), expected)
    assert (Counting.runs, len(calls)) == (2, SMALL.places)
    model._diffusers_hook.remove_hook("counting")
    assert torch.equal(output(model), expected)


def test_group_offloading_gives_what_it_gives_without_fusing():
    from diffusers.hooks import apply_group_offloading

    model = SMALL.model()
    expected = output(model)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")
    unetgn.fuse(model)
    torch.testing.assert_close(output(model), expected)


def text_to_image_pipeline():
    """Make a StableDiffusionPipeline with random weights; prompts come as embeddings, so it needs no tokenizer."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    pipeline = StableDiffusionPipeline(
        vae=CASES["AutoencoderKL"].model(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=32, bos_token_id=0, eos_token_id=1)),
        unet=CASES["SD 1.5"].model(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        **{"tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 5, 16, generator=generator)
    embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": -prompt}
    sizes = {"height": 16, "width": 16, "num_inference_steps": 2}
    return pipeline(**embeds, **sizes, generator=generator, output_type="pt").images


@pytest.mark.parametrize("order", ["fuse first", "offload first"])
def test_a_pipeline_with_model_offloading_draws_what_it_drew(order, calls):
    pipeline = text_to_image_pipeline()
    expected = drawn(pipeline)
    fused = ("unet", "vae")
    if order == "fuse first":
        for name in fused:
            unetgn.fuse(getattr(pipeline, name))
    pipeline.enable_model_cpu_offload(device="cpu")  # where there is a GPU, the device to which the hooks move a model
    for name in fused:
        assert len(unetgn.fuse(getattr(pipeline, name)).fused) > 20
        assert hasattr(getattr(pipeline, name), "_hf_hook")
    torch.testing.assert_close(drawn(pipeline), expected, rtol=1e-4, atol=1e-5)
    decoder = 2 * (2 + 2 * 3) + 1  # the middle, three residual blocks a level, the output norm
    assert len(calls) == 2 * CASES["SD 1.5"].places + decoder
    pipeline.remove_all_hooks()
    for name in fused:
        unetgn.unfuse(getattr(pipeline, name))
    assert torch.equal(drawn(pipeline), expected)


def test_a_forward_that_somebody_else_replaced_is_left_and_the_report_says_so():
    model = SMALL.model()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    report = unetgn.fuse(model)
    assert [place.path for place in report.left] == ["conv_norm_out"]
    assert "wrapped on the instance" in report.left[0].reason
    assert len(report.fused) == SMALL.places - 1


def test_a_wrapper_that_kept_the_fused_forward_runs_the_original_once_unfused(calls):
    model = SMALL.model()
    expected = output(model)
    unetgn.fuse(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    unetgn.unfuse(model)
    assert torch.equal(output(model), expected)
    assert not calls


def test_names_that_wrapping_policies_look_for_and_isinstance_stay():
    from accelerate.utils.fsdp_utils import get_module_class_from_name
    from diffusers.models.resnet import ResnetBlock2D

    model = CASES["SD 1.5"].model()
    before = [type(module).__name__ for module in model.modules()]
    unetgn.fuse(model)
    assert [type(module).__name__ for module in model.modules()] == before
    assert get_module_class_from_name(model, "ResnetBlock2D") is ResnetBlock2D
    assert isinstance(model.mid_block.resnets[0], ResnetBlock2D)
