"""No door through which weights come opens a pickle; each says how to convert it, and then opens."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tensors import randomized
from unetgn import UNet, UNetConfig
from unetgn.interop.files import read_checkpoint
from unetgn.sampling.folder import SamplingError
from unetgn.sampling.trained import open_autoencoder, open_text_encoder
from unetgn.training.data.autoencoder import load_autoencoder
from unetgn.training.data.text import TextEncoder
from unetgn.training.network import load_network


@dataclass(frozen=True)
class Door:
    """Opens a folder; its weights lie in a part of it, under the names of a library."""

    enter: Callable[[Path], Any]
    part: str = "."
    ours: bool = True
    """Says whether the folder is of our own network, or of Stable Diffusion."""
    stem: str = "diffusion_pytorch_model"
    pickled: str = "diffusion_pytorch_model"
    middle: str = ""
    """What the variant adds to the names."""


def averaged(folder: Path) -> UNet:
    unet = UNet.from_config(UNet.load_config(folder))
    EMAModel.from_pretrained(folder, UNet).copy_to(unet.parameters())
    return unet


# Of a network that draws latents by texts, what the samplers ask.
_UNET = SimpleNamespace(
    config=SimpleNamespace(in_channels=4), unet_config=UNetConfig.from_dict({"transformer": {"context_dim": 24}})
)
READER: Any = SimpleNamespace(
    check_prompts=lambda *_: None, cache=Path("nowhere"), reads_text=True, unconditional=True, unet=_UNET
)

DOORS = {
    "from_pretrained": Door(UNet.from_pretrained),
    "from_pretrained, whole": Door(lambda folder: UNet.from_pretrained(folder, low_cpu_mem_usage=False)),
    "from_pretrained, None": Door(lambda folder: UNet.from_pretrained(folder, use_safetensors=None)),
    "from_pretrained, text": Door(lambda folder: UNet.from_pretrained(str(folder), use_safetensors=True)),
    "from_pretrained, subfolder": Door(lambda folder: UNet.from_pretrained(folder.parent, subfolder=folder.name)),
    "from_pretrained, variant": Door(lambda folder: UNet.from_pretrained(folder, variant="fp16"), middle=".fp16"),
    "a pipeline": Door(lambda folder: DDPMPipeline.from_pretrained(folder).unet, part="unet"),
    "an average": Door(averaged),
    "train.initial_weights": Door(load_network),
    "train.initial_weights, a pipeline": Door(load_network, part="unet"),
    "train.initial_weights, diffusers": Door(load_network, part="unet", ours=False),
    "from_diffusers": Door(UNet.from_diffusers, part="unet", ours=False),
    "from_diffusers, variant": Door(
        lambda folder: UNet.from_diffusers(folder, variant="fp16"), part="unet", ours=False, middle=".fp16"
    ),
    "an autoencoder": Door(lambda folder: load_autoencoder(folder).model, part="vae", ours=False),
    "--autoencoder": Door(
        lambda folder: open_autoencoder(READER, folder).model,
        part="vae",
        ours=False,  # type: ignore[union-attr]
    ),
    "--text-encoder": Door(
        lambda folder: open_text_encoder(READER, folder, ["a cat"]).model,  # type: ignore[union-attr]
        part="text_encoder",
        ours=False,
        stem="model",
        pickled="pytorch_model",
    ),
    "a text encoder": Door(
        lambda folder: TextEncoder(folder).model, part="text_encoder", ours=False, stem="model", pickled="pytorch_model"
    ),
}


class Mark:
    """Leaves a mark where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def halves(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(list(state.items())[part::2]) for part in (0, 1)]


def alone(folder: Path, door: Door, state: dict[str, Any]) -> None:
    torch.save(state, folder / f"{door.pickled}{door.middle}.bin")


def in_parts(folder: Path, door: Door, state: dict[str, Any]) -> None:
    names = [f"{door.pickled}{door.middle}-0000{part}-of-00002.bin" for part in (1, 2)]
    for name, half in zip(names, halves(state), strict=True):
        torch.save(half, folder / name)
    places = {key: name for name, half in zip(names, halves(state), strict=True) for key in half}
    (folder / f"{door.pickled}.bin.index{door.middle}.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def disguised(folder: Path, door: Door, state: dict[str, Any]) -> None:
    torch.save(state, folder / f"{door.stem}{door.middle}.safetensors")


def old_and_disguised(folder: Path, door: Door, state: dict[str, Any]) -> None:
    torch.save(state, folder / f"{door.stem}{door.middle}.safetensors", _use_new_zipfile_serialization=False)


def named_by_an_index(folder: Path, door: Door, state: dict[str, Any], ending: str = ".bin") -> None:
    torch.save(state, folder / f"part{ending}")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, f"part{ending}")}
    (folder / f"{door.stem}.safetensors.index{door.middle}.json").write_text(json.dumps(index))


def disguised_in_an_index(folder: Path, door: Door, state: dict[str, Any]) -> None:
    named_by_an_index(folder, door, state, ending=".safetensors")


def of_another_ending(folder: Path, door: Door, state: dict[str, Any]) -> None:
    named_by_an_index(folder, door, state, ending=".dat")


Kind = Callable[[Path, Door, dict[str, Any]], None]
CONVERTED: list[Kind] = [alone, in_parts, disguised, old_and_disguised]  # what their errors say how to convert
KINDS: list[Kind] = [*CONVERTED, named_by_an_index, disguised_in_an_index, of_another_ending]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a network of ours, as a pipeline of which the network is a part."""
    folder = tmp_path_factory.mktemp("network") / "pipeline"
    unet = randomized(UNet(channels=(8,), depth=1, attention_levels=(), norm={"num_groups": 4}))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(door: Door, network: Path, stable_diffusion: Path, tmp_path: Path) -> Path:
    whole = network / "unet" if door.ours and door.part == "." else network if door.ours else stable_diffusion
    given = shutil.copytree(whole, tmp_path / "given")
    file = given / door.part / f"{door.stem}.safetensors"
    file.rename(file.with_name(f"{door.stem}{door.middle}.safetensors"))
    return given


def take_weights(folder: Path, door: Door) -> tuple[Path, dict[str, Tensor]]:
    """Take the safetensors file out of the folder; return where it was, and the tensors."""
    file = folder / door.part / f"{door.stem}{door.middle}.safetensors"
    tensors = load_file(file)
    file.unlink()
    return file.parent, tensors


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note every pickle that torch opens."""
    files: list[Any] = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, *more, **options: files.append(file) or load(file, *more, **options)
    )
    return files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_no_door_opens_a_pickle(door: Door, kind: Kind, folder: Path, opened: list[Any], tmp_path: Path) -> None:
    place, tensors = take_weights(folder, door)
    kind(place, door, {**tensors, "mark": Mark(tmp_path / "mark")})
    with pytest.raises((ValueError, SamplingError), match="pickle"):
        door.enter(folder)
    assert not opened
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("door", list(DOORS.values())[1::2], ids=list(DOORS)[1::2])
def test_a_door_opens_after_the_lines_that_its_error_says(door: Door, kind: Kind, folder: Path) -> None:
    expected = door.enter(folder).state_dict()
    place, tensors = take_weights(folder, door)
    kind(place, door, tensors)
    with pytest.raises((ValueError, SamplingError), match="A pickle runs any code") as refused:
        door.enter(folder)
    exec("\n".join(line.strip() for line in str(refused.value).splitlines()[1:]), {})
    found = door.enter(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_door_opens_where_a_pickle_lies_beside_the_weights(network: Path, opened: list[Any], tmp_path: Path) -> None:
    folder = shutil.copytree(network / "unet", tmp_path / "given")
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    torch.save({}, folder / "optimizer.bin")
    UNet.from_pretrained(folder)
    assert not opened


@pytest.mark.parametrize("length", [0x4B50, 0x0280, 0x0580])
def test_a_safetensors_file_that_begins_with_the_same_bytes_is_none(length: int, tmp_path: Path) -> None:
    """A file begins with the length of its header, which may read "PK"."""
    save_file({"a": torch.ones(2)}, tmp_path / "a", metadata={"more": ""})
    (now,) = struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"more": "x" * (length - now)})
    assert struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8]) == (length,)
    assert read_checkpoint(tmp_path / "a.safetensors").keys() == {"a"}


def test_asking_for_a_pickle_is_refused(network: Path) -> None:
    with pytest.raises(ValueError, match="use_safetensors=False asks for a pickle"):
        UNet.from_pretrained(network / "unet", use_safetensors=False)


@pytest.mark.parametrize("options", [{}, {"weight_name": "adapter.bin"}, {"use_safetensors": False}, {"file": True}])
def test_an_adapter_is_no_pickle(options: dict[str, Any], network: Path, opened: list[Any], tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter.bin")
    place = tmp_path / "adapter.bin" if options.pop("file", False) else tmp_path
    with pytest.raises(ValueError, match="pickle"):
        UNet.from_pretrained(network / "unet").load_lora_adapter(place, prefix=None, **options)
    assert not opened


def test_an_adapter_of_safetensors_comes_back(network: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    unet, other = UNet.from_pretrained(network / "unet"), UNet.from_pretrained(network / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["linear_1"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path, prefix=None)
    x = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(other(x, 5).sample, unet(x, 5).sample)


def test_what_an_index_on_the_hub_names_is_no_pickle(network: Path, opened: list[Any], tmp_path: Path) -> None:
    """The hub's own folder on this disk stands for it."""
    snapshot = tmp_path / "models--some--body" / "snapshots" / ("0" * 40)
    shutil.copytree(network / "unet", snapshot)
    (tmp_path / "models--some--body" / "refs").mkdir()
    (tmp_path / "models--some--body" / "refs" / "main").write_text("0" * 40)
    get = {"cache_dir": tmp_path, "local_files_only": True}
    tensors = UNet.from_pretrained("some/body", **get).state_dict()
    (snapshot / "diffusion_pytorch_model.safetensors").unlink()
    alone(snapshot, DOORS["from_pretrained"], tensors)
    with pytest.raises(OSError, match="safetensors"):
        UNet.from_pretrained("some/body", **get)
    named_by_an_index(snapshot, DOORS["from_pretrained"], tensors)
    with pytest.raises(ValueError, match="pickle"):
        UNet.from_pretrained("some/body", **get)
    assert not opened


def test_a_text_encoder_with_an_adapter_is_refused(stable_diffusion: Path, opened: list[Any], tmp_path: Path) -> None:
    """transformers loads such an adapter of its own accord, from a pickle where there is nothing else."""
    folder = shutil.copytree(stable_diffusion, tmp_path / "given")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, folder / "text_encoder" / "adapter_model.bin")
    with pytest.raises(ValueError, match="merge it into the text encoder"):
        TextEncoder(folder)
    assert not opened
