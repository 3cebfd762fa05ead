"""Reads checkpoints: safetensors files only, with the prefixes and copies that published files have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unetgn.messages import plain, said, short
from unetgn.pickles import refuse_pickle

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def read_checkpoint(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the U-Net's tensors of a safetensors file, without the prefix `model.diffusion_model.` or `model.`.

    So are `module.` and `_orig_mod.` left out, before it or after.

    Where keys have such a prefix, those without it (text encoder, autoencoder) are left out. `ema` reads the averaged
    copies that CompVis keeps under `model_ema.`, in names without dots.
    Raises ValueError for a pickle, a file that is no safetensors, or `ema` where there are no such copies;
    FileNotFoundError where there is no file.
    """
    path = Path(path)
    if not path.exists():  # before its name is judged: what is not there cannot be converted
        raise FileNotFoundError(f"No such file or directory: {path}")
    refuse_pickle(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path} is no file; give a safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or damaged ({plain(said(error))}): copy or download it again, and "
            "compare its size"
        ) from error
    tensors = unwrapped(tensors)
    for prefix in PREFIXES:
        inner = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if inner:
            return unwrapped(_averaged(inner, tensors, path) if ema else inner)
    if ema:
        raise ValueError(f"{path} has no averaged copies under 'model_ema.'; leave ema out")
    return tensors


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that wrapping a model gives all of its names, however many there are."""
    while tensors:
        prefix = next((one for one in WRAPPERS if all(key.startswith(one) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
    return tensors


def unpacked(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in what a training program saved: {"model": …}, {"state_dict": …, "epoch": …}.

    Raises ValueError, naming them, where there are several.
    """
    inner = {key: value for key, value in state.items() if isinstance(value, Mapping) and _holds_tensors(value)}
    if len(inner) > 1:
        names = ", ".join(repr(key) for key in inner)
        raise ValueError(f"the checkpoint holds several state dicts ({names}): give one of them")
    if inner:
        return unpacked(next(iter(inner.values())))
    return unwrapped(dict(state))


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    """Say whether there are tensors in it that have names; an optimizer's have numbers."""
    names = [key for key in value if isinstance(key, str)]
    return any(isinstance(value[key], Tensor) for key in names) or any(
        isinstance(value[key], Mapping) and _holds_tensors(value[key]) for key in names
    )


def _averaged(inner: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    copies = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in inner}
    missing = [copy for copy in copies.values() if copy not in tensors]
    if missing:
        raise ValueError(f"{path} has no averaged copy {short(missing[0])} (of {len(missing)} missing); leave ema out")
    return {key: tensors[copy] for key, copy in copies.items()}
