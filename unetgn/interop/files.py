"""Reads checkpoints: safetensors files only, with the prefixes and copies that published files have."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "model.")
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".bin")
ADVICE = """A pickle runs any code, so none is opened here. Where you trust it, convert it once, and give {converted!r}:
    import torch; from safetensors.torch import save_file
    state = torch.load(open({pickle!r}, "rb"), map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    save_file({{k: v.clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}}, {converted!r})"""


def read_checkpoint(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the U-Net's tensors of a safetensors file, without the prefix `model.diffusion_model.` or `model.`.

    Where keys have such a prefix, those without it (text encoder, autoencoder) are left out. `ema` reads the averaged
    copies that CompVis keeps under `model_ema.`, in names without dots.
    Raises ValueError for a pickle, a file that is no safetensors, or `ema` where there are no such copies;
    FileNotFoundError where there is no file.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle. {advice(path, path.with_suffix('.safetensors'))}")
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path} is no file; give a safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        if is_pickle(path):
            converted = path.with_name(f"{path.stem}.converted.safetensors")
            raise ValueError(f"{path} is not a safetensors file, but a pickle. {advice(path, converted)}") from error
        raise ValueError(
            f"{path} is not a safetensors file, or damaged ({error}): copy or download it again, and compare its size"
        ) from error
    for prefix in PREFIXES:
        inner = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if inner:
            return _averaged(inner, tensors, path) if ema else inner
    if ema:
        raise ValueError(f"{path} has no averaged copies under 'model_ema.'; leave ema out")
    return tensors


def is_pickle(path: Path) -> bool:
    """Return True where a file begins as torch.save writes them: a zip archive now, a pickle in older versions."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def advice(pickle: Path, converted: Path) -> str:
    """Write the lines that make a safetensors file of a pickle."""
    return ADVICE.format(pickle=str(pickle), converted=str(converted))


def _averaged(inner: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    copies = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in inner}
    missing = [copy for copy in copies.values() if copy not in tensors]
    if missing:
        raise ValueError(f"{path} has no averaged copy {missing[0]!r} (of {len(missing)} missing); leave ema out")
    return {key: tensors[copy] for key, copy in copies.items()}
