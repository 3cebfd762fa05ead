"""Checks IP-Adapters in our U-Net against diffusers' own, with the same weights."""

import copy
import re

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)

from tests.interop.test_pipelines import STABLE, XL, _Projection, images, stable_diffusion, texts
from tests.interop.test_pipelines import vae as vae
from tests.tensors import noise, randomized
from unetgn import UNet
from unetgn.interop import to_diffusers

WIDTH = 12  # of an image's embedding
DEEP = {**STABLE, "layers_per_block": 2, "transformer_layers_per_block": 2}
KOLORS = {**STABLE, "encoder_hid_dim": 10, "encoder_hid_dim_type": "text_proj"}
LAYERS = re.compile(r"\.attn2\.processor$")


def drawn(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def plain(context=24):
    return {
        "proj.weight": (4 * context, WIDTH),
        "proj.bias": (4 * context,),
        "norm.weight": (context,),
        "norm.bias": (context,),
    }


def full(context=24):
    return {
        "proj.0.weight": (WIDTH, WIDTH),
        "proj.0.bias": (WIDTH,),
        "proj.2.weight": (context, WIDTH),
        "proj.2.bias": (context,),
        "proj.3.weight": (context,),
        "proj.3.bias": (context,),
    }


def face(context=24):
    return {
        "proj.0.weight": (2 * WIDTH, WIDTH),
        "proj.0.bias": (2 * WIDTH,),
        "proj.2.weight": (4 * context, 2 * WIDTH),
        "proj.2.bias": (4 * context,),
        "norm.weight": (context,),
        "norm.bias": (context,),
    }


def plus(context=24, hidden=8):
    shapes = {
        "latents": (1, 3, hidden),
        "proj_in.weight": (hidden, WIDTH),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (context, hidden),
        "proj_out.bias": (context,),
        "norm_out.weight": (context,),
        "norm_out.bias": (context,),
    }
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.weight": (hidden,), f"layers.{i}.{norm}.bias": (hidden,)}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (64, hidden),
            f"layers.{i}.0.to_kv.weight": (128, hidden),
            f"layers.{i}.0.to_out.weight": (hidden, 64),
            f"layers.{i}.1.1.weight": (4 * hidden, hidden),
            f"layers.{i}.1.3.weight": (hidden, 4 * hidden),
        }
    return shapes


KINDS = {
    "plain": (plain, (WIDTH,), ImageProjection),
    "full face": (full, (5, WIDTH), IPAdapterFullImageProjection),
    "face": (face, (WIDTH,), IPAdapterFaceIDImageProjection),
    "plus": (plus, (5, WIDTH), IPAdapterPlusImageProjection),
}


def adapter(theirs, kind="plain", seed=7, context=24):
    """Draw an adapter for a network of diffusers, in the names of its authors' files."""
    layers, number = {}, 1
    for name in theirs.attn_processors:
        if LAYERS.search(name):
            width = theirs.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layers |= {f"{number}.to_k_ip.weight": (width, context), f"{number}.to_v_ip.weight": (width, context)}
            number += 2
    return {"image_proj": drawn(seed, **KINDS[kind][0](context)), "ip_adapter": drawn(seed + 1, **layers)}


def embeddings(kind="plain", count=1, seed=5):
    return noise(2, count, *KINDS[kind][1], seed=seed)


def pair(options=DEEP):
    theirs = randomized(UNet2DConditionModel(**options), dtype=torch.float64).eval()
    return theirs, UNet.from_diffusers(theirs)


def run(unet, given=None, options=DEEP, **more):
    added = {} if given is None else {"image_embeds": given}
    if "addition_embed_type" in options:
        added |= {"text_embeds": noise(2, 16, seed=8), "time_ids": torch.zeros(2, 6, dtype=torch.float64)}
    text = noise(2, 5, options.get("encoder_hid_dim", 24), seed=1)
    with torch.no_grad():
        return unet(noise(2, 4, 8, 8), 0, text, added_cond_kwargs=added, **more).sample


def load(states, *networks):
    for network in networks:
        network._load_ip_adapter_weights(copy.deepcopy(states), low_cpu_mem_usage=False)


def scale(unet, value):
    pipeline(unet).set_ip_adapter_scale(value)


def pipeline(unet):
    return stable_diffusion(unet, None)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_an_image_guides_our_unet_as_diffusers_own(kind, count):
    theirs, ours = pair()
    without = run(ours)
    load([adapter(theirs, kind)], theirs, ours)
    assert type(ours.encoder_hid_proj.image_projection_layers[0]) is KINDS[kind][2]
    given = [embeddings(kind, count)]
    close(run(ours, given), run(theirs, given))
    assert not torch.allclose(run(ours, given), without)
    for network in (theirs, ours):
        scale(network, 0.3)
    close(run(ours, given), run(theirs, given))
    scale(ours, 0.0)
    assert torch.equal(run(ours, given), without)


@pytest.mark.parametrize("options", [STABLE, {**XL, "layers_per_block": 2}, KOLORS])
def test_two_adapters_guide_each_kind_of_network(options):
    theirs, ours = pair(options)
    states = [adapter(theirs), adapter(theirs, "plus", seed=9)]
    load(states, theirs, ours)
    given = [embeddings(), embeddings("plus", seed=6)]
    close(run(ours, given, options), run(theirs, given, options))
    for network in (theirs, ours):
        scale(network, [0.2, 0.9])
    close(run(ours, given, options), run(theirs, given, options))


@pytest.mark.parametrize(
    "scales",
    [
        {"down": {"block_0": [0.0, 0.7]}},
        {"up": {"block_1": [0.0, 1.0, 0.5]}, "mid": 0.4},
        [{"down": 0.6}, {"up": {"block_1": [0.1, 0.2, 0.3]}}],
    ],
)
def test_scales_for_each_block_are_those_of_diffusers(scales):
    theirs, ours = pair()
    states = [adapter(theirs, seed=seed) for seed in (7, 9)][: len(scales) if isinstance(scales, list) else 1]
    load(states, theirs, ours)
    for network in (theirs, ours):
        scale(network, scales)
    given = [embeddings(seed=seed) for seed in range(len(states))]
    close(run(ours, given), run(theirs, given))


def test_processors_are_named_and_ordered_as_in_diffusers():
    theirs, ours = pair()
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    load([adapter(theirs)], theirs, ours)
    assert {name: type(one).__name__.startswith("I") for name, one in ours.attn_processors.items()} == {
        name: type(one).__name__.startswith("I") for name, one in theirs.attn_processors.items()
    }


@pytest.mark.parametrize("options", [DEEP, KOLORS])
def test_unloading_gives_back_the_network(options, tmp_path):
    theirs, ours = pair(options)
    state, without = dict(ours.state_dict()), run(ours, options=options)
    load([adapter(theirs)], ours)
    with pytest.raises(ValueError, match=r"pipeline.unload_ip_adapter\(\) first"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"UNet has IP-Adapters: pipeline.unload_ip_adapter\(\) first"):
        to_diffusers(ours)
    pipeline(ours).unload_ip_adapter()
    assert ours.state_dict().keys() == state.keys()
    assert torch.equal(run(ours, options=options), without)
    ours.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path, torch_dtype=torch.float64).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in state.items())
    to_diffusers(ours)


def test_a_model_of_diffusers_with_an_adapter_is_refused_with_what_to_do_first():
    theirs, _ = pair(STABLE)
    load([adapter(theirs)], theirs)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has IP-Adapters: pipeline.unload_ip_adapter"):
        UNet.from_diffusers(theirs)
    pipeline(theirs).unload_ip_adapter()
    UNet.from_diffusers(theirs)


def test_an_adapter_is_loaded_anew_in_the_place_of_the_last():
    theirs, ours = pair()
    load([adapter(theirs), adapter(theirs, "plus")], ours)
    load([adapter(theirs, seed=11)], theirs, ours)
    given = [embeddings()]
    close(run(ours, given), run(theirs, given))


def test_adapters_work_where_blocks_are_computed_again():
    theirs, ours = pair()
    load([adapter(theirs), adapter(theirs, "plus", seed=9)], ours)
    given = [embeddings(), embeddings("plus")]
    gradients = []
    for grade in ("none", "activations", "blocks"):
        ours.set_checkpointing(grade)
        ours.zero_grad()
        image = given[0].clone().requires_grad_()
        added = {"image_embeds": [image, given[1]]}
        out = ours(noise(2, 4, 8, 8), 0, noise(2, 5, 24, seed=1), added_cond_kwargs=added).sample
        out.square().sum().backward()
        gradients.append([image.grad, ours.conv_in.weight.grad.clone()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def stable_diffusion_xl(unet, vae):
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **dict.fromkeys(names)
    )
    pipe.text_encoder_2 = _Projection()
    return pipe


@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("options", [STABLE, XL], ids=["SD", "SDXL"])
def test_pipelines_of_diffusers_take_an_image_beside_the_text(vae, kind, options):
    theirs = randomized(UNet2DConditionModel(**options)).eval()
    state = {
        part: {key: tensor.float() for key, tensor in tensors.items()}
        for part, tensors in adapter(theirs, kind).items()
    }
    large = options is XL
    text = texts(pooled_prompt_embeds=(16,), negative_pooled_prompt_embeds=(16,)) if large else texts()
    given = {"ip_adapter_image_embeds": [embeddings(kind).float()], "guidance_scale": 5.0, **text}

    def run(unet):
        pipe = stable_diffusion_xl(unet, vae) if large else stable_diffusion(unet, vae)
        before = images(pipe, **text, guidance_scale=5.0)
        pipe.load_ip_adapter(copy.deepcopy(state), subfolder=None, weight_name=None, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.8)
        made = images(pipe, **given)
        pipe.unload_ip_adapter()
        assert torch.equal(images(pipe, **text, guidance_scale=5.0), before)
        assert not torch.allclose(made, before)
        return made

    expected = run(theirs)
    made = run(UNet.from_diffusers(theirs))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_lora_of_a_face_adapter_comes_with_it(vae):
    theirs = randomized(UNet2DConditionModel(**STABLE), dtype=torch.float64).eval()
    ours = UNet.from_diffusers(theirs)
    state = adapter(theirs, "face")
    shapes = {}
    for number, name in enumerate(theirs.attn_processors):
        attention = theirs.get_submodule(name.removesuffix(".processor"))
        layers = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "out": attention.to_out[0]}
        for part, layer in layers.items():
            shapes[f"{number}.to_{part}_lora.down.weight"] = (2, layer.in_features)
            shapes[f"{number}.to_{part}_lora.up.weight"] = (layer.out_features, 2)
    state["ip_adapter"] |= drawn(13, **shapes)
    given = [embeddings("face")]
    plainly = []
    for network in (theirs, ours):
        load([state], network)
        plainly.append(run(network, given))
        options = {"subfolder": None, "weight_name": None, "image_encoder_folder": None, "low_cpu_mem_usage": False}
        stable_diffusion(network, vae).load_ip_adapter(copy.deepcopy(state), **options)
    close(plainly[1], plainly[0])
    torch.testing.assert_close(run(ours, given), run(theirs, given))
    assert not torch.allclose(run(ours, given), plainly[1])


def without_key(state):
    del state["ip_adapter"]["3.to_v_ip.weight"]


def other_shape(state):
    state["ip_adapter"]["1.to_k_ip.weight"] = torch.zeros(3, 24)


def too_many(state):
    state["ip_adapter"]["99.to_k_ip.weight"] = torch.zeros(32, 24)


def no_tensor(state):
    state["ip_adapter"]["1.to_k_ip.weight"] = "words"


def without_projection(state):
    del state["image_proj"]["proj.bias"]


def no_projection(state):
    state["image_proj"] = {}


def other_width(state):
    state["image_proj"] = drawn(0, **plain(16))


def without_part(state):
    del state["image_proj"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_key, r"3\.to_v_ip\.weight is missing, and down_blocks.* needs \(32, 24\): the adapter is damaged, or"),
        (other_shape, r"1\.to_k_ip\.weight is \(3, 24\), and down_blocks.0.attentions.0"),
        (too_many, r"has '99.to_k_ip.weight' and 0 more that this network, with 12 layers"),
        (no_tensor, r"1\.to_k_ip\.weight is str, and"),
        (without_projection, "image_proj is damaged, or of no kind that diffusers knows: .*image_embeds.bias"),
        (no_projection, "image_proj is damaged, or of no kind"),
        (other_width, "makes tokens of width 16, and this network reads 24"),
        (without_part, r"two state dicts; got \['ip_adapter'\]"),
    ],
)
def test_a_damaged_adapter_is_refused_and_changes_nothing(damage, message):
    theirs, ours = pair()
    state, before = adapter(theirs), run(ours)
    damage(state)
    with pytest.raises(ValueError, match=message):
        load([adapter(theirs), state], ours)
    assert torch.equal(run(ours), before)
    assert not ours.has_ip_adapters


def test_images_that_do_not_fit_are_named():
    theirs, ours = pair()
    load([adapter(theirs), adapter(theirs)], ours)
    for given in (None, [], [embeddings()], embeddings(), [embeddings()[:1]] * 2, [embeddings(), None]):
        with pytest.raises(ValueError, match=r"2 IP-Adapters read added_cond_kwargs\['image_embeds'\].*list of one"):
            run(ours, given)
    pipeline(ours).unload_ip_adapter()
    with pytest.raises((ValueError, TypeError), match="image_embeds"):
        run(ours, [embeddings()])


def test_masks_and_other_processors_are_refused_by_name():
    _, ours = pair()
    with pytest.raises(ValueError, match=r"ip_adapter_masks.*reads an IP-Adapter's image everywhere.*to_diffusers"):
        run(ours, cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]})
    with pytest.raises(ValueError, match=r"no place for XFormersAttnProcessor: .*to_diffusers\(unet\) has it"):
        ours.set_attn_processor(XFormersAttnProcessor())
    with pytest.raises(ValueError, match=r"names of attn_processors: .'there.processor'. are none, and 24"):
        ours.set_attn_processor({"there.processor": AttnProcessor2_0()})
    before = run(ours)
    ours.set_attn_processor(AttnProcessor2_0())  # which is what is computed
    assert torch.equal(run(ours), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (32, 64)}, "all of whose attention is transformers that read a context"),
        (
            {"channels": (32, 64), "transformer": {"context_dim": 24}, "attention": {"qk_norm": True}},
            "attention.qk_norm",
        ),
        ({"channels": (32, 64), "transformer": {"context_dim": 24, "grounding": "text"}}, "transformer.grounding"),
    ],
)
def test_a_network_without_a_place_for_images_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        load([{}], UNet(**options))
