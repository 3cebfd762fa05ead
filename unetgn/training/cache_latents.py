r"""Encode images once, to train on their latents:

    python training/cache_latents.py --autoencoder FOLDER --out DIR \
        data.name=folder data.path=IMAGES data.image_size=256

The images are named by the keys data.* of training configurations. What was stopped goes on after the last whole shard
when the same line is started again. To train on DIR: data.name=latents data.path=DIR, and data.image_size as printed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unetgn.messages import short
from unetgn.programs.last_words import last_words, say
from unetgn.programs.paths import folder_to_write, user_path
from unetgn.training.config_files import load_data_config
from unetgn.training.data.autoencoder import Autoencoder, digest, load_autoencoder
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.encoding import Cache, Pictures
from unetgn.training.data.images import Images, fingerprint
from unetgn.training.data.latents import MANIFEST, Manifest, read_manifest
from unetgn.training.data.pixels import size_text
from unetgn.training.data.report import report_images
from unetgn.training.data.text import TextEncoder, read_captions
from unetgn.training.errors import ConfigError, DataError, RunDirectoryError
from unetgn.training.files import TEMPORARY, sha256
from unetgn.training.run_directory import RunDirectory

logger = logging.getLogger("unetgn.training")

KEYS = ("name", "path", "image_size", "image_column", "label_column")  # of data.*: they decide what is encoded
# Of the keys data.*: those that concern training on the latents later, not what is encoded.
LATER = {
    "held_out": "give it when training",
    "random_flip": "give --flip here, and data.random_flip when training",
    "buckets": "cached latents have one size",
    "random_crop": "an image is encoded once, cropped centrally",
}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="cache_latents.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", type=user_path, required=True, metavar="FOLDER",
                        help="diffusers' AutoencoderKL, or a pipeline that has one")  # fmt: skip
    parser.add_argument("--out", type=folder_to_write, required=True, help="folder of the cache")
    parser.add_argument("--flip", action="store_true", help="encode the mirrored images too, for data.random_flip")
    parser.add_argument("--text-encoder", type=user_path, metavar="FOLDER",
                        help="a Stable Diffusion pipeline: encode captions too, with its text_encoder/ and tokenizer/. "
                        "Captions are NAME.txt beside NAME.png (data.name folder), or a column (datasets)")  # fmt: skip
    parser.add_argument("--caption-column", default="text", metavar="NAME", help="column of captions (default: text)")
    parser.add_argument("--shard-size", type=int, default=1024, help="images in a shard (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=16, help="images that are encoded at a time (default: 16)")
    parser.add_argument("keys", nargs="*", metavar="data.key=value", help="which images")
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options of this script; what is left over is `data.key=value`."""
    parser = make_parser()
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    parsed.keys = unknown + parsed.keys  # a mistyped option is named before what follows it
    for name in ("shard_size", "batch_size"):
        if getattr(parsed, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(parsed, name)} is too small; at least 1")
    return parsed


@dataclass(frozen=True)
class Source:
    """Holds what is encoded, and what it is encoded with."""

    data: DataConfig
    images: Images
    indices: np.ndarray  # of the images that can be read
    captions: list[str] | None
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None


def open_source(arguments: argparse.Namespace) -> Source:
    """Read and check everything. Raises ConfigError."""
    data = load_data_config(arguments.keys)
    check_data(data)
    try:
        autoencoder = load_autoencoder(arguments.autoencoder)
        autoencoder.latent_shape(data.size)
        text_encoder = None if arguments.text_encoder is None else TextEncoder(arguments.text_encoder)
        images = open_images(data, autoencoder.channels)
        indices = images.usable()
        captions = None if text_encoder is None else read_captions(images, indices.tolist(), arguments.caption_column)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if text_encoder is not None and captions is not None and (cut := text_encoder.too_long(captions)):
        logger.warning("%d of %d captions are cut off after %d tokens", cut, len(captions), text_encoder.tokens)
    return Source(data, images, indices, captions, autoencoder, text_encoder)


def run(arguments: argparse.Namespace) -> None:
    """Go from the parsed arguments to the finished cache."""
    source = open_source(arguments)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for network in (source.autoencoder, source.text_encoder):
        if network is not None:
            network.model.to(device)
    folder = RunDirectory(arguments.out)  # held for as long as this name stands for it
    folder.lock()
    manifest = begin(folder.path, describe(source, flipped=arguments.flip, shard_size=arguments.shard_size))
    cache = Cache(folder.path, source.autoencoder, source.text_encoder)
    manifest = cache.write_companions(manifest)
    pictures = Pictures(source.images, source.indices, source.captions)
    manifest = cache.write_shards(manifest, pictures, arguments.batch_size, source.data.num_workers)
    channels, height, width = manifest.shape
    highest = max(source.images.label(int(index)) for index in source.indices)
    print(report_images(source.data, source.images, source.indices, np.array([], dtype=int), highest + 1 or None))
    classes = "" if manifest.class_names is None else f" of {len(manifest.class_names)} classes"
    print(
        f"{manifest.images} images{classes} in {arguments.out}; to train on them: data.name=latents "
        f"data.path={arguments.out} data.image_size={size_text((height, width))} "
        f"model.in_channels={channels} model.out_channels={channels}"
    )


def check_data(data: DataConfig) -> None:
    """Raise ConfigError for keys that would be without effect here."""
    if data.name == "latents":
        raise ConfigError("data.name is latents: these are encoded already; name the images")
    for key, remedy in LATER.items():
        if getattr(data, key) != getattr(DataConfig(), key):
            raise ConfigError(f"data.{key} is {getattr(data, key)}, which is not for encoding: {remedy}")


def describe(source: Source, *, flipped: bool, shard_size: int) -> Manifest:
    """Make the manifest of a new cache; everything in it decides what the shards hold."""
    autoencoder, text_encoder, captions = source.autoencoder, source.text_encoder, source.captions
    return Manifest(
        images=len(source.indices),
        shard_size=shard_size,
        shape=autoencoder.latent_shape(source.data.size),
        scaling_factor=autoencoder.scaling_factor,
        shift_factor=autoencoder.shift_factor,
        class_names=source.images.class_names,
        flipped=flipped,
        text_shape=None if text_encoder is None else (text_encoder.tokens, text_encoder.width),
        source={
            **{f"data.{key}": getattr(source.data, key) for key in KEYS},
            **({"data.to_grey": True} if source.data.to_grey else {}),
            "fingerprint of the images": fingerprint(source.images, source.indices),
            "autoencoder": digest(autoencoder.model),
            "text encoder": None if text_encoder is None else digest(text_encoder.model),
            "tokenizer": None if text_encoder is None else {f.name: sha256(f) for f in text_encoder.tokenizer_files},
            "captions": None if captions is None else hashlib.sha256(repr(captions).encode()).hexdigest(),
        },
        sha256={},
    )


def begin(folder: Path, manifest: Manifest) -> Manifest:
    """Return the manifest to go on from: that of what is in the folder, if it is as it should be, or `manifest`.

    Raises ConfigError where the folder holds another cache, or anything else.
    """
    if not (folder / MANIFEST).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith((TEMPORARY, ".lock"))]
        if others:
            raise ConfigError(f"{folder} holds other things ({', '.join(sorted(others)[:3])}): give another --out")
        manifest.write(folder)
        return manifest
    try:
        before = read_manifest(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    was, now = ({**asdict(one), **one.source} for one in (before, manifest))
    differences = [f"{key} was {short(was.get(key))} and is {short(now[key])}" for key in now
                   if key not in ("source", "sha256") and was.get(key) != now[key]]  # fmt: skip
    if differences:
        raise ConfigError(f"{folder} holds another cache: {'; '.join(differences)}. Give another --out")
    damaged = {name.partition("/")[0] for name, known in before.sha256.items() if not whole(folder / name, known)}
    return replace(before, sha256={name: known for name, known in before.sha256.items()
                                   if name.partition("/")[0] not in damaged})  # fmt: skip


def whole(file: Path, known: str) -> bool:
    """Return True where a finished file is still what was written; say so where it is not."""
    if file.is_file() and sha256(file) == known:
        return True
    logger.warning("%s is missing or damaged: it is made anew", file)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 the request cannot be met, 130 Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        run(parse_arguments(arguments))
    except (ConfigError, RunDirectoryError) as error:
        say(f"cache_latents.py: error: {error}")
        return 2
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("cache_latents.py", error)
    except DataError as error:
        say(f"cache_latents.py: {error}; the shards that were written stay")
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        say(f"cache_latents.py: {error}; the shards that were written stay")
        return 1
    return 0
