"""Reads checkpoints: safetensors files only, with the prefixes and copies that published files have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unetgn.messages import plain, said, short
from unetgn.pickles import refuse_pickle

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "online_model.")
AVERAGED = ("ema_model.", "model_ema.", "ema.")  # of ema-pytorch, timm and others: the same names once more
WRAPPERS = ("module.", "_orig_mod.", "state_dict.")  # of DistributedDataParallel, torch.compile, training programs
LEFT_OUT = "leave ema out"


def read_checkpoint(path: str | Path, *, ema: bool | None = None) -> dict[str, Tensor]:
    """Read the U-Net's tensors of a safetensors file, without what stands before their names (`network_of`).

    Raises ValueError for a pickle, a file that is no safetensors, and what `network_of` says; FileNotFoundError where
    there is no file.
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
    return network_of(tensors, str(path), ema=ema)


def network_of(tensors: dict[str, Tensor], where: str, *, ema: bool | None = None) -> dict[str, Tensor]:
    """Take off the prefixes of names, which may be nested in any order: PREFIXES, AVERAGED and WRAPPERS.

    Where some names have one of PREFIXES, the others (text encoder, autoencoder) are left out. `ema` True takes
    averaged weights, False the trained ones; None takes what there is, and of a CompVis file the trained ones: it keeps
    averaged copies under `model_ema.`, in names without dots.
    Raises ValueError, naming both, where there are trained and averaged weights and `ema` is None, and where those that
    it asks for are not there.
    """
    tensors = unwrapped(tensors)
    groups = {prefix: _under(prefix, tensors) for prefix in (*PREFIXES, *AVERAGED)}
    raw = next((prefix for prefix in PREFIXES if groups[prefix]), None)
    averaged = next((prefix for prefix in AVERAGED if any("." in key for key in groups[prefix])), None)
    if averaged is None:
        if raw is None:
            if ema:
                raise ValueError(f"{where} has no averaged copy of its weights; {LEFT_OUT}")
            return tensors
        if ema and _has_copies(tensors):
            return unwrapped(_copies_without_dots(groups[raw], tensors, where))
        return network_of(groups[raw], where, ema=ema)
    inner = network_of(groups[averaged], where)
    bare = {key: tensor for key, tensor in tensors.items() if not key.startswith((*PREFIXES, *AVERAGED))}
    trained = groups[raw] if raw is not None else {key: bare[key] for key in inner if key in bare}
    if trained and ema is None:
        names = f"{averaged!r} (averaged) and {repr(raw) if raw else 'no prefix'} (trained)"
        raise ValueError(
            f"{where} has weights under {names}: load(path, ema=True) takes the former, ema=False the latter; to "
            "convert what is in memory, give one of them"
        )
    if not trained and ema is False:
        raise ValueError(f"{where} has averaged weights alone, under {averaged!r}; {LEFT_OUT}, or give ema=True")
    return network_of(trained, where) if ema is False else inner


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that wrapping a model gives all of its names, however many there are.

    Numbers of the wrapper's own, as torch.optim.swa_utils' n_averaged, have no dot in their names, and go with them.
    """
    while True:
        names = [key for key, value in tensors.items() if "." in key or not _is_number(value)]
        prefix = next((one for one in WRAPPERS if names and all(key.startswith(one) for key in names)), None)
        if prefix is None:
            return tensors
        tensors = _under(prefix, tensors)


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


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
    return network_of(dict(state), "the checkpoint")


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    """Say whether there are tensors in it that have names; an optimizer's have numbers."""
    names = [key for key in value if isinstance(key, str)]
    return any(isinstance(value[key], Tensor) for key in names) or any(
        isinstance(value[key], Mapping) and _holds_tensors(value[key]) for key in names
    )


def _has_copies(tensors: dict[str, Tensor]) -> bool:
    return any(key.startswith("model_ema.") for key in tensors)


def _copies_without_dots(inner: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    copies = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in inner}
    missing = [copy for copy in copies.values() if copy not in tensors]
    if missing:
        raise ValueError(f"{where} has no averaged copy {short(missing[0])} (of {len(missing)} missing); {LEFT_OUT}")
    return {key: tensors[copy] for key, copy in copies.items()}
