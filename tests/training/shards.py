"""Small data sets of known images in each format of shards: image i is of the one shade i and has the class i % 3."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ["ant", "bee", "cow"]


def png(shade: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """An image of one shade, 0 to 255."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def shades(images: torch.Tensor) -> list[int]:
    """The shade of each image of a batch, by its first pixel."""
    return [round((float(image.flatten()[0]) + 1) * 127.5) for image in images]


def write_shards(folder: Path, kind: str, *, count: int = 24, shards: int = 4, broken: tuple[int, ...] = ()) -> str:
    """`count` images in as many files of the kind parquet, arrow, tar or tar.gz; what is broken is cut short."""
    images = [png(i)[:40] if i in broken else png(i) for i in range(count)]
    parts = np.array_split(np.arange(count), shards)
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("tar", "tar.gz"):
        for number, part in enumerate(parts):
            rows = [{"png": images[i], "cls": str(i % 3).encode()} for i in part]
            write_tar(folder / f"{number:04d}.{kind}", {f"{i:06d}": row for i, row in zip(part, rows, strict=True)})
        return str(folder)
    for number, part in enumerate(parts):
        data = table([images[i] for i in part], [int(i) % 3 for i in part])
        file = folder / f"train-{number:04d}"
        if kind == "parquet":
            data.to_parquet(file.with_suffix(".parquet"))
        else:  # what save_to_disk writes are Arrow files
            data.save_to_disk(file)
            (file / "data-00000-of-00001.arrow").rename(file.with_suffix(".arrow"))
    return str(folder / "*.arrow") if kind == "arrow" else str(folder)


def table(images: list[bytes], labels: list[Any], names: list[str] | None = CLASSES, *, text: bool = False) -> Any:
    """A `datasets.Dataset` of encoded images and labels, which are numbers or texts."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=names) if names else datasets.Value("string" if text else "int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def write_tar(file: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A WebDataset shard of {key: {ending: contents}}."""
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as shard:
        for key, endings in samples.items():
            for ending, contents in endings.items():
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(contents)
                shard.addfile(entry, io.BytesIO(contents))
