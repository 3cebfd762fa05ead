"""Looks for pickles wherever weights come from: they run any code when read. Says how to convert them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from unetgn.json_files import read_object
from unetgn.messages import plain

ENDINGS = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
INDEX_LIMIT = 2**26  # bytes: a hundred for each tensor
NAMES = ("diffusion_pytorch_model", "pytorch_model", "model")  # diffusers' and transformers', without ending
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, before it wrote zip archives
LOOKED_AT = 2**24  # bytes of the pickle in an archive of torch.save; Stable Diffusion's has a fiftieth
ADVICE = """A pickle runs any code, so none is opened here. Where you trust it, convert it once, and give {converted!r}:
    import torch; from safetensors.torch import save_file
    states = [torch.load(open(name, "rb"), map_location="cpu", weights_only=True) for name in {pickles!r}]
    state = {{k: v for state in states for k, v in state.get("state_dict", state).items()}}
    save_file({{k: v.clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}}, {converted!r})"""

OF_OBJECTS = """A pickle runs any code, so none is opened here, and this one has to: it holds {objects}.
Where you trust it, convert it once, where the code that wrote it can be imported (for EDM's files: in a checkout of
NVlabs/edm), and give {converted!r}:
    import pickle, torch; from safetensors.torch import save_file
    found = {read}
    found = found.get("ema", found.get("state_dict", found)) if isinstance(found, dict) else found
    state = found.state_dict() if isinstance(found, torch.nn.Module) else found
    save_file({{k: v.clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}}, {converted!r})"""


def advice(pickles: Sequence[Path], converted: Path) -> str:
    """Write the lines that make one safetensors file of pickles."""
    if len(pickles) == 1:
        (file,) = pickles
        if is_of_pickle_module(file):
            read = f'pickle.load(open({str(file)!r}, "rb"))'
            return OF_OBJECTS.format(objects="whole objects", read=read, converted=str(converted))
        if objects := objects_in(file):
            read = f'torch.load(open({str(file)!r}, "rb"), map_location="cpu", weights_only=False)'
            return OF_OBJECTS.format(objects=plain(", ".join(objects)), read=read, converted=str(converted))
    return ADVICE.format(pickles=[str(file) for file in pickles], converted=str(converted))


def is_pickle(file: Path) -> bool:
    """Return True where a file begins as torch.save writes them: a zip archive now, a pickle in older versions.

    safetensors begin with the length of their header, 8 bytes, of which the upper four are 0.
    """
    with file.open("rb") as opened:
        start = opened.read(8)
    return start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[4:] != bytes(4)


def is_of_pickle_module(file: Path) -> bool:
    """Return True for what Python's own `pickle` wrote, as EDM's networks are; False for torch.save's."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LEGACY))
    except OSError:
        return False
    return start.startswith(b"\x80") and start != LEGACY and is_pickle(file)


def objects_in(file: Path) -> list[str]:
    """Name what a file of torch.save holds that `weights_only=True` refuses; its pickle is scanned, not opened."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        with zipfile.ZipFile(file) as archive:
            if any(part.file_size > LOOKED_AT for part in archive.infolist() if part.filename.endswith("data.pkl")):
                return []
        return sorted(get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # whatever is wrong with it: the lines for tensors alone are said then
        return []


def refuse_pickle(file: Path) -> None:
    """Raise ValueError for a file that is named as pickles are, or is one, with lines that convert it."""
    if file.suffix.lower() in ENDINGS:
        raise ValueError(f"{file} is a pickle. {advice([file], file.with_suffix('.safetensors'))}")
    if file.is_file() and is_pickle(file):
        converted = file.with_name(f"{file.stem}.converted.safetensors")
        raise ValueError(f"{file} is not a safetensors file, but a pickle. {advice([file], converted)}")


def refuse_pickles(folder: Path, *, variant: str | None = None, stem: str = "diffusion_pytorch_model") -> None:
    """Raise ValueError where the weights in a folder that `save_pretrained` wrote are pickles.

    They are where there is no safetensors file of the variant but a pickle, where an index of safetensors files names
    pickles, and where a pickle is called safetensors. In the first two cases diffusers and transformers would read it.
    stem: the name of such files without ending, "model" with transformers.
    """
    of_variant = f".{variant}" if variant else ""
    single, index = folder / f"{stem}{of_variant}.safetensors", folder / f"{stem}.safetensors.index{of_variant}.json"
    if index.is_file():
        pickles = [
            file for file in shards(index) if file.suffix != ".safetensors" or (file.is_file() and is_pickle(file))
        ]
        if pickles:
            raise ValueError(
                f"{index} names {pickles[0].name}, which is a pickle or may be one, and none is opened here: have it "
                "saved again where it comes from, with save_pretrained, whose files are safetensors"
            )
    if single.is_file() and is_pickle(single):
        raise ValueError(f"{single} is not a safetensors file, but a pickle. {advice([single], single)}")
    if index.is_file() or single.is_file():
        return
    variants, part = re.escape(of_variant), r"-\d+-of-\d+"
    name = re.compile(rf"({'|'.join(NAMES)})({variants}({part})?|{part}{variants})")
    pickles = [
        file for file in sorted(folder.glob("*")) if file.suffix.lower() in ENDINGS and name.fullmatch(file.stem)
    ]
    if pickles:
        what = "is a pickle" if len(pickles) == 1 else f"and {len(pickles) - 1} more are pickles"
        raise ValueError(f"{pickles[0]} {what}. {advice(pickles, single)}")


def shards(index: Path) -> list[Path]:
    """List the files that an index names. Raises ValueError where these are not files of its own folder."""
    files = read_object(index, limit=INDEX_LIMIT).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if not names or any(name != Path(name).name for name in names):
        raise ValueError(f"{index} has no weight_map to files beside it")
    return [index.with_name(name) for name in names]
