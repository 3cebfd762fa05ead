"""Checks checkpoints in files: safetensors with the prefixes and copies of published files, never a pickle."""

import importlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.interop.fixtures import fixture
from unetgn.interop import load

EDM = "edm_song_ddpmpp_class_augment"
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


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.ckpt"])
def test_a_file_that_is_not_there_is_said_to_be_missing(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load("compvis", tmp_path / name)


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


def write_by_pickle(net, file):
    with file.open("wb") as opened:  # as EDM's training does
        pickle.dump({"ema": net, "loss_fn": None, "dataset_kwargs": {"path": "x.zip"}}, opened)


OBJECTS = {
    "EDM's": ("edm.pkl", write_by_pickle),
    "EDM's, called safetensors": ("edm.safetensors", write_by_pickle),
    "a whole module": ("whole.pt", lambda net, file: torch.save(net, file)),
    # Stable Diffusion's first files have a class of Lightning's as a key.
    "of Lightning": ("sd.ckpt", lambda net, file: torch.save(
        {"callbacks": {type(net): 0}, "state_dict": net.state_dict(), "epoch": 3}, file)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write"), OBJECTS.values(), ids=OBJECTS)
def test_a_pickle_of_objects_loads_after_the_lines_that_its_error_says(name, write, tmp_path, monkeypatch):
    """Their code is a module in the folder where the lines run, as in a checkout of EDM."""
    it = fixture(EDM)
    (tmp_path / "their_code.py").write_text(
        "import torch\n\nclass Precond(torch.nn.Module):\n"
        "    def state_dict(self, **_):\n        return {f'model.{name}': part for name, part in self.held.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("their_code").Precond()
    net.held = it.state_dict()
    write(net, tmp_path / name)
    monkeypatch.delitem(sys.modules, "their_code")
    with pytest.raises(ValueError, match="A pickle runs any code, so none is opened here") as refused:
        load(tmp_path / name)
    assert "their_code" not in sys.modules
    said = str(refused.value)
    lines = "\n".join(line[4:] for line in said.splitlines() if line.startswith("    "))
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True, timeout=60)
    converted = tmp_path / re.findall(r"[\w.]*\.safetensors(?='\)$)", said)[0]
    assert same_weights(load(converted), it.converted())
