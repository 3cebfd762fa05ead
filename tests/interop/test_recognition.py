"""Recognises networks by the names and shapes in their files, reads the authors' configurations, strips wrappers."""

import json
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.interop.fixtures import GOLDEN, NAMES, fixture
from tests.interop.test_files import same_weights
from tests.interop.test_key_tables import INDEX, REFUSED, table
from unetgn.interop import convert, load
from unetgn.interop.files import AVERAGED, PREFIXES, WRAPPERS, network_of
from unetgn.interop.openai_names import openai_sources
from unetgn.interop.original_configs import MULTIPLIERS
from unetgn.interop.recognition import recognise
from unetgn.unet.facts import facts

ORIGINAL = [name for name in NAMES if not name.startswith("unet2d")]
TABLES = [name for name in sorted(set(INDEX) - set(REFUSED)) if not name.startswith("diffusers")]
DIFFUSERS = {  # single files of these hold the same tensors under the names of CompVis and Stability
    "stable-diffusion-v1-5_unet": "compvis",
    "stable-diffusion-2-1_unet": "compvis",
    "stable-diffusion-inpainting_unet": "compvis",
    "timbrooks__instruct-pix2pix_unet": "compvis",
    "stable-diffusion-x4-upscaler_unet": "compvis",
    "stable-diffusion-xl-base-1.0_unet": "sgm",
    "stable-diffusion-xl-refiner-1.0_unet": "sgm",
}
ASKED = ("num_heads", "num_head_channels", "use_new_attention_order")  # which small networks have to be told


def known(unet):
    """Describe a network, but for the size that pipelines ask for, which no tensor has, and dropout."""
    return {name: value for name, value in facts(unet.unet_config).items() if name not in ("sample_size", "dropout")}


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_file_alone_is_recognised_and_computes_the_same(name, tmp_path):
    it = fixture(name)
    save_file(it.state_dict(), tmp_path / "it.safetensors")
    options = it.meta["constructor_kwargs"]
    asked = {key: options[key] for key in ASKED if key in options and it.meta["family"] != "edm"}
    if it.meta["family"] == "guided-diffusion":
        asked = {"num_heads": 1, "use_new_attention_order": False, **asked}
    unet = load(tmp_path / "it.safetensors", **asked)
    assert same_weights(unet, it.converted())
    assert known(unet) == known(it.converted())


@pytest.mark.parametrize("name", TABLES)
def test_a_published_network_is_recognised_by_names_and_shapes(name):
    entry, state = table(name)
    expected = convert(entry["family"], {**entry["constructor_kwargs"], "class": entry["class"]}, state)
    family, options = recognise(state, name, {})
    found = convert(family, options, state)
    assert known(found) == known(expected)
    ours = dict(zip(*(["names"], [sorted(found.state_dict())]), strict=True))
    assert ours["names"] == sorted(expected.state_dict())


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_single_file_of_stable_diffusion_is_recognised(name):
    full = next(key for key in INDEX if name in key)
    entry, state = table(full)
    unet = convert(entry["family"], {**entry["constructor_kwargs"], "class": entry["class"]}, state)
    sources = openai_sources(unet, "legacy")
    original = {sources[key].key: value for key, value in unet.state_dict().items()}
    family, options = recognise(original, name, {})
    assert family == DIFFUSERS[name]
    found, expected = known(convert(family, options, original)), known(unet)
    beside = {"addition_time_embed_dim", "attention.upcast"}  # of diffusers' way to call it
    assert {key: found[key] for key in found if key not in beside} == {
        key: value for key, value in expected.items() if key not in beside
    }


@pytest.mark.parametrize(
    ("name", "given", "asks"),
    [
        ("compvis_sd1", {}, "num_heads or num_head_channels.*candidates: num_heads=8 .*Give it: load.path, num_heads="),
        ("adm_conv_additive_legacy", {}, "num_heads or num_head_channels"),
        ("adm_conv_additive_legacy", {"num_heads": 2}, "use_new_attention_order.*candidates: True .*False"),
    ],
)
def test_what_names_and_shapes_do_not_say_is_asked_for_with_the_candidates(name, given, asks, tmp_path):
    save_file(fixture(name).state_dict(), tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=asks):
        load(tmp_path / "it.safetensors", **given)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["unet.emb_fourier.freqs"], "EDM2"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "a diffusion transformer"),
        (["down_blocks.0.attentions.0.to_q.lora_A.weight"], "an adapter"),
        (["input_blocks.1.1.time_stack.0.norm1.weight"], "a video network"),
        (["conv_in.weight", "time_embedding.linear_1.weight"], r"UNet.from_diffusers\(folder\)"),
        (["layer1.weight"], "no network that is known here .its tensors begin with layer1.weight"),
    ],
)
def test_another_file_is_refused_with_what_it_looks_like(keys, message, tmp_path):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "it.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.model.", "model._orig_mod."])
def test_what_wrapping_a_model_puts_before_its_names_is_taken_off(prefix, tmp_path):
    it = fixture("edm_dhariwal_class_augment")
    save_file({prefix + key: value for key, value in it.state_dict().items()}, tmp_path / "it.safetensors")
    assert same_weights(load(tmp_path / "it.safetensors"), it.converted())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    prefixes=st.lists(st.sampled_from((*WRAPPERS, *PREFIXES, *AVERAGED)), max_size=5),
    ema=st.sampled_from((None, True)),
    beside=st.booleans(),
)
def test_prefixes_are_taken_off_however_they_are_nested(prefixes, ema, beside):
    state = {"input_blocks.0.0.weight": torch.ones(2), "out.2.bias": torch.zeros(2), "label_emb.weight": torch.ones(1)}
    wrapped = {"".join(prefixes) + key: value for key, value in state.items()}
    ema = ema if any(prefix in AVERAGED for prefix in prefixes) else None
    found = network_of({**wrapped, **({"n_averaged": torch.tensor(3)} if beside and prefixes else {})}, "it", ema=ema)
    assert found.keys() == state.keys()
    assert all(found[key] is value for key, value in state.items())


@pytest.mark.parametrize("outer", ["", "module.", "state_dict._orig_mod."])
@pytest.mark.parametrize("averaged", AVERAGED)
@pytest.mark.parametrize("raw", ["", *PREFIXES])
def test_averaged_and_trained_weights_are_chosen_between(outer, averaged, raw):
    it = fixture("edm_dhariwal_class_augment")
    state = it.state_dict()
    both = {f"{outer}{raw}{key}": torch.zeros_like(value) for key, value in state.items()}
    both |= {f"{outer}{averaged}module.{key}": value for key, value in state.items()}
    both |= {f"{outer}first_stage.weight": torch.zeros(2), f"{outer}{averaged}step": torch.tensor(1)}
    with pytest.raises(ValueError, match=r"it has weights under '.*' \(averaged\) and .* \(trained\): .*ema=True\) "):
        network_of(both, "it")
    chosen = network_of(both, "it", ema=True)
    assert all(chosen[key] is value for key, value in state.items())
    trained = network_of(both, "it", ema=False)
    assert all(trained[key] is both[f"{outer}{raw}{key}"] for key in state)


def test_weights_that_are_asked_for_and_not_there_are_an_error():
    state = {"out.2.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="it has no averaged copy of its weights; leave ema out"):
        network_of({f"model.{key}": value for key, value in state.items()}, "it", ema=True)
    with pytest.raises(ValueError, match=r"it has averaged weights alone, under 'ema_model.'; leave ema out"):
        network_of({f"ema_model.{key}": value for key, value in state.items()}, "it", ema=False)


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": state},
    lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
    lambda state: {"unet_state_dict": {f"module.{key}": value for key, value in state.items()}, "scale": torch.ones(1)},
    lambda state: {"checkpoint": {"model": state}},
])  # fmt: skip
def test_a_state_dict_is_found_in_what_a_training_program_saved(wrap):
    it = fixture("edm_dhariwal_class_augment")
    assert same_weights(convert("edm", it.config, wrap(it.state_dict())), it.converted())


def test_several_state_dicts_are_an_error_that_names_them():
    it = fixture("edm_dhariwal_class_augment")
    with pytest.raises(ValueError, match=r"several state dicts .'model', 'ema'"):
        convert("edm", it.config, {"model": it.state_dict(), "ema": it.state_dict()})


TARGETS = {
    "compvis_sd1": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "sgm_sdxl_base": "sgm.modules.diffusionmodules.openaimodel.UNetModel",
    "adm_conv_additive_legacy": "guided_diffusion.unet.UNetModel",
    "edm_dhariwal_class_augment": "training.networks.DhariwalUNet",
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_authors_configuration_is_read(name, tmp_path):
    it = fixture(name)
    network = {"target": TARGETS[name], "params": it.meta["constructor_kwargs"]}
    stages = {"first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4}}}
    tree = {"model": {"target": "a.LatentDiffusion", "params": {"unet_config": network, **stages}}}
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(tree))
    save_file(it.state_dict(), tmp_path / "it.safetensors")
    for config in (tmp_path / "v1.yaml", str(tmp_path / "v1.yaml"), tree):
        unet = load(tmp_path / "it.safetensors", config=config)
        assert same_weights(unet, it.converted())
        assert unet.unet_config == it.converted().unet_config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {target: somewhere.Else, params: {}}", "describes no U-Net that is known here: no UNetModel"),
        ("model: {p: [{target: sgm.video_model.VideoUNet}]}", r"that is known here .VideoUNet is none.: no UNetModel"),
        ("- 1", "holds no keys"),
        ("a: [", "cannot be read as YAML"),
        (
            "a: {target: ldm.x.UNetModel, params: {}}\nb: {target: sgm.x.UNetModel, params: {}}",
            "several U-Nets .compvis UNetModel, sgm UNetModel",
        ),
    ],
)
def test_a_configuration_without_one_network_is_refused(text, message, tmp_path):
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "it.safetensors", config=tmp_path / "it.yaml")


FLAGS = {  # of the authors' README, as a command line has them
    "guided_diffusion__64x64.json": {
        "attention_resolutions": "32,16,8", "class_cond": "True", "diffusion_steps": "1000", "dropout": 0.1,
        "image_size": "64", "learn_sigma": "True", "noise_schedule": "cosine", "num_channels": "192",
        "num_head_channels": "64", "num_res_blocks": "3", "resblock_updown": "True", "use_new_attention_order": "True",
        "use_fp16": "True", "use_scale_shift_norm": "True",
    },
    "guided_diffusion__128x128.json": {
        "attention_resolutions": "32,16,8", "class_cond": True, "image_size": 128, "learn_sigma": True,
        "num_channels": 256, "num_heads": 4, "num_res_blocks": 2, "resblock_updown": True, "use_scale_shift_norm": True,
    },
    "guided_diffusion__256x256.json": {
        "attention_resolutions": "32,16,8", "class_cond": True, "image_size": 256, "learn_sigma": True,
        "num_channels": 256, "num_head_channels": 64, "num_res_blocks": 2, "resblock_updown": True,
        "use_scale_shift_norm": True, "channel_mult": "",
    },
    "guided_diffusion__512x512.json": {
        "attention_resolutions": "32,16,8", "class_cond": True, "image_size": 512, "learn_sigma": True,
        "num_channels": 256, "num_head_channels": 64, "num_res_blocks": 2, "resblock_updown": True,
        "use_scale_shift_norm": True, "channel_mult": "0.5,1,1,2,2,4,4",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_guided_diffusion_are_its_constructors_options(name):
    entry, state = table(name)
    expected = convert(entry["family"], {**entry["constructor_kwargs"], "class": entry["class"]}, state)
    found = convert("guided-diffusion", {**FLAGS[name], "class": "UNetModel"}, state)
    assert known(found) == known(expected)


@pytest.mark.parametrize("large", [False, True])
def test_flags_say_the_class_too(large, tmp_path):
    it = fixture("adm_conv_additive_legacy")
    flags = {"image_size": 16, "num_channels": 64, "attention_resolutions": "8", "channel_mult": "1,2", "num_heads": 4}
    flags |= {"num_res_blocks": 1, "use_scale_shift_norm": False} | (
        {"large_size": 16, "small_size": 8} if large else {}
    )
    state, first, path = it.state_dict(), "input_blocks.0.0.weight", tmp_path / "it.safetensors"
    state |= {first: torch.cat([state[first]] * 2, dim=1)} if large else {}
    save_file(state, path)
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(flags))
    unets = [
        load(path, config=flags),
        load(path, config=tmp_path / "flags.yaml"),
        load("guided-diffusion", path, **flags),
    ]
    assert {unet.unet_config.in_channels for unet in unets} == {6 if large else 3}
    assert large or all(same_weights(unet, it.converted()) for unet in unets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_resolutions": "32;16"}, "attention_resolutions='32;16' must be numbers with commas"),
        ({"image_size": 48}, "image_size=48 has none of its own"),
        ({"image_size": None}, "need image_size"),
        ({"num_chanels": 3}, "num_chanels"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(change, message):
    flags = {**FLAGS["guided_diffusion__64x64.json"], **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        convert("guided-diffusion", {**flags, "class": "UNetModel"}, {})


def test_every_size_with_multipliers_of_its_own_halves_as_often_as_it_has_levels():
    assert all(size >= 2 ** (len(mult) - 1) for size, mult in MULTIPLIERS.items())


def test_a_family_alone_is_no_file():
    with pytest.raises(TypeError, match=r"load.'edm'. needs the path of a file"):
        load("edm")


def test_the_tables_are_there():
    assert json.loads((GOLDEN / "keys" / "index.json").read_text()) == INDEX


def test_of_the_two_ways_to_say_how_many_heads_there_are_the_given_one_counts():
    """Where a published network of these widths has the other."""
    _, state = table("guided_diffusion__64x64.json")
    _, options = recognise(state, "adm", {"num_heads": 4})
    assert options["num_heads"] == 4
    assert "num_head_channels" not in options


def test_monais_norms_are_asked_for():
    with pytest.raises(ValueError, match="do not say norm_num_groups"):
        recognise(monai_state(), "monai", {"num_head_channels": 8})


def monai_state():
    nets = pytest.importorskip("monai.networks.nets")
    with torch.device("meta"):
        return nets.DiffusionModelUNet(2, 1, 1, (1, 1), (32, 32), (False, True), num_head_channels=8).state_dict()
