"""Samples images: `UNetPipeline` is the door, for scripts, previews and people.

`schedulers` knows diffusers' schedulers, `sampling` has the one loop from noise to images, `pictures` grids and PNG
files, `strips` what shows the way from noise to image. This package imports neither torch, diffusers nor Pillow, until
`UNetPipeline` is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unetgn.pipelines.pipeline import UNetPipeline

__all__ = ["UNetPipeline"]


def __getattr__(name: str) -> Any:
    if name != "UNetPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("unetgn.unet")  # diffusers finds the class of a saved network in imported modules only
    return importlib.import_module("unetgn.pipelines.pipeline").UNetPipeline
