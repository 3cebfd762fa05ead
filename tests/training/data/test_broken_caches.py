"""Caches of latents that were interrupted or damaged: what they go on from, and what they are answered with."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tests.training.data.caches import cache
from tests.training.forked import finish
from unetgn.training.data.images import ImageFolder
from unetgn.training.data.latents import EMPTY_TEXT, Latents, Manifest, read_manifest
from unetgn.training.files import sha256


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("latents-*.safetensors")}


def test_a_cache_killed_after_some_shards_and_started_again_is_the_unbroken_one(
    stable_diffusion: Path, photographs: Path, tmp_path: Path
) -> None:
    line = ["--text-encoder", str(stable_diffusion), "--shard-size", "2", "--batch-size", "2"]
    assert cache(stable_diffusion, photographs, tmp_path / "whole", *line) == 0
    keys = ["data.name=folder", f"data.path={photographs}", "data.image_size=16"]
    interrupted = ["--autoencoder", str(stable_diffusion), "--out", str(tmp_path / "broken"), *keys, *line]
    killed = finish(*interrupted, script=Path(__file__).with_name("cache_latents_with_a_kill.py"))
    assert killed.code == -signal.SIGKILL, killed.stderr
    assert sorted(files(tmp_path / "broken")) == ["latents-00000.safetensors", "latents-00001.safetensors"]
    with pytest.raises(
        ValueError, match=r"is unfinished, 2 of 5 shards are there: start training/cache_latents\.py again"
    ):
        Latents(str(tmp_path / "broken"))
    made = [(tmp_path / "broken" / name).stat().st_mtime_ns for name in sorted(files(tmp_path / "broken"))]
    assert cache(stable_diffusion, photographs, tmp_path / "broken", *line) == 0
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    kept = [(tmp_path / "broken" / f"latents-0000{number}.safetensors").stat().st_mtime_ns for number in (0, 1)]
    assert kept == made
    assert read_manifest(tmp_path / "broken") == read_manifest(tmp_path / "whole")


def test_a_second_process_is_kept_out(stable_diffusion: Path, photographs: Path, tmp_path: Path) -> None:
    holder = "import sys, time; from pathlib import Path; from unetgn.training.run_directory import RunDirectory\n"
    holder += "run = RunDirectory(Path(sys.argv[1])); run.lock(); print('held', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    first = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], env=environment, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        assert cache(stable_diffusion, photographs, tmp_path) == 2
    finally:
        first.kill()
        first.wait()
    assert cache(stable_diffusion, photographs, tmp_path) == 0


def test_a_damaged_shard_is_named_and_made_anew(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache(stable_diffusion, photographs, tmp_path) == 0
    whole, shard = files(tmp_path), tmp_path / "latents-00001.safetensors"
    flipped = bytearray(whole[shard.name])
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is not what was written .*delete it and start"):
        Latents(str(tmp_path)).usable()
    shard.write_bytes(whole[shard.name][:-20])
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is damaged"):
        Latents(str(tmp_path))
    shard.unlink()
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is missing"):
        Latents(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cache(stable_diffusion, photographs, tmp_path) == 0
    assert "latents-00001.safetensors is missing or damaged: it is made anew" in caplog.text
    assert files(tmp_path) == whole


def test_another_cache_in_the_folder_is_refused(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    assert cache(stable_diffusion, photographs, out) == 0
    vae = AutoencoderKL.from_pretrained(stable_diffusion, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    for autoencoder, folder, more, message in (
        (stable_diffusion, out, ["data.image_size=8"], "data.image_size was 16 and is 8"),
        (stable_diffusion, out, ["--flip"], "flipped was False and is True"),
        (stable_diffusion, out, ["--shard-size", "5"], "shard_size was 4 and is 5"),
        (stable_diffusion, out, ["--text-encoder", str(stable_diffusion)], "text_shape was None and is (12, 24)"),
        (tmp_path / "vae", out, [], "autoencoder was '"),
        (stable_diffusion, tmp_path / "full", [], "holds other things (precious.txt): give another --out"),
    ):
        assert cache(autoencoder, photographs, folder, *more) == 2
        assert message in capsys.readouterr().err
    assert len(Latents(str(out)).usable()) == 10


def test_a_cache_goes_on_with_the_same_images_only(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image renamed, so that it stands in another place: without a word, one shard would have it twice."""
    shutil.copytree(photographs, tmp_path / "images")
    out = tmp_path / "cache"
    assert cache(stable_diffusion, tmp_path / "images", out) == 0
    (out / "latents-00001.safetensors").unlink()
    first = tmp_path / "images" / "cat" / "0.png"
    first.rename(first.with_name("z.png"))
    assert cache(stable_diffusion, tmp_path / "images", out) == 2
    assert "fingerprint of the images was '" in capsys.readouterr().err
    first.with_name("z.png").rename(first)
    assert cache(stable_diffusion, tmp_path / "images", out) == 0


def test_a_cache_goes_on_with_the_same_tokenizer_only(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(stable_diffusion / name, tmp_path / "text" / name)
    line = ["--text-encoder", str(tmp_path / "text")]
    assert cache(stable_diffusion, photographs, tmp_path / "cache", *line) == 0
    assert cache(stable_diffusion, photographs, tmp_path / "cache", *line) == 0
    with (tmp_path / "text" / "tokenizer" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert cache(stable_diffusion, photographs, tmp_path / "cache", *line) == 2
    assert "tokenizer was {" in capsys.readouterr().err


def test_a_damaged_network_is_named_and_made_anew(
    stable_diffusion: Path, both_ways: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(both_ways, out)
    for name in ("autoencoder", "text_encoder", "tokenizer"):
        for file in sorted((out / name).iterdir()):
            whole = file.read_bytes()
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(ValueError, match=rf"{file} is not what was written \(its sha256 differs\): delete it"):
                Latents(str(out)).usable()
            file.unlink()
            with pytest.raises(ValueError, match=rf"{file} is missing: delete it and start"):
                Latents(str(out)).usable()
            file.write_bytes(whole)
    for name in ("autoencoder", "text_encoder", "tokenizer"):
        next((out / name).iterdir()).unlink()
    assert cache(stable_diffusion, photographs, out, "--flip", "--text-encoder", str(stable_diffusion)) == 0
    assert len(Latents(str(out)).usable()) == 10
    assert read_manifest(out) == read_manifest(both_ways)


@pytest.mark.parametrize("change", [(b'"label"', b'"labem"'), (b"I64", b"I32"), (b"F32", b"F30")])
def test_a_flipped_bit_in_a_shards_header_is_damage_too(
    change: tuple[bytes, bytes], both_ways: Path, tmp_path: Path
) -> None:
    shutil.copytree(both_ways, tmp_path / "cache")
    shard = tmp_path / "cache" / "latents-00001.safetensors"
    shard.write_bytes(shard.read_bytes().replace(*change, 1))
    said = r"latents-00001\.safetensors (is damaged|is not what was written|does not hold what) .*delete it"
    with pytest.raises(ValueError, match=said):
        Latents(str(tmp_path / "cache")).usable()


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", "8"), ("shard_size", 0), ("shape", [4, 8]), ("scaling_factor", None), ("class_names", "ab"),
     ("flipped", "no"), ("text_shape", [12, "24"]), ("sha256", ["a"]), ("scaling_factor", 10**400),
     ("scaling_factor", 0), ("shift_factor", 1e300), ("sha256", {"/proc/kmsg": "0" * 64}),
     ("sha256", {"latents-00099.safetensors": "0" * 64}),  # of more images than there are
     ("sha256", {"a/../../b": "0" * 64}), ("sha256", {"": "0" * 64}), ("sha256", {"a\0": "0" * 64})],
)  # fmt: skip
def test_a_manifest_with_a_value_of_another_type_is_refused(
    key: str, value: object, both_ways: Path, tmp_path: Path
) -> None:
    keys = json.loads((both_ways / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(keys | {key: value}))
    with pytest.raises(ValueError, match=rf"is not as training/cache_latents\.py writes it: {key} is "):
        Latents(str(tmp_path))


def test_an_image_that_breaks_while_it_is_encoded_is_named(
    stable_diffusion: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(photographs, tmp_path / "images")
    last = tmp_path / "images" / "dog" / "9.png"
    checked = ImageFolder.usable

    def break_after(images: ImageFolder) -> np.ndarray:
        usable = checked(images)
        last.write_bytes(last.read_bytes()[:40])
        return usable

    monkeypatch.setattr(ImageFolder, "usable", break_after)
    assert cache(stable_diffusion, tmp_path / "images", tmp_path / "out", "data.num_workers=1") == 1
    assert f"cache_latents.py: {last} cannot be read any more: " in capsys.readouterr().err
    assert len(files(tmp_path / "out")) == 2


TENSORS = ("mean", "std", "mean_flipped", "std_flipped", "label", "text")
OTHERWISE = {
    "another type": lambda tensor: tensor.to(torch.float64 if tensor.is_floating_point() else torch.int32),
    "one more axis": lambda tensor: tensor[None].contiguous(),
    "one axis less": lambda tensor: tensor[0].clone(),
    "fewer rows": lambda tensor: tensor[:-1].clone(),
    "of one number": lambda tensor: tensor.flatten()[:1].clone(),
    "missing": lambda tensor: None,
}


@pytest.mark.parametrize("how", OTHERWISE)
@pytest.mark.parametrize("name", [*TENSORS, "empty text"])
def test_tensors_that_are_not_what_the_manifest_says_are_refused_whatever_their_sums(
    tmp_path: Path, name: str, how: str
) -> None:
    manifest = Manifest(3, 2, (2, 4, 4), 0.5, 0.0, ["a", "b"], True, (5, 3), {"name": "folder"}, {})
    for shard, rows in zip(manifest.shards, (2, 1), strict=True):
        tensors = {kind: torch.rand(rows, 2, 4, 4) for kind in TENSORS[:4]}
        save_file(
            {**tensors, "label": torch.zeros(rows, dtype=torch.int64), "text": torch.rand(rows, 5, 3)}, tmp_path / shard
        )
    save_file({"text": torch.rand(5, 3)}, tmp_path / EMPTY_TEXT)

    def seal() -> None:
        manifest.sha256.update({file.name: sha256(file) for file in tmp_path.glob("*.safetensors")})
        manifest.write(tmp_path)

    seal()
    assert [Latents(str(tmp_path)).image(index).shape for index in range(3)] == [(2, 4, 4)] * 3
    file, tensor = (tmp_path / EMPTY_TEXT, "text") if name == "empty text" else (tmp_path / manifest.shards[0], name)
    tensors = load_file(file)
    changed = OTHERWISE[how](tensors.pop(tensor))
    save_file(tensors if changed is None else tensors | {tensor: changed}, file)
    seal()
    with pytest.raises(ValueError, match=rf"{file.name} does not hold what manifest\.json says: its tensor '{tensor}'"):
        Latents(str(tmp_path))
