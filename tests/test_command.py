"""The command `unetgn`, word by word."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

import unetgn
from unetgn.programs.command import PROGRAMS, main, usage
from unetgn.training.config_yaml import CONFIGS


@pytest.mark.parametrize("word", PROGRAMS)
def test_each_word_starts_its_program(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(PROGRAMS[word][0]), "main", lambda rest: given.append(rest) or 7)
    assert main([word, "a", "--b=c"]) == 7
    assert given == [["a", "--b=c"]]


@pytest.mark.parametrize("word", PROGRAMS)
def test_each_program_has_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([word, "--help"])
    assert exit_.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_without_a_word_the_words_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [main([]), main(["--help"])] == [2, 0]
    assert capsys.readouterr().out == f"{usage()}\n" * 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unetgn {unetgn.__version__}\n"


def test_a_mistyped_word_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "x"]) == 2
    assert "there is no 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_configurations_are_listed_by_what_they_are_for_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    assert all(len(line.split("  ", 1)[1].strip()) > 20 for line in lines)
    assert main(["configs", "digits8_ddpm"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "digits8_ddpm.yaml").read_text()
    assert main(["configs", "digits8_dpm"]) == 2
    assert "Did you mean 'digits8_ddpm'?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers' with one model, and no weights: only configurations are read."""
    folder = tmp_path_factory.mktemp("pipeline")
    network = UNet2DModel(8, 1, 1, block_out_channels=(32, 32), layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def test_what_fuse_would_do_is_said_of_a_pipeline_and_of_a_model(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = UNet2DModel.from_config(UNet2DModel.load_config(pipeline / "unet"))
    expected = f"{unetgn.fuse(real)}\n"
    for place in (pipeline, pipeline / "unet"):
        assert main(["fuse-report", str(place)]) == 0
        assert capsys.readouterr().out == expected


def test_what_fuse_would_do_is_said_of_what_a_function_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "networks_of_mine.py").write_text(
        "from torch import nn\n\n\ndef network():\n    return nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert main(["fuse-report", "networks_of_mine:network"]) == 0
    assert "1 places fused" in capsys.readouterr().out
    assert main(["fuse-report", f"diffusers:{AutoencoderKL.__name__}"]) == 0
    assert "16 places fused" in capsys.readouterr().out
    sys.modules.pop("networks_of_mine")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of diffusers' that its folder describes."""
    folder = tmp_path_factory.mktemp("theirs") / "pipeline"
    torch.manual_seed(0)
    network = UNet2DModel(8, 1, 1, block_out_channels=(32, 32), layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def test_a_network_is_converted_to_ours_and_back(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(theirs), str(ours)]) == 0
    assert f"a UNet, in {ours}" in capsys.readouterr().out
    assert main(["convert", str(ours), str(back), "--to", "diffusers"]) == 0
    first, last = (UNet2DModel.from_pretrained(folder).state_dict() for folder in (theirs / "unet", back))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    sample = torch.randn(2, 1, 8, 8)
    expected = UNet2DModel.from_pretrained(theirs / "unet")(sample, 7).sample
    assert torch.allclose(unetgn.UNet.from_pretrained(ours)(sample, 7).sample, expected, atol=1e-5)


def test_a_file_is_converted_with_the_options_that_it_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monai = pytest.importorskip("monai.networks.nets")
    options = {"num_res_blocks": (1, 1), "channels": (32, 32), "attention_levels": (False, True), "norm_num_groups": 32}
    network = monai.DiffusionModelUNet(2, 1, 1, num_head_channels=8, **options)
    file, out = tmp_path / "monai.safetensors", tmp_path / "ours"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    assert main(["convert", str(file), str(out)]) == 2
    assert "num_head_channels" in capsys.readouterr().err
    assert not out.exists()
    assert main(["convert", str(file), str(out), "num_head_channels=8", "norm_num_groups=32"]) == 0
    sample, steps = torch.randn(2, 1, 8, 8), torch.tensor([7, 300])
    expected = network.eval()(sample, steps)
    assert torch.allclose(unetgn.UNet.from_pretrained(out)(sample, steps).sample, expected, atol=1e-5)


def test_what_cannot_be_converted_is_said(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    for line, says in (
        (["nowhere.safetensors", "out"], "nowhere.safetensors"),
        (["broken.safetensors", "out"], "is not a safetensors file"),
        (["there", "out"], "has no config.json"),
        ([str(theirs), "there"], "is there already"),
        ([str(theirs), "out", "channels=3"], "channels is for a file"),
        ([str(theirs), "out", "--ema"], "--ema is for a file"),
    ):
        assert main(["convert", *line]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nowhere", "is no folder with a config.json or model_index.json, nor package.module:name"),
        ("nowhere.at.all:network", "makes no model (ModuleNotFoundError: No module named 'nowhere')"),
        ("torch.nn:Unknown", "makes no model (AttributeError"),
        ("torch.nn:Linear", "makes no model (TypeError"),
        ("collections:OrderedDict", "makes a OrderedDict, and no torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_said(model: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse-report", model]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"_class_name": "NoSuchModel"}', "names 'NoSuchModel', which is no model of diffusers"),
        ('{"_class_name": "DDPMScheduler"}', "names 'DDPMScheduler', which is no model of diffusers"),
        ('{"_class_name": "UNet"}', "is a network of unetgn, whose norms are fused as they are"),
        ("{}", "names None, which is no model of diffusers"),
        ("[" * 3000, "config.json"),
    ],
)
def test_folders_of_other_things_are_said(
    config: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert main(["fuse-report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
