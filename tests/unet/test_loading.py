"""Checks `from_pretrained`: into whole memory as into empty weights, and with a quantizer."""

import diffusers
import pytest
import torch
from diffusers.quantizers import auto, base, quantization_config
from torch import nn

from tests.tensors import randomized
from unetgn import UNet
from unetgn.interop import to_diffusers

NETWORKS = {
    "sinusoids": {"channels": (8, 16), "depth": 1, "norm": {"num_groups": 4}},
    "fourier": {"channels": (8, 16), "depth": 1, "norm": {"num_groups": 4}, "time": {"features": "fourier"}},
}


@pytest.fixture(params=NETWORKS)
def folder(request, tmp_path):
    randomized(UNet(**NETWORKS[request.param])).half().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_whole_memory_gives_what_empty_weights_give(folder, dtype):
    arguments = {} if dtype is None else {"torch_dtype": dtype}
    expected = UNet.from_pretrained(folder, **arguments)
    unet = UNet.from_pretrained(folder, low_cpu_mem_usage=False, **arguments)
    assert type(unet) is UNet
    assert unet.config == expected.config
    assert not unet.training
    given, state = unet.state_dict(), expected.state_dict()
    assert {key: t.dtype for key, t in given.items()} == {key: t.dtype for key, t in state.items()}
    assert all(torch.equal(given[key], state[key]) for key in state)


def test_a_subclass_is_loaded_as_itself(folder):
    class Mine(UNet):
        pass

    assert type(Mine.from_pretrained(folder, low_cpu_mem_usage=False)) is Mine


def test_tensors_of_another_shape_than_the_files_are_those_of_a_new_network(folder):
    options = {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    unet, info = UNet.from_pretrained(folder, in_channels=9, out_channels=5, **options)
    assert {key for key, *_ in info["mismatched_keys"]} == {"conv_in.weight", "conv_out.weight", "conv_out.bias"}
    bound = (9 * 9) ** -0.5  # nn.Conv2d draws uniformly below 1 / sqrt(what goes into an output)
    assert 0.8 * bound < unet.conv_in.weight.abs().max() <= bound
    assert not unet.conv_out.weight.any()  # zero_init
    kept = UNet.from_pretrained(folder).state_dict()
    assert torch.equal(unet.mid_block.resnets[0].conv1.weight, kept["mid_block.resnets.0.conv1.weight"])


def test_a_shape_that_does_not_fit_is_an_error_all_the_same(folder):
    with pytest.raises(RuntimeError, match=r"size mismatch for conv_in\.weight"):
        UNet.from_pretrained(folder, in_channels=9, low_cpu_mem_usage=False)


class Rounded(nn.Linear):
    """Stands for a quantized layer: its weight is rounded to eighths."""


class RoundingConfig(quantization_config.QuantizationConfigMixin):
    def __init__(self, quant_method=quantization_config.QuantizationMethod.GGUF, steps=8, **kwargs):
        self.quant_method, self.steps = quantization_config.QuantizationMethod.GGUF, steps

    def to_diff_dict(self):
        return self.to_dict()


class Rounding(base.DiffusersQuantizer):
    """Replaces linear layers as Quanto does, and rounds their weights where the file is not quantized yet."""

    use_keep_in_fp32_modules = True
    is_serializable = is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Rounded
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Rounded):
                steps = self.quantization_config.steps
                module.weight.data = (module.weight.data * steps).round() / steps
        return model


def test_a_quantizer_of_diffusers_loads_our_network_and_its_folder_comes_back(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "gguf", RoundingConfig)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gguf", Rounding)
    unet = UNet.from_pretrained(folder, quantization_config=RoundingConfig(), torch_dtype=torch.float32)
    rounded = unet.time_embedding.linear_1
    assert type(rounded) is Rounded
    assert torch.equal(rounded.weight * 8, (rounded.weight * 8).round())
    unet.save_pretrained(tmp_path / "quantized")
    again = UNet.from_pretrained(tmp_path / "quantized", torch_dtype=torch.float32)
    assert type(again.time_embedding.linear_1) is Rounded
    assert again.config.quantization_config.steps == 8
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(x, 5).sample, unet(x, 5).sample, rtol=0, atol=0)
    with pytest.raises(ValueError, match="UNet is quantized: load it without quantization_config"):
        to_diffusers(unet)


@pytest.mark.parametrize("library", ["optimum.quanto", "torchao.quantization"])
def test_quanto_and_torchao_load_and_come_back(library, folder, tmp_path):
    module = pytest.importorskip(library)
    if library == "optimum.quanto":
        config, dtype = diffusers.QuantoConfig("int8"), torch.float32  # in bfloat16 its kernel for CPUs crashes
    else:
        config, dtype = diffusers.TorchAoConfig(module.Int8WeightOnlyConfig()), torch.bfloat16
    unet = UNet.from_pretrained(folder, quantization_config=config, torch_dtype=dtype)
    assert type(unet.time_embedding.linear_1.weight) is not nn.Parameter
    unet.save_pretrained(tmp_path / "quantized")
    again = UNet.from_pretrained(tmp_path / "quantized", torch_dtype=dtype)
    x = torch.ones(1, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(again(x, 5).sample, unet(x, 5).sample)
