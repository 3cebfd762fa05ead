"""Checks checkpoints in files: safetensors with the prefixes and copies of published files, never a pickle."""

import pytest
import torch
from safetensors.torch import save_file

from tests.interop.fixtures import fixture
from unetgn.interop import load

NAME = "adm_conv_additive_legacy"


@pytest.fixture
def case():
    it = fixture(NAME)
    return it.meta["constructor_kwargs"], it.state_dict()


def same_weights(unet, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_a_file_loads_with_and_without_a_prefix(case, tmp_path, prefix):
    options, state = case
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "adm.safetensors")
    unet = load("guided-diffusion", tmp_path / "adm.safetensors", class_name="UNetModel", **options)
    assert same_weights(unet, fixture(NAME).converted())


def test_other_networks_in_the_file_are_left_out(case, tmp_path):
    options, state = case
    mixed = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    mixed["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    save_file(mixed, tmp_path / "sd.safetensors")
    unet = load("guided-diffusion", tmp_path / "sd.safetensors", class_name="UNetModel", **options)
    assert same_weights(unet, fixture(NAME).converted())


def test_averaged_copies_are_read_where_asked_for(case, tmp_path):
    options, state = case
    both = {f"model.diffusion_model.{key}": torch.zeros_like(value) for key, value in state.items()}
    both |= {f"model_ema.diffusion_model{key.replace('.', '')}": value for key, value in state.items()}
    save_file(both, tmp_path / "sd.safetensors")
    unet = load("guided-diffusion", tmp_path / "sd.safetensors", class_name="UNetModel", ema=True, **options)
    assert same_weights(unet, fixture(NAME).converted())


def test_averaged_copies_that_are_not_there_are_an_error(case, tmp_path):
    options, state = case
    save_file({f"model.{key}": value for key, value in state.items()}, tmp_path / "adm.safetensors")
    with pytest.raises(ValueError, match="no averaged copy"):
        load("guided-diffusion", tmp_path / "adm.safetensors", class_name="UNetModel", ema=True, **options)


def test_the_class_may_be_left_out_where_there_is_one_only(tmp_path):
    it = fixture("compvis_sd1")
    save_file(it.state_dict(), tmp_path / "sd.safetensors")
    assert same_weights(load("compvis", tmp_path / "sd.safetensors", **it.meta["constructor_kwargs"]), it.converted())


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.pkl", "model.bin"])
def test_a_pickle_is_refused_unopened_with_a_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ValueError, match=r"(?s)is a pickle.*weights_only=True"):
        load("compvis", tmp_path / name)


def test_a_pickle_under_another_name_is_refused_too(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load("compvis", tmp_path / "model.safetensors")


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load("compvis", tmp_path / "absent.safetensors")


def test_sixteen_bit_files_give_sixteen_bit_networks_and_mixed_ones_the_wider_type(case, tmp_path):
    options, state = case
    halves = {key: value.half() for key, value in state.items()}
    save_file(halves, tmp_path / "half.safetensors")
    unet = load("guided-diffusion", tmp_path / "half.safetensors", class_name="UNetModel", **options)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float16}
    halves["out.2.bias"] = state["out.2.bias"]
    save_file(halves, tmp_path / "mixed.safetensors")
    unet = load("guided-diffusion", tmp_path / "mixed.safetensors", class_name="UNetModel", **options)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
