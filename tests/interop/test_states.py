"""Converts models in the states in which tools leave them: each is refused with what to do first, and that is tried.

A state is a function of a model. A refusal names it by the text beside it; the third function does what the message
advises, and then the model converts and computes what it computed before the state. Other states convert at once.
"""

import copy
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import attention_processor
from torch import nn

import unetgn
from tests.tensors import randomized
from unetgn import UNet
from unetgn.interop import convert, from_diffusers, to_diffusers

CPU = torch.device("cpu")
PLAIN = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
PLAIN |= {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
CROSSED = {**PLAIN, "cross_attention_dim": 24, "attention_head_dim": 2}
CROSSED |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
LORA = {"init_lora_weights": False, "target_modules": ["to_q"]}
DOORS = {
    "unet2d": (lambda: UNet2DModel(**PLAIN), from_diffusers),
    "condition": (lambda: UNet2DConditionModel(**CROSSED), from_diffusers),
    "ours": (lambda: UNet.from_diffusers(UNet2DConditionModel(**CROSSED)), to_diffusers),
}
DIFFUSERS, CROSS = ("unet2d", "condition"), ("condition",)
IMAGES, CONTEXT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, 24)


def first(model, kind):
    return next(module for module in model.modules() if isinstance(module, kind))


def done(function):
    """Make a state of a function that changes the model in place."""

    def state(model):
        function(model)
        return model

    return state


def unhooked(model):
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    return model


def merged(model):
    model.fuse_lora()
    model.unload_lora()
    return model


def own_forward(model):
    forward = model.mid_block.forward
    model.mid_block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def replaced(model):
    model.conv_out.__class__ = type("Scaled", (nn.Conv2d,), {})


def set_value(kind, **values):
    def state(model):
        for name, value in values.items():
            setattr(first(model, kind), name, value)
        return model

    return state


class OwnProcessor(attention_processor.AttnProcessor2_0):
    """Stands for a processor that computes something else."""


def set_processors(model, processor):
    for module in model.modules():
        if isinstance(module, attention_processor.Attention):
            module.set_processor(processor)


def subclassed(model):
    class Int8(torch.Tensor):
        pass

    model.conv_in.weight = nn.Parameter(model.conv_in.weight.detach().as_subclass(Int8))


def part_on_meta(model):
    model.conv_in.to("meta")


def mapped_to_disk(model):
    """Load the model with its last block on disk, and take the hooks off: those weights are nowhere then."""
    places = {name: "cpu" for name, _ in model.named_children()} | {"up_blocks": "disk"}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, device_map=places, offload_folder=f"{folder}/disk")
        return unhooked(loaded)


def prepared(model):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests of the process had another precision
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def unwrapped(model):
    return accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)


@dataclass(frozen=True)
class State:
    """Holds a state, what its refusal says (None: it converts), what undoes it, and the doors at which it occurs."""

    make: Any
    says: str | None = None
    undo: Any = None
    doors: tuple[str, ...] = tuple(DOORS)


GROUPS = {"onload_device": CPU, "offload_device": CPU, "num_blocks_per_group": 1}
STATES = {
    "compiled": State(lambda m: torch.compile(m, backend="eager"), r"convert model\._orig_mod", lambda m: m._orig_mod),
    "compiled in place": State(
        done(lambda m: m.compile()),
        r"convert it before \.compile",
        done(lambda m: setattr(m, "_compiled_call_impl", None)),
    ),
    "a block compiled": State(done(lambda m: m.mid_block.compile()), r"at mid_block: convert it before \.compile"),
    "data parallel": State(nn.DataParallel, r"convert model\.module", lambda m: m.module),
    "PeftModel": State(
        lambda m: peft.get_peft_model(m, peft.LoraConfig(**LORA)), "merge_and_unload", lambda m: m.merge_and_unload()
    ),
    "adapter": State(
        done(lambda m: m.add_adapter(peft.LoraConfig(**LORA))), "unload_lora", merged, doors=("condition", "ours")
    ),
    "injected": State(
        done(lambda m: peft.inject_adapter_in_model(peft.LoraConfig(**LORA), m)),
        "before peft.inject_adapter_in_model",
        doors=("unet2d",),
    ),
    "offloaded": State(
        done(lambda m: accelerate.cpu_offload(m, execution_device=CPU)), "remove_hook_from_module", unhooked
    ),
    "offloaded as a whole": State(
        done(lambda m: accelerate.cpu_offload_with_hook(m, CPU)), "remove_hook_from_module", unhooked
    ),
    "offloaded to disk": State(
        lambda m: accelerate.disk_offload(m, tempfile.mkdtemp(), execution_device=CPU), "remove_hook_from_mod", unhooked
    ),
    "mapped to disk": State(mapped_to_disk, "on the meta device: load all of its weights first", doors=CROSS),
    "prepared": State(prepared, r"accelerator\.unwrap_model\(model, keep_fp32_wrapper=False\)", unwrapped),
    **{
        f"group offload {kind}": State(
            done(lambda m, kind=kind: m.enable_group_offload(**GROUPS, offload_type=kind)),
            "before enable_group_offload",
        )
        for kind in ("block_level", "leaf_level")
    },
    "layerwise casting": State(
        done(lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)),
        "before enable_layerwise_casting",
    ),
    "float8": State(
        lambda m: m.to(torch.float8_e4m3fn), r"with \.to\(torch\.bfloat16\)", lambda m: m.to(torch.bfloat16)
    ),
    "quantized": State(done(lambda m: setattr(m, "is_quantized", True)), "without quantization_config"),
    "weights of a class": State(done(subclassed), "weights of the class Int8"),
    "partly on meta": State(done(part_on_meta), "conv_in.weight.* on the meta device"),
    "forward hook": State(done(lambda m: m.conv_in.register_forward_hook(print)), "conv_in has _forward_hooks"),
    "pre-hook": State(done(lambda m: m.register_forward_pre_hook(print)), "UNet.* has _forward_pre_hooks"),
    "parametrized": State(
        done(lambda m: nn.utils.parametrizations.weight_norm(m.conv_in)),
        r"conv_in is ParametrizedConv2d.*remove_parametrizations",
        done(lambda m: nn.utils.parametrize.remove_parametrizations(m.conv_in, "weight")),
    ),
    "old weight norm": State(
        done(lambda m: nn.utils.weight_norm(m.conv_in)),
        "conv_in has _forward_pre_hooks",
        done(lambda m: nn.utils.remove_weight_norm(m.conv_in)),
    ),
    "own forward": State(done(own_forward), "mid_block has a forward of its own"),
    "quantized by torch": State(
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}), r"is torch\.ao\..*builds Linear", doors=CROSS
    ),
    "another class": State(done(replaced), "conv_out is Scaled, where the configuration builds Conv2d"),
    **{
        f"{name} of {kind.__name__}": State(set_value(kind, **{name: value}), rf"has {name}=.*register_to_config")
        for kind, name, value in (
            *((nn.Conv2d, "padding_mode", "circular"), (nn.Conv2d, "dilation", (2, 2)), (nn.GroupNorm, "eps", 0.1)),
            *((nn.GroupNorm, "num_groups", 1), (nn.Dropout, "p", 0.9)),
        )
    },
    **{
        f"{name} of Attention": State(
            set_value(attention_processor.Attention, **{name: value}), f"has {name}=", doors=DIFFUSERS
        )
        for name, value in (
            *(("upcast_attention", True), ("upcast_softmax", None), ("scale", 9.0), ("heads", 1)),
            *(("rescale_output_factor", 3.0), ("residual_connection", None)),
        )
    },
    "upcast of ours": State(set_value(unetgn.nn.MultiHeadAttention, upcast=True), "has upcast=True", doors=("ours",)),
    "FreeU": State(
        done(lambda m: m.enable_freeu(0.9, 0.2, 1.2, 1.4)), "disable_freeu", done(lambda m: m.disable_freeu()), CROSS
    ),
    "joint projections": State(
        done(lambda m: m.fuse_qkv_projections()),
        "unfuse_qkv_projections",
        done(lambda m: m.unfuse_qkv_projections()),
        CROSS,
    ),
    "own processor": State(
        done(lambda m: set_processors(m, OwnProcessor())),
        r"attends by OwnProcessor.*\.set_processor\(.*AttnProcessor2_0\(\)\) there first",
        done(lambda m: set_processors(m, attention_processor.AttnProcessor2_0())),
        DIFFUSERS,
    ),
    "default processor": State(done(lambda m: set_processors(m, attention_processor.AttnProcessor())), doors=DIFFUSERS),
    "set_default_attn_processor": State(done(lambda m: m.set_default_attn_processor()), doors=CROSS),
    "fused": State(done(unetgn.fuse), doors=DIFFUSERS),
    "a user's attribute": State(done(lambda m: setattr(m, "note", "cats"))),
    "trained": State(lambda m: m.train().requires_grad_(False)),
    "bfloat16": State(lambda m: m.to(torch.bfloat16)),
    "copied": State(copy.deepcopy),
    "dispatched to one device": State(lambda m: accelerate.dispatch_model(m, {"": "cpu"})),
    "hooks taken off": State(lambda m: unhooked(done(lambda m: accelerate.cpu_offload(m, execution_device=CPU))(m))),
}
LEAN = {
    "sliced attention": lambda m: m.set_attention_slice(1),
    "memory-efficient attention": lambda m: m.set_attn_processor(attention_processor.XFormersAttnProcessor()),
    "chunks": lambda m: [
        block.set_chunk_feed_forward(1, 1)
        for block in m.modules()
        if isinstance(block, diffusers.models.attention.BasicTransformerBlock)
    ],
}
MEMBERS = [(name, door) for name, state in STATES.items() for door in state.doors]


def outputs(model, door, dtype=torch.float32):
    x = IMAGES[:, : 3 if door == "unet2d" else 4].to(dtype)
    context = () if door == "unet2d" else (CONTEXT.to(dtype),)
    with torch.no_grad():
        return model.eval()(x, 5, *context).sample


@pytest.fixture(scope="module")
def made():
    """Keep one random model a door; each test takes a copy."""
    return {door: randomized(make()) for door, (make, _) in DOORS.items()}


def fresh(made, door):
    return copy.deepcopy(made[door]).eval()


@pytest.mark.parametrize(("name", "door"), MEMBERS, ids=[f"{name}-{door}" for name, door in MEMBERS])
def test_a_model_in_a_state_converts_or_says_what_to_do_first(name, door, made):
    state, through = STATES[name], DOORS[door][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = state.make(fresh(made, door))
        if state.says is not None:
            with pytest.raises(ValueError, match=state.says):
                through(model)
        if state.says is not None and state.undo is None:
            return
        model = model if state.undo is None else state.undo(model)
        converted = through(model)
    dtype = next(converted.parameters()).dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(outputs(converted, door, dtype), outputs(model, door, dtype), **tolerance)


@pytest.mark.parametrize("name", ["offloaded to disk", "float8", "partly on meta", "weights of a class"])
def test_the_weights_alone_of_such_a_model_are_refused_too(name, made):
    model = STATES[name].make(fresh(made, "unet2d"))
    weights = {**model.state_dict(), "conv_out.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="the checkpoint has "):
        convert("diffusers-unet2d", model.config, weights)


@pytest.mark.parametrize("name", LEAN)
def test_what_changes_no_number_is_left_out_with_a_warning(name, made):
    model = fresh(made, "condition")
    before = outputs(model, "condition")
    LEAN[name](model)
    with pytest.warns(UserWarning, match="not in the converted network, since they change no number"):
        converted = from_diffusers(model)
    torch.testing.assert_close(outputs(converted, "condition"), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("own", [False, True])
def test_gradient_checkpointing_comes_along_with_a_function_of_its_own(door, own, made):
    calls = []

    def function(module, *args):
        calls.append(module)
        return module(*args)

    model = fresh(made, door)
    model.enable_gradient_checkpointing(*[function] * own)
    converted = DOORS[door][1](model)
    assert converted.is_gradient_checkpointing
    outputs(converted, door)
    with torch.enable_grad():
        converted.train()(IMAGES[:, : 3 if door == "unet2d" else 4], 5, *[CONTEXT] * (door != "unet2d"))
    assert bool(calls) == own


@pytest.mark.parametrize("door", DOORS)
def test_a_model_without_weights_gives_the_names_and_shapes_and_it_is_said_what_would_give_the_weights(door, made):
    bare, expected = fresh(made, door).to("meta"), DOORS[door][1](made[door])
    with pytest.warns(UserWarning, match=r"on the meta device.*load_state_dict\(weights, assign=True\)"):
        converted = DOORS[door][1](bare)
    bare.load_state_dict(made[door].state_dict(), assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outputs(DOORS[door][1](bare), door).equal(outputs(expected, door))
    assert all(tensor.is_meta for tensor in converted.state_dict().values())
    assert {k: t.shape for k, t in converted.state_dict().items()} == {
        k: t.shape for k, t in expected.state_dict().items()
    }


def test_what_is_neither_model_nor_folder_is_named_with_what_would_be_right(made):
    pipeline = diffusers.DDPMPipeline(made["unet2d"], diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match=r"takes a model or a folder, got DDPMPipeline; .* \.unet"):
        from_diffusers(pipeline)


def test_a_configuration_that_diffusers_cannot_build_names_the_option(made):
    model = fresh(made, "condition")
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="encoder_hid_dim_type='ip_image_proj' is not supported"):
        from_diffusers(model)


def test_an_option_that_the_configuration_says_too_converts(made):
    model = fresh(made, "condition")
    for module in model.modules():
        if isinstance(module, attention_processor.Attention):
            module.upcast_attention = True
    with pytest.raises(
        ValueError, match="upcast_attention=True, where the configuration builds upcast_attention=False"
    ):
        from_diffusers(model)
    model.register_to_config(upcast_attention=True)
    assert from_diffusers(model).unet_config.attention.upcast


def test_an_inpainting_model_with_a_wider_first_layer_converts_once_its_configuration_says_so(made):
    model = fresh(made, "condition")
    model.conv_in = nn.Conv2d(9, 8, 3, padding=1)
    with pytest.raises(
        ValueError, match=r"conv_in has in_channels=9, where the .* in_channels=4: .*register_to_config"
    ):
        from_diffusers(model)
    model.register_to_config(in_channels=9)
    assert from_diffusers(model).conv_in.weight.shape[1] == 9
