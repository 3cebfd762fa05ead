"""Converts diffusers' U-Nets to ours and back: weights, outputs and gradients, on random architectures."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.contenders import kept_bytes, make_step
from benchmarks.networks import CIFAR10
from tests.tensors import randomized
from unetgn import UNet
from unetgn.interop import to_diffusers

DDPM = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
STABLE = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SIZED = {  # a pooled text of 4 numbers and two size numbers
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 4 + 2 * 8,
}
CLASSES = [{"class_embed_type": kind} for kind in (None, None, None, "timestep", "identity")]
PROJECTIONS = [
    {
        "class_embed_type": kind,
        "projection_class_embeddings_input_dim": 6,
        "class_embeddings_concat": concat,
    }
    for kind in ("projection", "simple_projection")
    for concat in (False, True)
] + [{"class_embed_type": "timestep", "class_embeddings_concat": True}]
SMALL_CONTEXT = {**STABLE, "cross_attention_dim": 12}
WITHOUT_ATTENTION = {
    **SMALL_CONTEXT,
    "down_block_types": ("DownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 2,
}
MIDDLE, SIMPLE_MIDDLE = "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"
KANDINSKY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": SIMPLE_MIDDLE,
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 32,
    "encoder_hid_dim": 6,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}
DEEPFLOYD = {
    **KANDINSKY,
    "act_fn": "gelu",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142,
    "mid_block_scale_factor": 1.4142,
    "mid_block_only_cross_attention": True,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}
SLOW_START = [HealthCheck.too_slow, HealthCheck.data_too_large]


@st.composite
def unet2d_options(draw):
    """Draw options of a small UNet2DModel that diffusers itself accepts and runs."""
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([4, 8]))
    channels = tuple(groups * draw(st.integers(1, 3)) for _ in range(levels))
    down = draw(st.sampled_from(["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]))
    downs = tuple(draw(st.sampled_from(["DownBlock2D", "AttnDownBlock2D", down])) for _ in range(levels))
    up = draw(st.sampled_from(["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]))
    ups = tuple(draw(st.sampled_from(["UpBlock2D", "AttnUpBlock2D", up])) for _ in range(levels))
    return {
        "sample_size": 8,
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 3)),
        "block_out_channels": channels,
        "down_block_types": downs,
        "up_block_types": ups,
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2D", "UNetMidBlock2D", None])),
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": groups,
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "attn_norm_num_groups": draw(st.sampled_from([None, 4, 2])),
        "add_attention": draw(st.booleans()),
        "attention_head_dim": draw(st.sampled_from([None, 4, 3])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "time_embedding_dim": draw(st.sampled_from([None, 20])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 2**0.5])),
        "num_class_embeds": draw(st.sampled_from([None, 5])),
        "class_embed_type": draw(st.sampled_from([None, None, "identity"])),
        "act_fn": draw(st.sampled_from(["silu", "silu", "gelu", "mish", "relu", "swish"])),
    }


@st.composite
def condition_options(draw):
    """Draw options of a small UNet2DConditionModel that diffusers itself accepts and runs."""
    levels = draw(st.integers(1, 3))
    channels = tuple(draw(st.sampled_from([8, 16, 24])) for _ in range(levels))
    down = draw(st.sampled_from(["DownBlock2D", "ResnetDownsampleBlock2D"]))
    downs = tuple(draw(st.sampled_from([down, "CrossAttnDownBlock2D"])) for _ in range(levels))
    up = draw(st.sampled_from(["UpBlock2D", "ResnetUpsampleBlock2D"]))
    ups = tuple(draw(st.sampled_from([up, "CrossAttnUpBlock2D"])) for _ in range(levels))
    layers = tuple(draw(st.integers(1, 2)) for _ in range(levels))
    nested = draw(st.booleans())
    depths = tuple(draw(st.integers(1, 2)) for _ in range(levels))
    added = draw(st.sampled_from([{"addition_embed_type": None}, SIZED]))
    context = draw(st.sampled_from([12, (12,) * levels]))
    return {
        "sample_size": 8,
        "block_out_channels": channels,
        "down_block_types": downs,
        "up_block_types": ups,
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn"] * 2 + ["UNetMidBlock2D", None])),
        "layers_per_block": layers,
        "norm_num_groups": draw(st.sampled_from([4, 8])),
        "attention_head_dim": tuple(draw(st.sampled_from([2, 3, 4])) for _ in range(levels)),
        "cross_attention_dim": context,
        "encoder_hid_dim": draw(st.sampled_from([None, 7])) if context == 12 else None,
        "transformer_layers_per_block": tuple((depth,) * count for depth, count in zip(depths, layers, strict=True))
        if nested
        else depths,
        "reverse_transformer_layers_per_block": tuple(
            (depth,) * (count + 1) for depth, count in zip(depths[::-1], layers[::-1], strict=True)
        )
        if nested
        else None,
        "use_linear_projection": draw(st.booleans()),
        "only_cross_attention": draw(st.sampled_from([False, tuple(level == 0 for level in range(levels))])),
        "upcast_attention": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 2**0.5])),
        "time_embedding_type": draw(st.sampled_from(["positional", "fourier"])),
        "time_embedding_dim": draw(st.sampled_from([None, 20])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
        "conv_in_kernel": draw(st.sampled_from([1, 3])),
        "conv_out_kernel": draw(st.sampled_from([1, 3])),
        "num_class_embeds": draw(st.sampled_from([None, 5])),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "flip_sin_to_cos": draw(st.booleans()),
        **added,
        **draw(st.sampled_from(CLASSES if added is SIZED else [*CLASSES, *PROJECTIONS])),
    }


@st.composite
def simple_options(draw):
    """Draw options of a small UNet2DConditionModel of Kandinsky's, Karlo's and DeepFloyd IF's kind."""
    levels = draw(st.integers(1, 3))
    downs = tuple(draw(st.sampled_from(["Resnet", "SimpleCrossAttn"])) for _ in range(levels))
    ups = tuple(draw(st.sampled_from(["Resnet", "SimpleCrossAttn"])) for _ in range(levels))
    names = {"Resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    names["SimpleCrossAttn"] = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
    act = draw(st.sampled_from(["silu", "gelu", "mish"]))
    return {
        "sample_size": 8,
        "in_channels": 8,
        "block_out_channels": tuple(draw(st.sampled_from([8, 16, 24])) for _ in range(levels)),
        "down_block_types": tuple(names[kind][0] for kind in downs),
        "up_block_types": tuple(names[kind][1] for kind in ups),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": draw(st.sampled_from([4, 8])),
        "attention_head_dim": tuple(draw(st.sampled_from([2, 4])) for _ in range(levels)),
        "only_cross_attention": draw(st.sampled_from([False, True, tuple(i == 0 for i in range(levels))])),
        "mid_block_only_cross_attention": draw(st.sampled_from([None, True, False])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "act_fn": act,
        "time_embedding_act_fn": draw(st.sampled_from([None, act, "relu"])),
        "timestep_post_act": draw(st.sampled_from([None, act])),
        "resnet_skip_time_act": draw(st.booleans()),
        "resnet_out_scale_factor": draw(st.sampled_from([1.0, 1.4142])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.4142])),
        "cross_attention_dim": 32,
        "cross_attention_norm": draw(st.sampled_from([None, "group_norm"])),
        "addition_embed_type_num_heads": 2,
        "encoder_hid_dim": 6,
        "encoder_hid_dim_type": draw(st.sampled_from(["text_proj", "text_image_proj", "image_proj"])),
        "addition_embed_type": draw(st.sampled_from([None, "text_image", "image", "image_hint"])),
        **draw(st.sampled_from([{}, {"encoder_hid_dim_type": "text_proj", "addition_embed_type": "text"}])),
    }


@st.composite
def mixed_options(draw):
    """Draw options of a small UNet2DConditionModel whose levels attend in several ways."""
    options = draw(condition_options())
    levels, kinds = len(options["block_out_channels"]), ["Attn", "CrossAttn", "SimpleCrossAttn", ""]
    downs = tuple(f"{draw(st.sampled_from(kinds))}DownBlock2D" for _ in range(levels))
    ups = tuple(f"{draw(st.sampled_from(kinds))}UpBlock2D" for _ in range(levels))
    padding = options["downsample_padding"] if any("Simple" not in kind for kind in downs[:-1]) else 1
    return {
        **options,
        "down_block_types": downs,
        "up_block_types": ups,
        "mid_block_type": draw(st.sampled_from([f"{MIDDLE}SimpleCrossAttn", f"{MIDDLE}CrossAttn", MIDDLE, None])),
        "attention_head_dim": tuple(draw(st.sampled_from([2, 4])) for _ in range(levels)),
        "downsample_padding": padding,
        "addition_embed_type": None,
        "encoder_hid_dim": None,
        "only_cross_attention": False,
    }


def inputs(model, seed=1):
    """Draw arguments for both libraries, by name."""
    generator, config = torch.Generator().manual_seed(seed), model.config

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = {"sample": noise(2, config.in_channels, 8, 8), "timestep": torch.tensor([3, 700])}
    if config.time_embedding_type == "fourier":  # random frequencies want noise levels around 1: phases in float32
        given["timestep"] = torch.tensor([0.25, 1.5], dtype=torch.float64)
    if config.class_embed_type == "timestep":
        given["class_labels"] = torch.tensor([0.25, 1.5], dtype=torch.float64)
    elif config.class_embed_type is not None:
        width = model.time_embedding.linear_2.out_features if config.class_embed_type == "identity" else 6
        given["class_labels"] = noise(2, width)
    elif config.num_class_embeds is not None:
        given["class_labels"] = torch.tensor([1, 4])
    if isinstance(model, UNet2DConditionModel):
        given["encoder_hidden_states"] = noise(2, 5, config.encoder_hid_dim or 12)
        if config.encoder_hid_dim_type == "image_proj":
            given["encoder_hidden_states"] = None
        if config.time_cond_proj_dim is not None:
            given["timestep_cond"] = noise(2, config.time_cond_proj_dim)
        if config.mid_block_type == SIMPLE_MIDDLE:
            given["added_cond_kwargs"] = added_inputs(config, noise)
            if config.addition_embed_type == "image_hint":
                given["sample"] = given["sample"][:, :4]
        elif config.addition_embed_type is not None:
            given["added_cond_kwargs"] = {
                "text_embeds": noise(2, 4),
                "time_ids": torch.tensor([[8.0, 5.0], [1.0, 3.0]]),
            }
    return given


def added_inputs(config, noise):
    """Draw what a network of Kandinsky's kind reads of added_cond_kwargs."""
    added, projection = config.addition_embed_type, config.encoder_hid_dim_type
    given = {}
    if added == "text_image":
        given = {"text_embeds": noise(2, 32), "image_embeds": noise(2, 32)}
    elif added in ("image", "image_hint"):
        given = {"image_embeds": noise(2, 6)}
    if added == "image_hint":
        given["hint"] = noise(2, 3, 64, 64)
    if projection == "image_proj" and not given:
        given = {"image_embeds": noise(2, 6)}
    elif projection == "text_image_proj" and not given:
        given = {"image_embeds": noise(2, 32)}
    return given


def at_the_origin(given):
    """Move the arguments to where the sinusoids are exact in float32 too: timestep 0, size numbers 0."""
    given = {**given, "timestep": torch.zeros(2)}
    if given.get("class_labels", torch.zeros(0, 0)).dtype == torch.float64 and given["class_labels"].ndim == 1:
        given["class_labels"] = torch.zeros(2)
    if "time_ids" in given.get("added_cond_kwargs", {}):
        added = given["added_cond_kwargs"]
        given["added_cond_kwargs"] = {**added, "time_ids": torch.zeros_like(added["time_ids"])}
    return given


def in_float32(given):
    if isinstance(given, dict):
        return {name: in_float32(value) for name, value in given.items()}
    return given.float() if given is not None and given.is_floating_point() else given


def assert_close(ours, theirs, limit):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * float(theirs.abs().max()))


def without_context(given):
    return {name: value for name, value in given.items() if name != "encoder_hidden_states"}


def assert_round_trip(model):
    """Convert a model there and back, and compare names, weights and what the three compute."""
    ours = UNet.from_diffusers(model.eval())
    back = to_diffusers(ours)
    blocks = (*model.config.down_block_types, model.config.mid_block_type, *model.config.up_block_types)
    attends = any("CrossAttn" in str(block) for block in blocks)
    # without a context the two classes can be the same network
    assert type(back) is type(model) or (not attends and isinstance(model, UNet2DConditionModel))
    weights = back.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    given = inputs(model)
    with torch.no_grad():
        expected, exact = model(**given).sample, model(**at_the_origin(given)).sample
        given = given if attends else without_context(given)
        unread = {"encoder_hidden_states": None} if isinstance(back, UNet2DConditionModel) and not attends else {}
        assert torch.equal(back(**given, **unread).sample, expected)
        pooled = model.config.get("addition_embed_type") == "text"  # by weights in float32, in diffusers
        assert_close(ours(**at_the_origin(given)).sample, exact, 1e-6 if pooled else 1e-10)
        assert_close(ours(**given).sample, expected, 1e-4)  # diffusers has its sinusoid in float32, ours is in float64
        expected = model.float()(**in_float32(inputs(model))).sample
        assert_close(ours.float()(**in_float32(given)).sample, expected, 2e-5)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=SLOW_START)
@given(options=unet2d_options())
def test_a_unet2d_model_comes_back_with_the_same_weights_and_outputs(options):
    assert_round_trip(randomized(UNet2DModel(**options), dtype=torch.float64))


@pytest.mark.parametrize("more", [{}, {"num_class_embeds": 10}])
def test_a_unet2d_model_with_labels_as_timesteps_is_converted(more):
    model = randomized(UNet2DModel(**DDPM, class_embed_type="timestep", **more)).eval()  # only float32 runs there
    ours, x = UNet.from_diffusers(model), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    back = to_diffusers(ours)
    for labels in (torch.tensor([3, 9]), torch.tensor([0.5, 7.25])):
        with torch.no_grad():
            expected = model(x, 5, class_labels=labels).sample
            assert_close(ours(x, 5, class_labels=labels).sample, expected, 2e-5)
            assert torch.equal(back(x, 5, class_labels=labels).sample, expected)


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, None),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 16}, 16),
        ({"attn_norm_num_groups": 16}, 16),
        ({}, 32),
    ],
)
def test_the_middle_attention_of_a_scale_shift_model_has_no_norm_unless_told(options, groups):
    model = randomized(UNet2DModel(**DDPM, **options), dtype=torch.float64)
    norm = UNet.from_diffusers(model).mid_block.attentions["0"].group_norm
    assert (norm and norm.num_groups) == groups
    assert_round_trip(model)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=SLOW_START)
@given(options=condition_options())
@example(options={**STABLE, **SIZED, "cross_attention_dim": 12, "time_embedding_type": "fourier", "freq_shift": 1})
def test_a_conditional_model_comes_back_with_the_same_weights_and_outputs(options):
    assert_round_trip(randomized(UNet2DConditionModel(**options), dtype=torch.float64))


def agrees(options):
    """Return True where the two widths of an image's embedding, 6 and 32, are not both wanted at once."""
    image, text_image = ("image", "image_hint"), ("text_image",)
    added, projection = options["addition_embed_type"], options["encoder_hid_dim_type"]
    return not (
        (added in image and projection == "text_image_proj") or (added in text_image and projection == "image_proj")
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=SLOW_START)
@given(options=simple_options().filter(agrees))
@example(options=KANDINSKY)
@example(options=DEEPFLOYD)
def test_a_model_of_simple_blocks_comes_back_with_the_same_weights_and_outputs(options):
    assert_round_trip(randomized(UNet2DConditionModel(**options), dtype=torch.float64))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=SLOW_START)
@given(options=mixed_options())
@example(
    options={
        **SMALL_CONTEXT,
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
    }
)
def test_a_model_of_several_kinds_of_attention_comes_back_with_the_same_weights_and_outputs(options):
    assert_round_trip(randomized(UNet2DConditionModel(**options), dtype=torch.float64))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW_START)
@given(options=st.one_of(unet2d_options(), condition_options(), simple_options().filter(agrees), mixed_options()))
def test_many_more_architectures_come_back_the_same(options):
    model = UNet2DConditionModel if "cross_attention_dim" in options else UNet2DModel
    assert_round_trip(randomized(model(**options), dtype=torch.float64))


@pytest.mark.parametrize(("model_class", "options"), [(UNet2DModel, DDPM), (UNet2DConditionModel, STABLE)])
def test_gradients_are_those_of_diffusers(model_class, options, monkeypatch):
    model = randomized(model_class(**options), dtype=torch.float64)
    ours = UNet.from_diffusers(model)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, model.config.in_channels, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    more = {"encoder_hidden_states": context} if model_class is UNet2DConditionModel else {}
    target = torch.randn(2, model.config.out_channels, 8, 8, generator=generator, dtype=torch.float64)
    # timestep 0: both sinusoids are exact there, diffusers' in float32 as ours in float64
    gradients = []
    for network in (ours, model):
        (network(x, 0, **more).sample * target).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for _, parameter in sorted(network.named_parameters())]))
    difference = torch.linalg.vector_norm(gradients[0] - gradients[1]) / torch.linalg.vector_norm(gradients[1])
    assert difference <= 1e-9


def test_the_cifar10_network_keeps_far_fewer_bytes_for_its_backward_pass_than_diffusers():
    one = CIFAR10.at(batch=1, size=32)
    names = ("diffusers", "ours", "ours, activations")
    kept = {name: kept_bytes(make_step(name, one, layout="contiguous", dtype=torch.float32)) for name in names}
    assert kept["ours"] <= 0.67 * kept["diffusers"]
    assert kept["ours, activations"] <= 0.41 * kept["diffusers"]


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_cross_attention_of_a_middle_that_we_do_not_have_is_ignored_as_diffusers_does(flag):
    assert_round_trip(
        randomized(UNet2DConditionModel(**SMALL_CONTEXT, mid_block_only_cross_attention=flag), dtype=torch.float64)
    )


def test_a_conditional_model_without_attention_converts_and_takes_no_context():
    model = randomized(UNet2DConditionModel(**WITHOUT_ATTENTION), dtype=torch.float64)
    ours, given = UNet.from_diffusers(model), at_the_origin(inputs(model))
    assert ours.unet_config.transformer is None
    with torch.no_grad():
        expected = model(**given).sample
        assert_close(ours(**without_context(given)).sample, expected, 1e-10)


@pytest.mark.parametrize(
    "depths",
    [
        {"transformer_layers_per_block": (2, 1, 3)},
        {"transformer_layers_per_block": (1, 2, 1, 2)},
        {"transformer_layers_per_block": (1, 2, (2, 5))},
        {"transformer_layers_per_block": ((2, 7), 1), "reverse_transformer_layers_per_block": (1, (1, 2, 9))},
        {"transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": (1, 2, 7)},
        {"transformer_layers_per_block": (1, 2, 3), "reverse_transformer_layers_per_block": (2, 1)},
    ],
)
@pytest.mark.parametrize("types", ["CrossAttn", ""])
def test_lists_of_depths_that_are_too_long_are_read_as_diffusers_does(depths, types):
    levels = {"down_block_types": (f"{types}DownBlock2D",) * 2, "up_block_types": (f"{types}UpBlock2D",) * 2}
    model = randomized(UNet2DConditionModel(**{**SMALL_CONTEXT, **levels, **depths}), dtype=torch.float64).eval()
    ours, given = UNet.from_diffusers(model), at_the_origin(inputs(model))
    with torch.no_grad():
        assert_close(ours(**given).sample, model(**given).sample, 1e-10)
