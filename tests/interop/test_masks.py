"""Masks attention in our U-Net as diffusers' own does, on random architectures, in float64."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.interop.test_diffusers import (
    DEEPFLOYD,
    KANDINSKY,
    SLOW_START,
    SMALL_CONTEXT,
    agrees,
    assert_close,
    at_the_origin,
    condition_options,
    inputs,
    mixed_options,
    simple_options,
)
from tests.tensors import noise, randomized
from unetgn import UNet

ADDED_TOKENS = {"text_image_proj": 10, "image_proj": 32 - 5}  # to the five tokens that `inputs` draws
WHOLE = {  # whose attention is over all pixels alike
    **SMALL_CONTEXT,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
KINDS = {
    "bool": lambda drawn: drawn > 0.4,
    "integers": lambda drawn: (drawn > 0.4).long(),
    "shares": lambda drawn: 1 - drawn / 5000,  # which leave something of every key
}


def a_mask(kind, length, seed=7):
    drawn = torch.rand(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[:, 0] = 1  # something is read
    return KINDS[kind](drawn)


def context_length(config):
    return 5 + ADDED_TOKENS.get(config.encoder_hid_dim_type, 0)


def reads_context(options):
    blocks = (*options["down_block_types"], *options["up_block_types"], str(options.get("mid_block_type", "CrossAttn")))
    return "CrossAttn" in " ".join(blocks)


def both(options):
    model = randomized(UNet2DConditionModel(**options), dtype=torch.float64).eval()
    return model, UNet.from_diffusers(model), at_the_origin(inputs(model))


def diffusers_own(model, arguments):
    """Compute with diffusers; it takes no mask where attention reads the context alone beside blocks named Simple."""
    try:
        with torch.no_grad():
            return model(**arguments).sample
    except RuntimeError:
        return assume(False)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=SLOW_START)
@given(
    options=st.one_of(condition_options(), simple_options().filter(agrees), mixed_options()).filter(reads_context),
    kind=st.sampled_from(sorted(KINDS)),
)
@example(options=SMALL_CONTEXT, kind="bool")
@example(options={**SMALL_CONTEXT, "only_cross_attention": True}, kind="shares")
def test_a_mask_of_the_context_does_what_it_does_in_diffusers(options, kind):
    model, ours, arguments = both(options)
    mask = a_mask(kind, context_length(model.config))
    expected = diffusers_own(model, {**arguments, "encoder_attention_mask": mask})
    with torch.no_grad():
        masked, plain = ours(**arguments, encoder_attention_mask=mask).sample, ours(**arguments).sample
    pooled = model.config.get("addition_embed_type") == "text"  # by weights in float32, in diffusers
    assert_close(masked, expected, 1e-6 if pooled else 1e-10)
    assert not torch.equal(masked, plain)


@pytest.mark.parametrize(
    ("options", "kind", "length"),
    [
        (WHOLE, "shares", 64),
        ({**WHOLE, "use_linear_projection": True, "upcast_attention": True}, "bool", 64),
        ({**SMALL_CONTEXT, "only_cross_attention": True, "mid_block_type": "UNetMidBlock2D"}, "bool", 5),
        ({**KANDINSKY, "encoder_hid_dim_type": "text_proj"}, "integers", 5),
    ],
)
def test_a_mask_of_what_attention_reads_first_does_what_it_does_in_diffusers(options, kind, length):
    model, ours, arguments = both(options)
    masks = {"attention_mask": a_mask(kind, length), "encoder_attention_mask": a_mask("bool", 5, seed=8)}
    for one in ({"attention_mask": masks["attention_mask"]}, masks):
        with torch.no_grad():
            expected = model(**arguments, **one).sample
            masked, plain = ours(**arguments, **one).sample, ours(**arguments).sample
        assert_close(masked, expected, 1e-10)
        assert not torch.equal(masked, plain)


@pytest.mark.parametrize("name", ["attention_mask", "encoder_attention_mask"])
@pytest.mark.parametrize("only", [True, False])
def test_a_masked_token_is_as_one_that_is_not_there(name, only):
    """Also where diffusers fails: at as many tokens as pixels, and where the context alone is read."""
    options = {**DEEPFLOYD, "cross_attention_norm": None, "addition_embed_type": None}
    options |= {"only_cross_attention": only, "mid_block_only_cross_attention": only}
    ours = UNet.from_diffusers(randomized(UNet2DConditionModel(**options), dtype=torch.float64).eval())
    sample, context = noise(2, 4, 8, 8), noise(2, 16, 6, seed=1)
    mask = torch.arange(16).expand(2, -1) < 11
    with torch.no_grad():
        expected = ours(sample, 3, context[:, :11]).sample
        assert_close(ours(sample, 3, context, **{name: mask}).sample, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_go_with_every_dtype_gradient_and_recomputation(dtype):
    _, ours, arguments = both(WHOLE)
    ours = ours.to(dtype)
    given = {name: value.to(dtype) if name != "timestep" else value for name, value in arguments.items()}
    given |= {"attention_mask": a_mask("bool", 64), "encoder_attention_mask": a_mask("bool", 5)}
    gradients = []
    for grade in ("none", "activations", "blocks"):
        ours.set_checkpointing(grade)
        ours.zero_grad()
        ours(**given, cross_attention_kwargs={"scale": 1.0}).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    assert all(torch.isfinite(value).all() for value in gradients[0])
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"encoder_attention_mask": torch.ones(2, 4)}, r"encoder_attention_mask must be \(2, 5\), 1 for what is read"),
        ({"encoder_attention_mask": torch.ones(1, 5)}, r"encoder_attention_mask must be \(2, 5\).*got \(1, 5\)"),
        ({"attention_mask": torch.ones(64)}, r"attention_mask must be \(2, keys\)"),
        ({"attention_mask": torch.ones(2, 63)}, r"a mask of attention must be \(2, 64\).*got \(2, 63\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(masks, message):
    _, ours, arguments = both(WHOLE)
    with pytest.raises(ValueError, match=message):
        ours(**arguments, **masks)


def test_a_mask_that_nothing_reads_is_refused():
    ours = UNet(channels=(32,), in_channels=4).double()
    with pytest.raises(ValueError, match="attention_mask was given, but this network has no transformer"):
        ours(noise(2, 4, 8, 8), 0, attention_mask=torch.ones(2, 64))
    with pytest.raises(ValueError, match="encoder_attention_mask was given, but attention reads no context"):
        ours(noise(2, 4, 8, 8), 0, encoder_attention_mask=torch.ones(2, 5))
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
        ours(noise(2, 4, 8, 8), 0, attention_mask=[[1]])
