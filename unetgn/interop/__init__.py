"""Converts other projects' U-Nets to ours, and ours to theirs.

    unet = unetgn.UNet.from_diffusers(pipeline.unet)                       # a model, or a folder
    unet = unetgn.interop.load("v1-5.safetensors", ema=True)               # recognised by names and shapes
    unet = unetgn.interop.load("v1-5.safetensors", config="v1-inference.yaml")
    unet = unetgn.interop.load("compvis", "v1-5.safetensors", in_channels=4, model_channels=320, ...)
    unet = unetgn.interop.convert("edm", {"class": "SongUNet", "img_resolution": 32, ...}, state_dict)
    model = unetgn.interop.to_diffusers(unet)

Each family has one file: its options, their translation into a `UNetConfig`, and its table of names.
"""

from unetgn.interop.families import FAMILIES, convert, load
from unetgn.interop.from_diffusers import from_diffusers
from unetgn.interop.to_diffusers import to_diffusers

__all__ = ["FAMILIES", "convert", "from_diffusers", "load", "to_diffusers"]
