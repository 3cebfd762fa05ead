"""Converts diffusers' U-Nets to ours: a model in memory, or a folder that `save_pretrained` wrote."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unetgn.interop.as_built import check_as_built, check_whole
from unetgn.interop.families import FAMILIES, convert
from unetgn.interop.files import read_checkpoint
from unetgn.json_files import read_object
from unetgn.messages import said, short
from unetgn.pickles import refuse_pickles, shards
from unetgn.unet import UNet

CLASS_FAMILIES = {"UNet2DModel": "diffusers-unet2d", "UNet2DConditionModel": "diffusers-unet2d-condition"}
OTHER_CLASSES = {  # U-Nets of diffusers that are other networks, and which
    "UNet1DModel": "a network of one-dimensional blocks of its own",
    "UNet3DConditionModel": "a video network: it convolves and attends over time",
    "UNetMotionModel": "a video network: it attends over time",
    "UNetSpatioTemporalConditionModel": "a video network: it convolves and attends over time",
    "I2VGenXLUNet": "a video network: it convolves and attends over time",
    "StableCascadeUNet": "Stable Cascade's network, which has no group norms and residual blocks",
    "UNetControlNetXSModel": "a U-Net grown together with its ControlNet",
    "AudioLDM2UNet2DConditionModel": "AudioLDM 2's network, each of whose levels reads two contexts",
    "Kandinsky3UNet": "Kandinsky 3's network, whose norms the timestep modulates",
    "DreamLiteUNetModel": "its blocks are of another kind",
    "UVit2DModel": "a transformer",
}
STEM = "diffusion_pytorch_model"


def from_diffusers(model_or_folder: nn.Module | str | Path, *, variant: str | None = None) -> UNet:
    """Build our U-Net with the architecture and weights of diffusers' UNet2DModel or UNet2DConditionModel.

    model_or_folder: the model, whose weights are copied, or the folder of a model or of a whole pipeline. variant:
    "fp16" for the files of that name. Device and dtype are the original's; evaluation mode.
    Gradient checkpointing comes along. Raises ValueError for another class, options that are not supported, a folder
    without safetensors files, keys that do not fit, and, with what to do first, for a model that is not as its
    configuration builds it: offloaded, compiled, adapted, quantized or changed (`unetgn.interop.as_built`).
    """
    if isinstance(model_or_folder, nn.Module):
        if variant is not None:
            raise ValueError(f"variant={variant!r} chooses among files; a model in memory has none")
        return _converted_model(model_or_folder)
    if not isinstance(model_or_folder, (str, Path)):
        kind = type(model_or_folder).__name__
        raise TypeError(f"from_diffusers takes a model or a folder, got {kind}; a pipeline holds its model as .unet")
    folder = Path(model_or_folder)
    if not (folder / "config.json").is_file() and (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a diffusers model, or of a pipeline")
    config = read_object(folder / "config.json", finite=False)
    class_name = config.get("_class_name", "")
    return _converted(_family(class_name), class_name, config, _read_folder(folder, variant))


def _converted_model(model: Any) -> UNet:
    class_name = type(model).__name__
    if class_name in OTHER_CLASSES:
        _family(class_name)
    check_whole(model)
    family = _family(class_name)
    config = {**model.config, "class": class_name}
    options = {name: config[name] for name in inspect.signature(type(model)).parameters if name in config}
    weights = {key: tensor for key, tensor in model.state_dict().items() if not _is_left_over(key)}
    try:
        with torch.device("meta"):
            built = type(model)(**options)
    except Exception as error:
        convert(family, config, weights)  # which names the option
        raise ValueError(
            f"{class_name}: diffusers cannot build a model of this configuration ({said(error)})"
        ) from error
    check_as_built(model, built)
    unet = convert(family, config, weights)
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if checkpointing:
        function = checkpointing[0]._gradient_checkpointing_func
        unet.enable_gradient_checkpointing(None if function.__module__.startswith("diffusers.") else function)
    return unet


def _is_left_over(key: str) -> bool:
    """Return True for the joint projections of `fuse_qkv_projections`, which nothing reads once it is undone."""
    return key.rpartition(".")[0].endswith((".to_qkv", ".to_kv"))


def _converted(family: str, class_name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> UNet:
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    return FAMILIES[family].convert(options, tensors, class_name=class_name, copy=False)


def _family(class_name: str) -> str:
    if class_name == UNet.__name__:
        raise ValueError("this is a network of this package already: unetgn.UNet.from_pretrained(folder) loads it")
    if class_name not in CLASS_FAMILIES:
        whose = f" ({OTHER_CLASSES[class_name]})" if class_name in OTHER_CLASSES else ""
        raise ValueError(
            f"{short(class_name)} is not supported{whose}; {' and '.join(CLASS_FAMILIES)} of diffusers are"
        )
    return CLASS_FAMILIES[class_name]


def _read_folder(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """Read all tensors of a model folder, from one file or from the shards that its index names."""
    refuse_pickles(folder, variant=variant)
    middle = f".{variant}" if variant else ""
    single = folder / f"{STEM}{middle}.safetensors"
    index = folder / f"{STEM}.safetensors.index{middle}.json"
    if single.is_file():
        return read_checkpoint(single)
    if index.is_file():
        return {key: tensor for shard in shards(index) for key, tensor in read_checkpoint(shard).items()}
    raise ValueError(f"{folder} has neither {single.name} nor {index.name}")
