"""JSON that may be anybody's is an error of one line, in bounded memory, whoever reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unetgn.json_files import DEEPEST, SPARSE, parse, read_object
from unetgn.pickles import refuse_pickles
from unetgn.sampling import classifier, features
from unetgn.sampling.folder import SamplingError, read_request
from unetgn.training.cache_latents import begin
from unetgn.training.data.autoencoder import is_autoencoder
from unetgn.training.data.hugging_face import saved_files
from unetgn.training.data.latents import Manifest, read_manifest
from unetgn.training.data.report import read_class_names
from unetgn.training.data.tars import read_json
from unetgn.training.errors import CheckpointError, ConfigError
from unetgn.training.power_averages import Snapshot

DEPTHS = (DEEPEST + 1, 200, 500, 980, 5000, 100_000)
TEXTS: dict[str, str] = {
    **{f"lists {depth} deep": "[" * depth + "]" * depth for depth in DEPTHS},
    **{f"objects {depth} deep": '{"a": ' * depth + "1" + "}" * depth for depth in DEPTHS},
    "many lists": "[" + "[]," * 2**22 + "[]]",
    "many objects": "[" + "{}," * 2**22 + "{}]",
    "a number without end": "9" * 100_000,
    "a number beyond floats": "1" + "0" * 400,
}
CACHE = Manifest(6, 4, (2, 4, 4), 0.5, 0.0, None, False, None, {"data.path": "a"}, {})


def in_manifest(folder: Path, value: str) -> Callable[[], object]:
    """Read a latents manifest whose `source` holds the value, as a second start does."""
    CACHE.write(folder)
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"data.path": "a"', f'"data.path": {value}'))
    return lambda: begin(folder, CACHE)


def in_metadata(key: str, read: Callable[[Path], object]) -> Callable[[Path, str], Callable[[], object]]:
    """Read a safetensors file whose metadata hold the value."""

    def write(folder: Path, value: str) -> Callable[[], object]:
        file = folder / "a.safetensors"
        save_file({"features": torch.zeros(1, 1)}, file, metadata={key: f'{{"step": {value}, "widths": {value}}}'})
        return lambda: read(file)

    return write


def in_file(name: str, key: str, read: Callable[[Path], object]) -> Callable[[Path, str], Callable[[], object]]:
    """Read a JSON file of this name whose key holds the value."""

    def write(folder: Path, value: str) -> Callable[[], object]:
        (folder / name).write_text(f'{{"{key}": {value}}}')
        return lambda: read(folder)

    return write


READERS: dict[str, Callable[[Path, str], Callable[[], Any]]] = {
    "an object": in_file("a.json", "a", lambda folder: read_object(folder / "a.json")),
    "the cache of latents": in_manifest,
    "latents": in_file("manifest.json", "images", read_manifest),
    "save_to_disk": in_file("state.json", "_data_files", saved_files),
    "a report": in_file("data.json", "class_names", read_class_names),
    "a request": in_file("request.json", "subjects", lambda folder: read_request(folder / "request.json")),
    "an autoencoder": in_file("config.json", "_class_name", is_autoencoder),
    "an index": in_file("diffusion_pytorch_model.safetensors.index.json", "weight_map", refuse_pickles),
    "an averages' snapshot": in_metadata("power_averages", Snapshot.read),
    "features": in_metadata(features.KEY, lambda file: features.read_kept(file, "a", 1)),
    "a classifier": in_metadata(classifier.KEY, classifier.load),
    "a sample of a tar": lambda folder, value: lambda: read_json({"json": f'{{"label": {value}}}'.encode()}),
}
PROMISED = (ValueError, CheckpointError, SamplingError, ConfigError)


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_json_gives_an_answer_or_an_error_of_one_line(reader: str, tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        read = READERS[reader](tmp_path, text)
        try:
            answer = read()
        except PROMISED as caught:
            said = str(caught)
            assert "\n" not in said, name
            assert len(said) < 5000, name
        else:  # what is not looked at, or computed anew
            assert answer in (None, False) or isinstance(answer, (dict, np.ndarray)), name
            assert "deep" not in name or answer in (None, False), name


@pytest.mark.parametrize("opening", ["[", "{"])
def test_so_many_objects_and_lists_as_have_room_are_read(opening: str) -> None:
    one = {"[": b"[    10000000000]", "{": b'{ "a":123456789 }'}[opening]
    assert len(one) > SPARSE
    text = b"[" + b",".join([one] * 1000) + b"]"
    assert len(parse(text, "it", limit=len(text))) == 1000
    with pytest.raises(ValueError, match=r"it holds 1001 objects and lists; at most 250 are read"):
        parse(b"[" + b"[]," * 999 + b"[]]", "it", limit=4000)
    with pytest.raises(ValueError, match="it has more than 99 bytes"):
        parse(text, "it", limit=99)
