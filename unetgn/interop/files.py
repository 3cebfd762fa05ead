"""Reads checkpoints: safetensors files only, with the prefixes and copies that published files have."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "model.")
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".bin")
ADVICE = """A pickle can run any code when it is opened, so none is opened here. Convert it once, where you trust it:
    import torch; from safetensors.torch import save_file
    state = torch.load("FILE", map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    save_file({k: v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}, "FILE.safetensors")"""


def read_checkpoint(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the U-Net's tensors of a safetensors file, without the prefix `model.diffusion_model.` or `model.`.

    Where keys have such a prefix, those without it (text encoder, autoencoder) are left out. `ema` reads the averaged
    copies that CompVis keeps under `model_ema.`, in names without dots.
    Raises ValueError for a pickle, a file that is no safetensors, or `ema` where there are no such copies;
    FileNotFoundError where there is no file.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle. {ADVICE.replace('FILE', path.stem)}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}). {ADVICE}") from error
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
