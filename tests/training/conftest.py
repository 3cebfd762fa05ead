"""Holds what every test of training needs, and small networks in the place of Stable Diffusion's."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from tests.training.forked import succeed
from tests.training.launched import SIX_STEPS, TINY, TWO
from tests.training.loops import Runs, spare_time

CAPTIONS = ["a cat", "a dog", "two cats and a dog", ""]


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Forget the precision of earlier runs, which Accelerate remembers for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_loss_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave loss curves empty in runs of this process, which else take a third of their time for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "loss_curves" not in request.fixturenames:
            patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).touch())
        yield


@pytest.fixture
def loss_curves() -> None:
    """Have loss curves drawn in this test."""


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` fills the first time; pytest's workers share it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration for runs of several processes."""
    file = tmp_path_factory.mktemp("processes") / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture(scope="session")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a run of two processes left."""

    def train(folder: Path) -> None:
        succeed("--config", str(tiny), "--output", str(folder / "run"), launcher=TWO, processes=2)

    return made_once(tmp_path_factory, "two", train) / "run"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a run of six steps left; to be copied before it is changed."""

    def train(folder: Path) -> None:
        (folder / "tiny.yaml").write_text(SIX_STEPS)
        succeed("--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"))

    return made_once(tmp_path_factory, "finished", train) / "run"


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a diffusers folder as Stable Diffusion's: tiny networks of random weights, latents 4×8×8 of 16 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("stable_diffusion")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(vocabulary), str(merges), model_max_length=12),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten images of 16 pixels in two classes, random (seed 0), each with a caption in a file beside it."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(10):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(CAPTIONS[number % len(CAPTIONS)] + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Make runs of six steps in this process, quickly."""
    spare_time(monkeypatch.setattr)
    return Runs(tmp_path)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of six steps that `runs` makes where nothing interrupts it, with a checkpoint of every step."""
    with pytest.MonkeyPatch.context() as patch:
        spare_time(patch.setattr)
        return Runs(tmp_path_factory.mktemp("unbroken")).run("run", "checkpoint.every=1")
