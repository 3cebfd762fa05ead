"""Checks that our U-Net answers as diffusers' own: its configuration, adapters, residuals, single files."""

import copy
import json

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig
from safetensors.torch import save_file

from tests.interop.fixtures import fixture
from tests.interop.test_diffusers import DDPM, KANDINSKY
from tests.interop.test_pipelines import STABLE, XL, images, stable_diffusion, texts
from tests.interop.test_pipelines import vae as vae
from tests.tensors import noise, randomized
from unetgn import UNet
from unetgn.unet.adapters import THROUGH_DIFFUSERS

CLASSES = {**STABLE, "num_class_embeds": 5}
TWO = {
    **STABLE,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}


def pair(options=STABLE, kind=UNet2DConditionModel):
    theirs = randomized(kind(**options), dtype=torch.float64).eval()
    return theirs, UNet.from_diffusers(theirs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * float(theirs.abs().max()))


def run(unet, **more):
    """Run at timestep 0, where sinusoids are exact in float32."""
    with torch.no_grad():
        return unet(noise(2, 4, 8, 8), 0, noise(2, 5, 24, seed=1), **more).sample


@pytest.mark.parametrize(
    ("options", "kind"),
    [*((options, UNet2DConditionModel) for options in (STABLE, XL, CLASSES, KANDINSKY, TWO)), (DDPM, UNet2DModel)],
)
def test_the_configuration_answers_for_every_option_of_diffusers(options, kind):
    theirs, ours = pair(options, kind)
    again = kind(**{name: getattr(ours.config, name) for name in theirs.config if not name.startswith("_")})
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name in ("cross_attention_dim", "num_class_embeds", "addition_embed_type", "block_out_channels", "in_channels"):
        if name in theirs.config:
            expected = getattr(theirs.config, name)
            assert getattr(ours.config, name) == ours.config[name] == ours.config.get(name) == expected
            assert name in ours.config


def test_the_configuration_lists_and_saves_its_own_fields_alone(tmp_path):
    _, ours = pair()
    assert ours.config.cross_attention_dim == 24
    assert "cross_attention_dim" not in dict(ours.config)
    assert copy.deepcopy(ours.config) == ours.config
    ours.save_pretrained(tmp_path)
    assert "cross_attention_dim" not in json.loads((tmp_path / "config.json").read_text())
    assert not hasattr(ours.config, "no_such_option")
    assert ours.config.get("no_such_option", 3) == 3
    with pytest.raises(KeyError):
        ours.config["no_such_option"]


def test_a_network_that_diffusers_cannot_express_says_so():
    with pytest.raises(AttributeError, match="no 'cross_attention_dim': diffusers' UNet2DModel cannot express spatial"):
        UNet(channels=(32,), spatial_dims=3).config.cross_attention_dim  # noqa: B018


@pytest.mark.parametrize("options", [STABLE, XL, CLASSES])
def test_a_controlnet_grows_from_our_unet(options):
    theirs, ours = pair(options)
    torch.manual_seed(0)
    expected = ControlNetModel.from_unet(theirs)
    torch.manual_seed(0)
    found = ControlNetModel.from_unet(ours)
    assert found.config == expected.config | {
        key: found.config[key] for key in found.config if found.config[key] != expected.config[key] and key in BESIDE
    }
    state = found.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in expected.state_dict().items())


# written another way: a number for each level where one number is for all
BESIDE = {"attention_head_dim", "only_cross_attention", "transformer_layers_per_block", "freq_shift"}
BESIDE |= {"mid_block_scale_factor", "projection_class_embeddings_input_dim", "act_fn", "block_out_channels"}


def adapted(options=TWO):
    theirs, ours = pair(options)
    for network in (theirs, ours):
        for name in ("first", "second"):
            torch.manual_seed(3 if name == "first" else 4)
            config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            network.add_adapter(config, name)
        network.double()
        generator = torch.Generator().manual_seed(5)
        for _, parameter in sorted((n, p) for n, p in network.named_parameters() if "lora" in n):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    return theirs, ours


@pytest.mark.parametrize("scale", [0.5, 1.0, 0.0])
def test_adapters_are_scaled_for_one_pass_as_in_diffusers(scale):
    theirs, ours = adapted()
    before = run(ours)
    close(run(ours, cross_attention_kwargs={"scale": scale}), run(theirs, cross_attention_kwargs={"scale": scale}))
    assert torch.equal(run(ours), before)


def test_a_scale_without_adapters_changes_nothing_as_in_diffusers():
    theirs, ours = pair()
    close(run(ours, cross_attention_kwargs={"scale": 0.3}), run(theirs, cross_attention_kwargs={"scale": 0.3}))


@pytest.mark.parametrize(
    "weights",
    [
        0.3,
        [0.3, 0.7],
        {"down": 0.2},
        {"mid": 0.1, "up": {"block_1": [0.1, 0.2, 0.3], "block_0": 0.4}},
        [{"down": {"block_0": [0.5, 0.25]}, "mid": [0.1]}, 0.7],
        {"up": [0.1, 0.2, 0.3], "down": {"block_1": [0.5]}},
    ],
)
def test_weights_for_each_block_are_those_of_diffusers(weights):
    theirs, ours = adapted()
    for network in (theirs, ours):
        network.set_adapters(["first", "second"], weights)
    close(run(ours), run(theirs))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"middle": 1}, "name .'middle'., which have no attention or are not there; these have: .'down'"),
        ({"up": {"block_7": 1}}, "'block_7'"),
        ({"up": {"block_0": [1, 2]}}, "up block_0 has 3 attention layers, and 2 scales"),
    ],
)
def test_weights_for_a_block_that_is_not_there_are_refused(weights, message):
    _, ours = adapted()
    with pytest.raises(ValueError, match=message):
        ours.set_adapters("first", weights)


@pytest.mark.parametrize("options", [STABLE, TWO, {**STABLE, "down_block_types": ("DownBlock2D",) * 2}])
@pytest.mark.parametrize("count", [1, 2, 3])  # the third, of T2I-Adapter-XL, is the middle's
def test_residuals_of_a_t2i_adapter_enter_where_diffusers_adds_them(options, count):
    theirs, ours = pair(options)
    first = 8 if options["down_block_types"][0] == "CrossAttnDownBlock2D" else 4  # before or after it halves
    residuals = [noise(2, 32, first, first, seed=2), noise(2, 64, 4, 4, seed=3), noise(2, 64, 4, 4, seed=4)][:count]
    expected = run(theirs, down_intrablock_additional_residuals=[value.clone() for value in residuals])
    close(run(ours, down_intrablock_additional_residuals=residuals), expected)


def test_a_residual_that_does_not_fit_is_named():
    _, ours = pair()
    with pytest.raises(ValueError, match=r"down_intrablock_additional_residuals must be \(2, 32, 8, 8\), got"):
        run(ours, down_intrablock_additional_residuals=[noise(2, 32, 4, 4)])
    with pytest.raises(ValueError, match="one for each of 2 levels and the middle, got 4"):
        run(ours, down_intrablock_additional_residuals=[noise(2, 32, 8, 8)] * 4)
    residuals = [noise(2, 32, 8, 8), noise(2, 64, 4, 4), noise(2, 64, 2, 2)]
    with pytest.raises(ValueError, match=r"the last of down_intrablock_additional_residuals must be \(2, 64, 4, 4\)"):
        run(ours, down_intrablock_additional_residuals=residuals)
    _, ours = pair({**STABLE, "mid_block_type": None})
    with pytest.raises(ValueError, match="one for each of 2 levels, and this has no middle, got 3"):
        run(ours, down_intrablock_additional_residuals=residuals)
    with pytest.raises(ValueError, match="T2I-Adapter are down_intrablock_additional_residuals"):
        run(ours, down_block_additional_residuals=residuals)


def test_a_t2i_adapter_guides_our_unet_in_diffusers_pipeline(vae):
    theirs = randomized(UNet2DConditionModel(**STABLE)).eval()
    adapter = randomized(T2IAdapter(channels=(32, 64), num_res_blocks=1, downscale_factor=2), seed=1).eval()
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def pictures(unet):
        parts = stable_diffusion(unet, vae).components
        parts.pop("image_encoder", None)
        pipeline = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
        return images(pipeline, **texts(), image=picture, guidance_scale=5.0, height=16, width=16)

    torch.testing.assert_close(pictures(UNet.from_diffusers(theirs)), pictures(theirs), rtol=1e-4, atol=1e-4)


def test_a_pipeline_hands_our_unet_on_to_another(vae):
    pipeline = stable_diffusion(UNet.from_diffusers(randomized(UNet2DConditionModel(**STABLE)).eval()), vae)
    # it hands on networks of its own class alone, and its warning says to give another's so
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline, unet=pipeline.unet, requires_safety_checker=False)
    assert other.unet is pipeline.unet
    assert AutoPipelineForImage2Image.from_pipe(pipeline).unet is pipeline.unet


def test_auto_model_finds_our_class_in_our_folders(vae, tmp_path):
    _, ours = pair()
    ours.float().save_pretrained(tmp_path / "model")
    stable_diffusion(ours, vae).save_pretrained(tmp_path / "pipeline")
    found = AutoModel.from_pretrained(str(tmp_path / "model"))
    assert type(found) is type(AutoModel.from_pretrained(str(tmp_path / "pipeline"), subfolder="unet")) is UNet
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ValueError, match=r"of this package already: unetgn.UNet.from_pretrained\(folder\)"):
        UNet.from_diffusers(tmp_path / "model")


@pytest.mark.parametrize("name", THROUGH_DIFFUSERS)
def test_what_our_unet_does_not_do_is_refused_with_the_way_that_does(name):
    _, ours = pair()
    assert not hasattr(ours, name)  # pipelines ask so, and go another way
    with pytest.raises(AttributeError, match=rf"UNet has no {name}: .*to_diffusers\(unet\) has it"):
        getattr(ours, name)()


def test_other_arguments_for_attention_are_refused_by_name():
    _, ours = pair()
    with pytest.raises(ValueError, match=r"cross_attention_kwargs=.'gates'. are for attention processors"):
        run(ours, cross_attention_kwargs={"gates": None, "scale": 1.0})


def test_a_single_file_becomes_our_unet(tmp_path):
    it = fixture("edm_dhariwal_class_augment")
    save_file(it.state_dict(), tmp_path / "it.safetensors")
    unet = UNet.from_single_file(tmp_path / "it.safetensors", torch_dtype=torch.float16)
    assert unet.dtype == torch.float16
    expected = it.converted().state_dict()
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in unet.state_dict().items())
