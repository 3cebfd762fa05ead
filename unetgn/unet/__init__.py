"""Exports the U-Net under its permanent name, `unetgn.unet.UNet`: saved pipelines say it.

A pipeline of diffusers that loads a `unetgn.unet.UNet` looks for `ModelMixin` beside it, to learn how to load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unetgn.unet.config import UNetConfig as UNetConfig
    from unetgn.unet.loading import ModelMixin as ModelMixin
    from unetgn.unet.model import UNet as UNet
    from unetgn.unet.model import UNetOutput as UNetOutput

_HOME = {"UNet": "model", "UNetOutput": "model", "ModelMixin": "loading", "UNetConfig": "config"}


def __getattr__(name: str) -> Any:
    """Load the network when it is first asked for: it imports diffusers, which the configuration does without."""
    if name not in _HOME:
        raise AttributeError(f"module 'unetgn.unet' has no attribute {name!r}")
    return getattr(import_module(f"unetgn.unet.{_HOME[name]}"), name)
