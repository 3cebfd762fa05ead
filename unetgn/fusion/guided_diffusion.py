"""guided-diffusion's residual block, and CompVis's, which is a copy of it: found by structure in whoever's repository.

Its class is no library's, so it is known by what its code uses: `in_layers`, `emb_layers`, `out_layers` and
`skip_connection`. The work is in `_forward` where the block checkpoints itself, in `forward` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from unetgn.fusion.joined import norm_silu
from unetgn.fusion.recognition import learn_silu, used_names
from unetgn.fusion.rules import is_norm, rule

PARTS = frozenset({"in_layers", "emb_layers", "out_layers", "skip_connection"})
USES = PARTS | {
    *("updown", "h_upd", "x_upd", "use_scale_shift_norm"),
    *("type", "dtype", "len", "shape", "torch", "th", "chunk"),
}


def _norms(block: Any) -> tuple[str, ...]:
    pairs = {"in_layers.0": block.in_layers[:2], "out_layers.0": block.out_layers[:2]}
    return tuple(name for name, (norm, act) in pairs.items() if is_norm(norm) and learn_silu(act))


def _has_parts(method: str) -> Callable[[type], bool]:
    return lambda cls: used_names(getattr(cls, method, None)) >= PARTS


@rule(_has_parts("forward"), norms=_norms, uses=USES)
@rule(_has_parts("_forward"), method="_forward", norms=_norms, uses=USES)
def residual_block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Norm, SiLU, resampling, convolution; embedding as addition or scale-shift; norm, SiLU, dropout, convolution."""
    in_norm, in_act, *in_rest, in_conv = block.in_layers
    h = _run(in_rest, norm_silu(in_norm, in_act, x))
    if getattr(block, "updown", False):
        h, x = block.h_upd(h), block.x_upd(x)
    h = in_conv(h)
    emb_out = block.emb_layers(emb).type(h.dtype)
    emb_out = emb_out.reshape(*emb_out.shape, *(1 for _ in h.shape[emb_out.dim() :]))
    out_norm, out_act, *out_rest = block.out_layers
    if getattr(block, "use_scale_shift_norm", False):
        scale, shift = emb_out.chunk(2, dim=1)
        h = norm_silu(out_norm, out_act, h, scale=scale, shift=shift)
    else:
        h = norm_silu(out_norm, out_act, h, pre_bias=emb_out)
    return block.skip_connection(x) + _run(out_rest, h)


def _run(layers: Iterable[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h)
    return h
