"""Checks that keys which frameworks and users keep in a saved configuration come along, through every way of loading.

Each member is a way of loading. One warning names all keys with the nearest field, and they are there when the network
is saved again. In a constructor they are errors.
"""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel

from unetgn import UNet
from unetgn.interop import convert, load, to_diffusers
from unetgn.training.network import load_network

BLOCKS = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
PLAIN = {**BLOCKS, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
CROSS = {**BLOCKS, "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
CROSS |= {"cross_attention_dim": 8, "attention_head_dim": 4}
MODELS = {
    "ours": UNet(channels=(8,), depth=1, attention_levels=(), norm={"num_groups": 4}, mid={"attention": False}),
    "unet2d": UNet2DModel(**PLAIN),
    "condition": UNet2DConditionModel(**CROSS),
}
CONVERTED = {name: UNet.from_diffusers(MODELS[name]) for name in ("unet2d", "condition")}
FAMILIES = {"unet2d": "diffusers-unet2d", "condition": "diffusers-unet2d-condition"}

EMA = EMAModel([], decay=0.99).state_dict()
KEYS = {
    **{key: value for key, value in EMA.items() if key != "shadow_params"},
    **{"trained_on": "cats", "notes": {"by": "me", "scores": [1, 2.5]}},
    **{"out_channel": 3, "dropot": 0.5},
    **{"auto_map": {"AutoModel": "unet.UNet"}, "torch_dtype": "float16", "quantisation": None},
}
NEAREST = {"out_channel": "out_channels", "dropot": "dropout"}


def saved(model, keys, folder: Path) -> Path:
    """Save a model with further keys in its configuration."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def noted(model, keys):
    model.register_to_config(**keys)
    return model


def in_pipeline(model, keys, folder: Path) -> Path:
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder)
    saved(model, keys, folder / "unet")
    return folder


def averaged(model, keys, folder: Path) -> Path:
    EMAModel(model.parameters(), model_cls=type(model), model_config=noted(model, keys).config).save_pretrained(folder)
    return folder


def options(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


WEIGHTS = "diffusion_pytorch_model.safetensors"
OURS = {
    "from_pretrained": lambda model, keys, to: UNet.from_pretrained(saved(model, keys, to)),
    "whole memory": lambda model, keys, to: UNet.from_pretrained(saved(model, keys, to), low_cpu_mem_usage=False),
    "subfolder": lambda model, keys, to: UNet.from_pretrained(in_pipeline(model, keys, to), subfolder="unet"),
    "pipeline": lambda model, keys, to: DDPMPipeline.from_pretrained(in_pipeline(model, keys, to)).unet,
    "from_config": lambda model, keys, to: UNet.from_config(options(saved(model, keys, to))),
    "its config": lambda model, keys, to: UNet.from_config(noted(model, keys).config),
    "training": lambda model, keys, to: load_network(saved(model, keys, to)),
}
THEIRS = {
    "model": lambda name, model, keys, to: UNet.from_diffusers(noted(model, keys)),
    "loaded": lambda name, model, keys, to: UNet.from_diffusers(type(model).from_pretrained(saved(model, keys, to))),
    "folder": lambda name, model, keys, to: UNet.from_diffusers(saved(model, keys, to)),
    "pipeline": lambda name, model, keys, to: UNet.from_diffusers(in_pipeline(model, keys, to)),
    "training": lambda name, model, keys, to: load_network(saved(model, keys, to)),
    "convert": lambda name, model, keys, to: convert(
        FAMILIES[name], options(saved(model, keys, to)), model.state_dict()
    ),
    "load": lambda name, model, keys, to: load(FAMILIES[name], saved(model, keys, to) / WEIGHTS, **options(to)),
}


def through(door, keys):
    """Go through a door; return the network and the one warning about keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unet = door()
    told = [str(warning.message) for warning in caught if any(repr(key) in str(warning.message) for key in keys)]
    assert len(told) == 1, told
    return unet, told[0]


def assert_named(told, keys):
    for key in keys:
        assert repr(key) in told
        if key in NEAREST:
            assert f"{key!r} (did you mean {NEAREST[key]!r}?)" in told


def assert_come_back(unet, keys, folder):
    unet.save_pretrained(folder)
    again = options(folder)
    assert {key: again[key] for key in keys} == keys


@pytest.mark.parametrize("keys", [KEYS, {"dtype": "float32"}], ids=["all", "an argument of from_config"])
@pytest.mark.parametrize("door", OURS.values(), ids=OURS)
def test_keys_of_others_in_our_configuration_are_kept_and_named_once(door, keys, tmp_path):
    model = copy.deepcopy(MODELS["ours"])
    before = model.unet_config
    unet, told = through(lambda: door(model, keys, tmp_path / "saved"), keys)
    assert type(unet) is UNet
    assert unet.unet_config == before
    assert_named(told, keys)
    assert_come_back(unet, keys, tmp_path / "again")


@pytest.mark.parametrize("door", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("name", FAMILIES)
def test_keys_of_others_in_a_configuration_of_diffusers_are_kept_and_named_once(name, door, tmp_path):
    model = copy.deepcopy(MODELS[name])
    plain = CONVERTED[name]
    unet, told = through(lambda: door(name, model, KEYS, tmp_path / "saved"), KEYS)
    assert unet.unet_config == plain.unet_config
    assert all(torch.equal(tensor, unet.state_dict()[key]) for key, tensor in plain.state_dict().items())
    assert_named(told, KEYS)
    assert_come_back(unet, KEYS, tmp_path / "again")
    if door is THEIRS["model"]:
        assert {key: to_diffusers(unet).config[key] for key in KEYS} == KEYS


@pytest.mark.parametrize("name", MODELS)
def test_the_average_that_diffusers_saves_loads_and_goes_on(name, tmp_path):
    model = copy.deepcopy(MODELS[name])
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    ema.optimization_step = 7
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, type(model))
    assert (again.decay, again.optimization_step) == (0.5, 7)
    loaded = UNet.from_pretrained(tmp_path) if name == "ours" else UNet.from_diffusers(tmp_path)
    assert (loaded.config["decay"], loaded.config["optimization_step"]) == (0.5, 7)
    loaded.save_pretrained(tmp_path / "ours")
    assert EMAModel.from_pretrained(tmp_path / "ours", UNet).optimization_step == 7


@pytest.mark.parametrize("name", ["norm", "resblock", "time", "condition", "mid"])
def test_a_key_within_a_part_of_our_configuration_is_kept_beside_the_fields(name, tmp_path):
    folder = saved(copy.deepcopy(MODELS["ours"]), {}, tmp_path)
    config = options(folder)
    config[name]["num_group"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    unet, told = through(lambda: UNet.from_pretrained(folder), [f"{name}.num_group"])
    assert name != "norm" or told.endswith("'norm.num_group' (did you mean 'num_groups'?)")
    assert unet.unet_config == copy.deepcopy(MODELS["ours"]).unet_config
    assert_come_back(unet, {name: config[name]}, tmp_path / "again")


@pytest.mark.parametrize("key", ["channels", "depth", "condition", "time", "transformer"])
def test_a_key_of_a_user_that_is_a_field_of_ours_is_left_out_and_named(key):
    unet, told = through(lambda: UNet.from_diffusers(noted(copy.deepcopy(MODELS["unet2d"]), {key: "ct"})), [key])
    assert told.endswith("(left out: UNet has a field of that name)")
    assert unet.config[key] == CONVERTED["unet2d"].config[key]


def test_a_key_of_a_user_that_is_an_option_of_diffusers_does_not_replace_it():
    unet = noted(copy.deepcopy(MODELS["ours"]), {"norm_num_groups": "many"})
    assert to_diffusers(unet).config["norm_num_groups"] == 4


@pytest.mark.parametrize("keys", [{key: value} for key, value in KEYS.items()], ids=KEYS)
def test_keys_of_others_in_a_constructor_are_an_error(keys):
    with pytest.raises(ValueError, match="is not a field of UNetConfig"):
        UNet(**{**copy.deepcopy(MODELS["ours"]).config, **keys})


def test_the_keys_of_diffusers_own_may_stand_in_a_constructor(tmp_path):
    unet = UNet.from_pretrained(saved(copy.deepcopy(MODELS["ours"]), {}, tmp_path))
    assert UNet(**unet.config).unet_config == unet.unet_config


def test_an_argument_that_from_pretrained_does_not_know_is_named(tmp_path):
    folder = saved(copy.deepcopy(MODELS["ours"]), {}, tmp_path)
    with pytest.warns(UserWarning, match=r"takes no 'dropot' \(did you mean 'dropout'"):
        UNet.from_pretrained(folder, dropot=0.5)
    assert UNet.from_pretrained(folder, dropout=0.5).unet_config.dropout == 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_of_diffusers_is_not_taken_for_one_of_ours(name, tmp_path):
    model = copy.deepcopy(MODELS[name])
    for read in (
        lambda: UNet.from_config(model.config),
        lambda: UNet.from_pretrained(saved(model, {}, tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"and unetgn's UNet has others: unetgn.UNet.from_diffusers converts"):
            read()
    assert UNet.from_diffusers(tmp_path).unet_config == UNet.from_diffusers(model).unet_config
