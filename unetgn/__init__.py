"""Builds diffusion U-Nets around a fused GroupNorm + SiLU.

`import unetgn` registers the operator with PyTorch (`torch.ops.unetgn`), and what networks return, so that a program
that was exported with them can be loaded: beside the import of torch that takes no time. Names are loaded when they are
first asked for; neither diffusers nor Triton nor PyTorch's compiler is imported here.
"""

from unetgn import programs as _programs  # noqa: F401  # the first of all: its module says why

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING, Any

from unetgn.ops import library as _library  # noqa: F401  # registers the operator
from unetgn.unet import exported as _exported  # noqa: F401  # registers what networks return

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from unetgn.fusion import fuse as fuse
    from unetgn.fusion import unfuse as unfuse
    from unetgn.nn import ConvNormAct as ConvNormAct
    from unetgn.nn import CrossAttention as CrossAttention
    from unetgn.nn import Downsample as Downsample
    from unetgn.nn import ResBlock as ResBlock
    from unetgn.nn import SelfAttention as SelfAttention
    from unetgn.nn import SpatialTransformer as SpatialTransformer
    from unetgn.nn import TimestepEmbedding as TimestepEmbedding
    from unetgn.nn import Upsample as Upsample
    from unetgn.nn import WeightStandardizedConv as WeightStandardizedConv
    from unetgn.nn import make_norm as make_norm
    from unetgn.nn.norm import GroupNormSiLU as GroupNormSiLU
    from unetgn.nn.norm import largest_group_count as largest_group_count
    from unetgn.ops import group_norm_silu as group_norm_silu
    from unetgn.unet import UNet as UNet
    from unetgn.unet.config import UNetConfig as UNetConfig

__version__ = "0.1.0"

# To export one more name, add one line here.
_HOME = {
    "group_norm_silu": "unetgn.ops",
    "fuse": "unetgn.fusion",
    "unfuse": "unetgn.fusion",
    "ConvNormAct": "unetgn.nn",
    "CrossAttention": "unetgn.nn",
    "Downsample": "unetgn.nn",
    "ResBlock": "unetgn.nn",
    "SelfAttention": "unetgn.nn",
    "SpatialTransformer": "unetgn.nn",
    "TimestepEmbedding": "unetgn.nn",
    "UNet": "unetgn.unet",
    "UNetConfig": "unetgn.unet.config",
    "Upsample": "unetgn.nn",
    "WeightStandardizedConv": "unetgn.nn",
    "make_norm": "unetgn.nn",
    "GroupNormSiLU": "unetgn.nn.norm",
    "largest_group_count": "unetgn.nn.norm",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in ("fusion", "interop", "nn", "ops", "pipelines", "unet"):
        return import_module(f"unetgn.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'unetgn' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
