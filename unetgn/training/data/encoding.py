"""Writes a cache of latents: encodes images and captions shard by shard; a shard is whole or not there at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from unetgn.training.data.autoencoder import Autoencoder
from unetgn.training.data.images import Images
from unetgn.training.data.latents import EMPTY_TEXT, Manifest
from unetgn.training.data.samples import BatchReader, load_batches
from unetgn.training.data.text import TextEncoder
from unetgn.training.errors import DataError, reason
from unetgn.training.files import sha256, writing


class Pictures(Dataset[dict[str, Any]]):
    """Reads some of the images, by their place in `indices`, with their class and maybe a caption."""

    def __init__(self, images: Images, indices: np.ndarray, captions: list[str] | None) -> None:
        self.images, self.indices, self.captions = images, indices, captions

    def __getitem__(self, place: int) -> dict[str, Any]:
        index = int(self.indices[place])
        try:
            pixels = torch.from_numpy(np.ascontiguousarray(self.images.image(index)))
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            raise DataError(f"{self.images.name(index)} cannot be read any more: {reason(error)}") from error
        picture = {"pixels": pixels, "label": torch.tensor(self.images.label(index))}
        return picture if self.captions is None else picture | {"caption": self.captions[place]}


class Cache:
    """Makes a cache in `folder`."""

    def __init__(self, folder: Path, autoencoder: Autoencoder, text_encoder: TextEncoder | None) -> None:
        self.folder, self.autoencoder, self.text_encoder = folder, autoencoder, text_encoder

    def write_companions(self, manifest: Manifest) -> Manifest:
        """Write the networks and the empty caption's embedding, so that training needs nothing but the folder."""
        manifest = self._write_folder(manifest, "autoencoder", self.autoencoder.model.save_pretrained)
        if self.text_encoder is not None:
            manifest = self._write_folder(manifest, "text_encoder", self.text_encoder.model.save_pretrained)
            manifest = self._write_folder(manifest, "tokenizer", self.text_encoder.tokenizer.save_pretrained)
            if EMPTY_TEXT not in manifest.sha256:
                manifest = self._write_tensors(manifest, EMPTY_TEXT, {"text": self.text_encoder.encode([""])[0].cpu()})
        return manifest

    def write_shards(self, manifest: Manifest, pictures: Pictures, batch_size: int, num_workers: int) -> Manifest:
        """Write the missing shards in order. Images are decoded in `num_workers` processes beside this one."""
        size, done = manifest.shard_size, set(manifest.sha256)
        with tqdm(total=manifest.images, unit="image", disable=None, dynamic_ncols=True) as bar:
            for number, name in enumerate(manifest.shards):
                places = range(number * size, min(manifest.images, (number + 1) * size))
                if name not in done:
                    batches = [list(places[start : start + batch_size]) for start in range(0, len(places), batch_size)]
                    loaded = load_batches(BatchReader(pictures), batches, num_workers=num_workers)
                    rows = [self._encode(batch, flip=manifest.flipped) for batch in loaded]
                    tensors = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
                    manifest = self._write_tensors(manifest, name, tensors)
                bar.update(len(places))
        return manifest

    def _encode(self, batch: dict[str, Any], *, flip: bool) -> dict[str, Tensor]:
        """Encode a batch: its rows of each tensor of a shard."""
        rows = {"label": batch["label"]}
        rows["mean"], rows["std"] = self.autoencoder.encode(batch["pixels"])
        if flip:
            rows["mean_flipped"], rows["std_flipped"] = self.autoencoder.encode(batch["pixels"].flip(-1))
        if self.text_encoder is not None:
            rows["text"] = self.text_encoder.encode(batch["caption"])
        return {key: value.cpu() for key, value in rows.items()}

    def _write_tensors(self, manifest: Manifest, name: str, tensors: dict[str, Tensor]) -> Manifest:
        """Write a file whole or not at all, and then the manifest that knows it."""
        with writing(self.folder / name) as unfinished:
            unfinished.write_bytes(save({key: value.contiguous() for key, value in tensors.items()}))
        manifest = replace(manifest, sha256=manifest.sha256 | {name: sha256(self.folder / name)})
        manifest.write(self.folder)
        return manifest

    def _write_folder(self, manifest: Manifest, name: str, save: Callable[[Path], object]) -> Manifest:
        """Write a network's folder whole or not at all, and then the manifest that knows its files; once."""
        if any(known.startswith(f"{name}/") for known in manifest.sha256):
            return manifest
        with writing(self.folder / name) as unfinished:
            save(unfinished)
        sums = {f"{name}/{file.name}": sha256(file) for file in sorted((self.folder / name).iterdir())}
        manifest = replace(manifest, sha256=manifest.sha256 | sums)
        manifest.write(self.folder)
        return manifest
