"""Names that could be taken for patterns, addresses or home folders, at every door that takes a path."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.shards import png, shades, table, write_tar
from unetgn.training.cache_latents import parse_arguments as cache_arguments
from unetgn.training.config_files import load_config
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.samples import StepBatches
from unetgn.training.data.stream import ShardStream
from unetgn.training.run_directory import RunDirectory
from unetgn.training.train import parse_arguments as train_arguments

pytest.importorskip("datasets")
# Beside each the name that it would be as a pattern.
NAMES = {"run[12]": "run1", "a::b": "b", "a*b": "axb", "what?": "whats", "[!a]": "b", "**": "c", "{x,y}": "x",
         "100%": "100", "%20": " ", "#1": "1", "$HOME": "home", "a b": "ab", "x.parquet": "y", "é": "e"}  # fmt: skip


def write_folder(folder: Path, shade: int) -> None:
    folder.mkdir()
    (folder / "a.png").write_bytes(png(shade))


def write_parquet(folder: Path, shade: int) -> None:
    folder.mkdir()
    table([png(shade)] * 2, [0, 1]).to_parquet(folder / "a.parquet")


def write_saved(folder: Path, shade: int) -> None:
    table([png(shade)] * 2, [0, 1]).save_to_disk(folder)


def write_arrow(folder: Path, shade: int) -> None:
    write_saved(folder, shade)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).unlink()


def write_tars(folder: Path, shade: int) -> None:
    folder.mkdir()
    write_tar(folder / "a.tar", {f"{i}": {"png": png(shade)} for i in range(2)})


DOORS: dict[str, tuple[str, Callable[[Path, int], None], str]] = {
    "folder": ("folder", write_folder, ""),
    "parquet by number": ("datasets", write_parquet, ""),
    "parquet file by number": ("datasets", write_parquet, "a.parquet"),
    "parquet glob by number": ("datasets", write_parquet, "*.parquet"),
    "saved by number": ("datasets", write_saved, ""),
    "parquet in sequence": ("stream", write_parquet, ""),
    "parquet glob in sequence": ("stream", write_parquet, "?.parquet"),
    "arrow in sequence": ("stream", write_arrow, ""),
    "saved in sequence": ("stream", write_saved, ""),
    "tar in sequence": ("stream", write_tars, ""),
    "tar file in sequence": ("stream", write_tars, "a.tar"),
    "tar glob in sequence": ("stream", write_tars, "*.t[a]r"),
}


def shade_of(config: DataConfig) -> int:
    """The shade of the first image."""
    if config.name != "stream":
        image = open_images(config, 3).image(0)
        return round((float(image.flatten()[0]) + 1) * 127.5)
    stream = ShardStream(config, 3, None, 0)
    (batch,) = stream.loader(StepBatches(0, 1, 1, 1, 0, 1), num_workers=0, pin_memory=False)
    return shades(batch["image"])[0]


@pytest.mark.parametrize("door", DOORS)
def test_what_is_there_by_the_name_that_is_given_is_taken(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name, write, rest = DOORS[door]
    for number, (asked, other) in enumerate(NAMES.items()):
        (tmp_path / f"{number}").mkdir()
        for folder, shade in ((asked, 7), (other, 200)):
            write(tmp_path / "plain", shade)  # `datasets` writes some of these names elsewhere
            (tmp_path / "plain").rename(tmp_path / f"{number}" / folder)
        path = str(tmp_path / f"{number}" / asked)
        if name == "datasets" and "::" in asked:
            with pytest.raises(ValueError, match=r"'::' in its name, .* rename it, or set data\.name=stream"):
                open_images(DataConfig(name=name, path=os.path.join(path, rest) if rest else path), 3)
            continue
        assert shade_of(DataConfig(name=name, path=os.path.join(path, rest) if rest else path)) == 7, asked
        monkeypatch.chdir(tmp_path / f"{number}")
        assert shade_of(DataConfig(name=name, path=os.path.join(asked, rest) if rest else asked)) == 7, asked
        if name == "datasets" and number > 4:  # by number each is copied into a cache: some will do
            break


def test_a_pattern_is_still_one_where_nothing_has_its_name(tmp_path: Path) -> None:
    for shade, folder in enumerate(("run1", "run2", "run3")):
        write_tars(tmp_path / folder, shade)
    stream = ShardStream(DataConfig(name="stream", path=str(tmp_path / "run[12]" / "*.tar")), 3, None, 0)
    assert [Path(file).parent.name for file in stream.shards.files] == ["run1", "run2"]
    folders = ShardStream(DataConfig(name="stream", path=str(tmp_path / "run[23]")), 3, None, 0)
    assert [Path(file).parent.name for file in folders.shards.files] == ["run2", "run3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_have_any_name(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / name)
    run.lock()
    run.write_status("running", 0)
    (run.checkpoints / "step-000001").mkdir(parents=True)
    assert run.holds_a_run()


def test_a_path_below_the_home_folder_is_found_in_every_key_and_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "pictures", 7)
    assert shade_of(DataConfig(name="folder", path="~/pictures")) == 7
    (tmp_path / "a.yaml").write_text("train: {initial_weights: ~/weights}\ndata: {name: folder, path: ~/pictures}\n")
    config = load_config(Path("~/a.yaml").expanduser(), ["data.image_size=8"])
    assert config.train.initial_weights == str(tmp_path / "weights")
    assert config.data.path == str(tmp_path / "pictures")
    from unetgn.sampling.sample import parse_arguments as sample_arguments

    train = train_arguments(["--config", "~/a.yaml", "--output", "~/run"])
    cache = cache_arguments(["--autoencoder", "~/vae", "--text-encoder", "~/text", "--out", "~/out"])
    sample = sample_arguments(["--checkpoint", "~/run", "--seeds", "0", "--out", "~/out", "--autoencoder", "~/vae",
                               "--text-encoder", "~/text"])  # fmt: skip
    found = [train.output, cache.autoencoder, cache.text_encoder, cache.out, sample.checkpoint, sample.out,
             sample.autoencoder, sample.text_encoder]  # fmt: skip
    assert all(path.parent == tmp_path for path in found)
    from unetgn.training.config_yaml import find_config

    assert find_config(train.config) == tmp_path / "a.yaml"


def test_a_grey_ramp_saved_under_a_pattern_is_the_one_that_is_read(tmp_path: Path) -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (tmp_path / "[0-9]").mkdir()
    Image.fromarray(ramp).save(tmp_path / "[0-9]" / "[a].png")
    image = open_images(DataConfig(name="folder", path=str(tmp_path / "[0-9]")), 1).image(0)
    assert np.array_equal(((image[0] + 1) * 127.5).round(), ramp)
