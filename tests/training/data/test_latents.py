"""Caches of latents: what is encoded, and which mistakes are answered before it."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.training.data.caches import cache
from unetgn.training.cache_latents import main
from unetgn.training.data.autoencoder import load_autoencoder
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.images import Images
from unetgn.training.data.latents import Latents
from unetgn.training.data.samples import IndexedSamples, StepBatches


def source(photographs: Path) -> Images:
    return open_images(DataConfig(name="folder", path=str(photographs), image_size=16), 3)


def direct(pipeline: Path, pixels: np.ndarray, noise: np.ndarray) -> torch.Tensor:
    """diffusers' own way from pixels to the latent that its U-Nets are trained on."""
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    with torch.no_grad():
        latent = vae.encode(torch.from_numpy(pixels[None].copy())).latent_dist
    return ((latent.mean + latent.std * torch.from_numpy(noise)) * vae.config.scaling_factor)[0]


@pytest.mark.parametrize("index", [0, 3, 9])
def test_a_latent_is_the_direct_encoding_with_the_samples_own_noise(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, index: int
) -> None:
    assert cache(stable_diffusion, photographs, tmp_path, "--batch-size", "1") == 0
    latents, images = Latents(str(tmp_path)), source(photographs)
    noise = np.random.default_rng(5).standard_normal((4, 8, 8), dtype=np.float32)
    drawn = torch.from_numpy(latents.image(index, np.random.default_rng(5)))
    assert torch.equal(drawn, direct(stable_diffusion, images.image(index), noise))
    mean = torch.from_numpy(latents.image(index))
    assert torch.equal(mean, direct(stable_diffusion, images.image(index), np.zeros_like(noise)))
    assert latents.label(index) == images.label(index)
    assert latents.class_names == ["cat", "dog"]


def test_a_flipped_latent_is_that_of_the_mirrored_image_and_not_the_mirrored_latent(
    stable_diffusion: Path, photographs: Path, both_ways: Path
) -> None:
    latents, images = Latents(str(both_ways), random_flip=True), source(photographs)
    seen = set()
    for seed in range(8):
        random = np.random.default_rng(seed)
        flipped = random.random() < 0.5
        noise = random.standard_normal((4, 8, 8), dtype=np.float32)
        pixels = images.image(2)[:, :, ::-1] if flipped else images.image(2)
        expected = direct(stable_diffusion, pixels, noise)
        drawn = torch.from_numpy(latents.image(2, np.random.default_rng(seed)))
        assert torch.allclose(drawn, expected, atol=1e-5)  # encoded in another batch: rounding
        seen.add(flipped)
    assert seen == {True, False}
    mirrored = direct(stable_diffusion, images.image(2)[:, :, ::-1], np.zeros((4, 8, 8), np.float32))
    assert not torch.allclose(mirrored.flip(-1), torch.from_numpy(latents.image(2)), atol=1e-3)


def test_a_shift_and_a_scale_are_those_of_the_autoencoder_and_undone_by_decoding(
    stable_diffusion: Path, photographs: Path, tmp_path: Path
) -> None:
    vae = AutoencoderKL.from_pretrained(stable_diffusion, subfolder="vae")
    vae.register_to_config(shift_factor=0.5, scaling_factor=3.0)
    vae.save_pretrained(tmp_path / "vae")
    assert cache(tmp_path / "vae", photographs, tmp_path / "cache") == 0
    latents = Latents(str(tmp_path / "cache"))
    z = torch.from_numpy(latents.image(4))
    with torch.no_grad():
        mean = vae.encode(torch.from_numpy(source(photographs).image(4)[None])).latent_dist.mean
        pixels = vae.decode(mean).sample
    assert torch.allclose(z, (mean[0] - 0.5) * 3, atol=1e-5)
    assert torch.allclose(load_autoencoder(latents.autoencoder).decode(z[None]), pixels, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_configuration_of_another_network_than_the_weights_is_refused(
    layers: int, stable_diffusion: Path, tmp_path: Path
) -> None:
    """diffusers would leave aside what is too much, and make up what lacks."""
    shutil.copytree(stable_diffusion / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    changed = {"down_block_types": ["DownEncoderBlock2D"] * layers, "block_out_channels": [8] * max(layers, 1)}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=r"(of another network than its weights are of|cannot be read)"):
        load_autoencoder(tmp_path)


def test_texts_are_what_stable_diffusion_makes_of_the_captions(
    stable_diffusion: Path, photographs: Path, both_ways: Path
) -> None:
    latents, images = Latents(str(both_ways)), source(photographs)
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    for index in (0, 2, 7):
        caption = (images.root / images.files[index]).with_suffix(".txt").read_text().strip()
        with torch.no_grad():
            expected, empty = pipeline.encode_prompt(caption, "cpu", 1, True)
        assert torch.allclose(torch.from_numpy(latents.text(index)), expected[0], atol=1e-5)
        assert torch.allclose(torch.from_numpy(latents.empty_text), empty[0], atol=1e-5)
    assert not np.allclose(latents.text(0), latents.text(1), atol=1e-3)


def test_captions_come_from_a_column_of_a_data_set_too(stable_diffusion: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures, words = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 99, 255)], ["a", "a dog", "cats"]
    features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": pictures, "words": words}, features=features).save_to_disk(tmp_path / "set")
    line = ["--autoencoder", str(stable_diffusion), "--text-encoder", str(stable_diffusion), "--out"]
    keys = ["data.name=datasets", f"data.path={tmp_path / 'set'}", "data.image_size=16"]
    assert main([*line, str(tmp_path / "cache"), "--caption-column", "words", *keys]) == 0
    assert main([*line, str(tmp_path / "other"), *keys]) == 2
    latents = Latents(str(tmp_path / "cache"))
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(["a dog"], "cpu", 1, False)
    assert torch.allclose(torch.from_numpy(latents.text(1)), expected[0], atol=1e-5)


def test_captions_that_are_cut_off_are_counted(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of twelve tokens two are the ends, and here every letter is a token: "two cats and a dog" has fourteen."""
    with caplog.at_level(logging.WARNING):
        assert cache(stable_diffusion, photographs, tmp_path, "--text-encoder", str(stable_diffusion)) == 0
    assert "2 of 10 captions are cut off after 12 tokens" in caplog.text


def test_samples_are_functions_of_seed_and_counter_and_travel_to_workers(both_ways: Path) -> None:
    latents = Latents(str(both_ways), random_flip=True)
    stream = IndexedSamples(latents, latents.usable(), seed=3)
    batches = StepBatches(1, 3, 4, 1, 0, 1)
    here = list(stream.loader(batches, num_workers=0, pin_memory=False))
    there = list(stream.loader(batches, num_workers=2, pin_memory=False))
    again = list(pickle.loads(pickle.dumps(stream)).loader(batches, num_workers=0, pin_memory=False))
    for one, other, third in zip(here, there, again, strict=True):
        assert one["text"].shape == (4, 12, 24)
        assert all(torch.equal(one[key], other[key]) and torch.equal(one[key], third[key]) for key in one)
    later = stream[4 + len(latents)]
    assert not torch.equal(later["image"], stream[4]["image"])


def test_the_fingerprint_of_latents_is_of_what_the_shards_hold(
    stable_diffusion: Path, photographs: Path, both_ways: Path, tmp_path: Path
) -> None:
    """The others are of as many images of the same classes."""
    shutil.copytree(both_ways, tmp_path / "moved")
    assert Latents(str(tmp_path / "moved")).fingerprint() == Latents(str(both_ways)).fingerprint()
    shutil.copytree(photographs, tmp_path / "images")
    for file in (tmp_path / "images").glob("*/*.png"):
        Image.new("RGB", (16, 16), (int(file.stem), 0, 0)).save(file)
    line = ["--flip", "--text-encoder", str(stable_diffusion)]
    assert cache(stable_diffusion, tmp_path / "images", tmp_path / "others", *line) == 0
    assert Latents(str(tmp_path / "others")).fingerprint() != Latents(str(both_ways)).fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.pth=x"], "unknown key 'data.pth'. Did you mean 'data.path'?"),
        (["train.steps=3"], "'train.steps=3' is no option, nor data.key=value"),
        (["--flipp"], "'--flipp' is no option, nor data.key=value"),
        (["data.image_size=many"], "data.image_size is 'many', but it takes a whole number"),
        (["data.image_size=15"], "one latent of 2×2 pixels: take a multiple of 2"),
        (["data.random_flip=true"], "data.random_flip is True, which is not for encoding: give --flip here"),
        (["data.held_out=0.1"], "data.held_out is 0.1, which is not for encoding: give it when training"),
        (["data.random_crop=true"], "data.random_crop is True, which is not for encoding"),
        (["data.path=nowhere"], "data.path 'nowhere' is not a folder"),
        (["data.name=latents"], "data.name is latents: these are encoded already"),
        (["--autoencoder", "nowhere"], "nowhere: there is no such folder: give a folder"),
        (["--text-encoder", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_a_mistake_is_answered_with_key_and_remedy(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cache(stable_diffusion, photographs, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_caption_is_named(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photographs, tmp_path / "images")
    (tmp_path / "images" / "cat" / "4.txt").unlink()
    line = ["--text-encoder", str(stable_diffusion)]
    assert cache(stable_diffusion, tmp_path / "images", tmp_path / "out", *line) == 2
    error = capsys.readouterr().err
    assert "1 of 10 images have no caption; the first would be" in error
    assert "cat/4.txt: write it" in error


def test_a_caption_that_is_not_in_utf_8_is_named(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photographs, tmp_path / "images")
    (tmp_path / "images" / "cat" / "4.txt").write_bytes("café".encode("latin-1"))
    line = ["--text-encoder", str(stable_diffusion)]
    assert cache(stable_diffusion, tmp_path / "images", tmp_path / "out", *line) == 2
    assert f"the caption {tmp_path / 'images' / 'cat' / '4.txt'} is not in UTF-8" in capsys.readouterr().err


def test_flips_that_were_not_cached_are_refused_with_the_reason(
    stable_diffusion: Path, photographs: Path, tmp_path: Path
) -> None:
    assert cache(stable_diffusion, photographs, tmp_path) == 0
    with pytest.raises(
        ValueError, match=r"data\.random_flip is true, but the mirror image of a latent is not .*--flip"
    ):
        Latents(str(tmp_path), random_flip=True)


def test_what_is_no_cache_is_refused(tmp_path: Path, both_ways: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no manifest\.json: give a folder that training/cache_latents\.py wrote"
    ):
        Latents(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"images": 3}))
    with pytest.raises(ValueError, match=r"manifest\.json is not as training/cache_latents\.py writes it"):
        Latents(str(tmp_path))
    config = DataConfig(name="latents", path=str(both_ways), image_size=16)
    with pytest.raises(
        ValueError, match=r"set data\.image_size to 8, and model\.in_channels and .* to 4 \(they are 16"
    ):
        open_images(config, 3)
    assert load_file(both_ways / "latents-00002.safetensors")["mean"].shape == (2, 4, 8, 8)
