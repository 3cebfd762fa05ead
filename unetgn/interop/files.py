"""Reads checkpoints: safetensors files only, with the prefixes and copies that published files have."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unetgn.pickles import refuse_pickle

PREFIXES = ("model.diffusion_model.", "model.")


def read_checkpoint(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the U-Net's tensors of a safetensors file, without the prefix `model.diffusion_model.` or `model.`.

    Where keys have such a prefix, those without it (text encoder, autoencoder) are left out. `ema` reads the averaged
    copies that CompVis keeps under `model_ema.`, in names without dots.
    Raises ValueError for a pickle, a file that is no safetensors, or `ema` where there are no such copies;
    FileNotFoundError where there is no file.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path} is no file; give a safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or damaged ({str(error)[:200]}): copy or download it again, and "
            "compare its size"
        ) from error
    for prefix in PREFIXES:
        inner = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if inner:
            return _averaged(inner, tensors, path) if ema else inner
    if ema:
        raise ValueError(f"{path} has no averaged copies under 'model_ema.'; leave ema out")
    return tensors


def _averaged(inner: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    copies = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in inner}
    missing = [copy for copy in copies.values() if copy not in tensors]
    if missing:
        raise ValueError(f"{path} has no averaged copy {missing[0]!r} (of {len(missing)} missing); leave ema out")
    return {key: tensors[copy] for key, copy in copies.items()}
