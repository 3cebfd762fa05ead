"""Makes the implementations to compare: ours, PyTorch's eager and compiled, and others where they are installed."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import unetgn
from benchmarks.group_norm_silu.cases import DTYPES, EXTRAS, NUM_GROUPS, Case

Function = Callable[[dict[str, Tensor]], Tensor]
Maker = Callable[[], Function]


def ours(inputs: dict[str, Tensor], groups: int = NUM_GROUPS) -> Tensor:
    """Call the fused operator, by its public door."""
    pre_bias, scale, shift = (inputs.get(name) for name in ("pre_bias", "scale", "shift"))
    return unetgn.group_norm_silu(
        inputs["x"], groups, inputs["weight"], inputs["bias"], pre_bias=pre_bias, scale=scale, shift=shift
    )


def eager(inputs: dict[str, Tensor], groups: int = NUM_GROUPS) -> Tensor:
    """Compute `F.silu(F.group_norm(...))`, with the extras as networks write them."""
    x = inputs["x"]
    if "pre_bias" in inputs:
        x = x + inputs["pre_bias"][:, :, None, None]
    z = F.group_norm(x, groups, inputs["weight"], inputs["bias"])
    if "scale" in inputs:
        scale, shift = (t if t.dim() == x.dim() else t[:, :, None, None] for t in (inputs["scale"], inputs["shift"]))
        z = z * (1 + scale) + shift
    return F.silu(z)


def compiled() -> Function:
    """Compile `eager` under `torch.compile`, for the shapes that it will be called with."""
    torch._dynamo.reset()  # else the compiler stops at its limit of recompilations
    function: Function = torch.compile(eager, dynamic=False, fullgraph=True)
    return function


def contenders(case: Case) -> dict[str, Maker]:
    """Map each name to what makes a function of the inputs, for all that can compute this case.

    Liger and apex know no extras.
    Nothing is imported or built before a maker is called: what is installed may yet fail to start.
    """
    found: dict[str, Maker] = {"ours": lambda: ours, "eager": lambda: eager, "compiled": compiled}
    if not EXTRAS[case.extras]:
        if case.layout == "contiguous" and find_spec("liger_kernel"):
            found["liger"] = partial(_liger, case)
        if case.layout == "channels_last" and case.dtype != "float32" and find_spec("apex"):
            found["apex"] = partial(_apex, case)
    return found


def _liger(case: Case) -> Function:
    module = import_module("liger_kernel.transformers.group_norm").LigerGroupNorm(case.shape[1], NUM_GROUPS, eps=1e-5)
    module = module.to("cuda", DTYPES[case.dtype])
    return lambda inputs: F.silu(module(inputs["x"]))


def _apex(case: Case) -> Function:
    make = import_module("apex.contrib.group_norm").GroupNorm
    module = make(NUM_GROUPS, case.shape[1], act="silu", device="cuda", dtype=DTYPES[case.dtype])
    return lambda inputs: module(inputs["x"])
