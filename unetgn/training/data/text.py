"""Reads captions, and embeds them with the text encoder of Stable Diffusion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unetgn import UNetConfig
from unetgn.json_files import read_object
from unetgn.messages import path_text, said, short
from unetgn.pickles import refuse_pickles
from unetgn.programs.paths import lacking
from unetgn.training.data.folders import file_size
from unetgn.training.data.hugging_face import HuggingFaceImages, open_table
from unetgn.training.data.images import ImageFolder, Images

logger = logging.getLogger(__name__)

LONGEST = 2**20  # bytes of a caption
BLOCK = 1024  # captions that are read into tokens at a time


class TextEncoder:
    """Runs CLIP's text encoder and tokenizer (Radford et al. 2021, arXiv 2103.00020) out of a diffusers folder.

    Raises ValueError where the folder lacks `text_encoder/` or `tokenizer/`, or they are of another kind.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ModuleNotFoundError as error:
            if error.name != "transformers":  # one of those that it needs: its own message says which
                raise
            raise ValueError("text embeddings need the package transformers: pip install transformers") from error
        config = folder / "text_encoder" / "config.json"
        kind = read_object(config).get("model_type") if config.is_file() else None
        if kind != "clip_text_model" or not (folder / "tokenizer").is_dir():
            raise ValueError(
                f"{lacking(folder, 'CLIP text encoder')}: give the folder of a Stable Diffusion pipeline, which has "
                "text_encoder/ and tokenizer/, or one that training/cache_latents.py --text-encoder wrote"
            )
        if (adapter := folder / "text_encoder" / "adapter_config.json").exists():  # transformers would load it, too
            raise ValueError(
                f"{adapter} is of an adapter: merge it into the text encoder (merge_and_unload of PEFT) and save that"
            )
        refuse_pickles(folder / "text_encoder", stem="model")
        try:
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            model: Any = CLIPTextModel.from_pretrained(
                folder / "text_encoder", use_safetensors=True, local_files_only=True
            )
        except OSError as error:
            raise ValueError(f"the text encoder in {folder} cannot be read: {said(error)}") from error
        self.tokenizer_files = sorted(file for file in (folder / "tokenizer").iterdir() if file.is_file())
        self.model: Any = model.float().eval().requires_grad_(False)
        self.tokens = min(self.tokenizer.model_max_length, model.config.max_position_embeddings)
        self.width: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as StableDiffusionPipeline.encode_prompt does: (N, tokens, width) float32, on the device.

        A longer caption is cut off.
        """
        padding = {"padding": "max_length", "max_length": self.tokens, "truncation": True}
        ids = self.tokenizer(list(captions), **padding, return_tensors="pt").input_ids
        return self.model(ids.to(next(self.model.parameters()).device))[0]

    def too_long(self, captions: Sequence[str]) -> int:
        """Count the captions that are cut off."""
        parts = (list(captions[start : start + BLOCK]) for start in range(0, len(captions), BLOCK))
        return sum(len(ids) > self.tokens for part in parts for ids in self.tokenizer(part).input_ids)


def read_captions(images: Images, indices: Sequence[int], column: str) -> list[str]:
    """Read the caption of each of the images: NAME.txt beside the file, or the data set's column.

    Raises ValueError where one is missing, naming it.
    """
    if isinstance(images, ImageFolder):
        if not images.root.is_dir():
            raise ValueError(f"captions are read beside image files, and {images.root} is an archive: unpack it")
        return read_files([(images.root / images.files[index]).with_suffix(".txt") for index in indices])
    if isinstance(images, HuggingFaceImages):
        return read_column(images.path, indices, column)
    raise ValueError("these images have no captions: use data.name folder or datasets, or leave --text-encoder out")


def read_files(files: Sequence[Path]) -> list[str]:
    """Read captions from files, without the spaces around them."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images have no caption; the first would be {path_text(missing[0])}: write "
            "it (an empty file is the empty caption), or leave --text-encoder out"
        )
    return [read_text(file).strip() for file in files]


def read_text(file: Path) -> str:
    """Read a file in UTF-8. Raises ValueError, naming it, where it is in another encoding."""
    try:
        if file_size(file) > LONGEST:
            raise ValueError(
                f"the caption {path_text(file)} has more than {LONGEST:,} bytes, which is no caption: replace it"
            )
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the caption {path_text(file)} is not in UTF-8 ({said(error)}): save it in that encoding"
        ) from error


def read_column(path: str, indices: Sequence[int], column: str) -> list[str]:
    """Read a data set's column of captions, at these rows."""
    table, _ = open_table(path)
    if column not in table.column_names:
        raise ValueError(f"--caption-column {column!r} is not in {path!r}; its columns: {short(table.column_names)}")
    if "string" not in str(getattr(table.features[column], "dtype", "")):  # what is something else may be decoded
        raise ValueError(f"--caption-column {column!r} of {path!r} holds no texts but {short(table.features[column])}")
    captions = list(table[column])
    wrong = [index for index in indices if not isinstance(captions[index], str)]
    if wrong:
        raise ValueError(
            f"--caption-column {column!r} of {path!r} has no text in {len(wrong)} of {len(indices)} rows, the first "
            f"being row {wrong[0]}, {short(captions[wrong[0]])}: mend it (an empty text is the empty caption)"
        )
    return [captions[index].strip() for index in indices]


def check_texts(model: UNetConfig, text_width: int | None) -> None:
    """Raise ValueError where the network reads other texts than the images have; None: they have none."""
    wanted = context_dims(model)
    if text_width is None and wanted:
        raise ValueError(
            f"model.transformer.context_dim is {sorted(wanted)[0]}, but these latents were cached without captions: "
            "cache them with training/cache_latents.py --text-encoder, or set model.transformer to null"
        )
    if text_width is not None and wanted != {text_width}:
        read = f"reads texts {sorted(wanted)} wide" if wanted else "reads no text"
        raise ValueError(
            f"these latents were cached with captions {text_width} wide, but the network {read}: set "
            f"model.transformer.context_dim to {text_width}, or cache them with another --text-encoder, or without"
        )


def context_dims(model: UNetConfig) -> set[int]:
    """Return the widths of the texts that the network's levels read; empty where it reads none."""
    dims = model.context_dims
    return set() if dims is None else {dims} if isinstance(dims, int) else set(dims)
