"""Reads the configuration of a diffusers model, in which diffusers' tools and users keep keys of their own.

They come along: into the configuration of our network, from which `save_pretrained` and `to_diffusers` take them.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from unetgn.messages import short
from unetgn.serialize import from_plain, split
from unetgn.unet import UNet
from unetgn.unet.config import UNetConfig
from unetgn.unet.saved import READ_BY_DIFFUSERS, warn_of_others

Options = TypeVar("Options")
_OURS = frozenset(field.name for field in fields(UNetConfig))


def read_options(kind: type[Options], config: Mapping[str, Any], class_name: str) -> tuple[Options, dict[str, Any]]:
    """Read the constructor's options of a diffusers model, and what else its configuration holds.

    Warns once, naming all keys that are no options. Raises ValueError for a quantized model.
    """
    quantization = config.get(READ_BY_DIFFUSERS)
    if quantization is not None:
        raise ValueError(
            f"{class_name} is quantized ({READ_BY_DIFFUSERS}={short(quantization)}): convert it as it was before, and "
            "quantize ours with UNet.from_pretrained(folder, quantization_config=...)"
        )
    parts = split(kind, {key: value for key, value in config.items() if key != READ_BY_DIFFUSERS})
    names = zip(parts.others, parts.names, strict=True)
    named = tuple(f"{name} (left out: UNet has a field of that name)" if key in _OURS else name for key, name in names)
    if named:
        warn_of_others(f"the configuration of diffusers' {class_name}", named)
    others = {key: value for key, value in parts.others.items() if key not in _OURS}
    return from_plain(kind, parts.known), others


def keep(unet: UNet, others: Mapping[str, Any]) -> UNet:
    """Register what is no option in the configuration of our network, and return the network."""
    unet.register_to_config(**others)
    return unet


def others_of(unet: UNet) -> dict[str, Any]:
    """Return what the configuration of a network holds beside its fields."""
    own = {*_OURS, READ_BY_DIFFUSERS}
    return {key: value for key, value in unet.config.items() if key not in own and not key.startswith("_")}
