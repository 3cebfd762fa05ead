"""Registers guided-diffusion's residual block, and CompVis's copy of it, wherever a repository has one.

The class belongs to no library. It is found by the names that its code uses: `in_layers`, `emb_layers`, `out_layers`
and `skip_connection`. The work is in `_forward` where the block checkpoints itself, in `forward` otherwise. Names do
not say what is computed: a copy may scale the sum, or take shift before scale. So the code is run on a block in
miniature, in float64, and compared with the rule.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unetgn.fusion.activations import is_silu_module
from unetgn.fusion.norm_silu import norm_silu
from unetgn.fusion.norms import is_norm
from unetgn.fusion.recognition import is_bare, trial, used_names
from unetgn.fusion.rules import rule
from unetgn.fusion.switches import switches_off

PARTS = frozenset({"in_layers", "emb_layers", "out_layers", "skip_connection"})
FLAGS = ("updown", "use_scale_shift_norm", "skip_t_emb", "exchange_temb_dims")
OPTIONS, WRAPPER = ("transformer_options",), "group_norm_wrapper"  # of Forge, whose block is ComfyUI's
USES = PARTS | {
    *("updown", "h_upd", "x_upd", "use_scale_shift_norm"),
    *("type", "dtype", "len", "shape", "torch", "th", "chunk"),
    *("skip_t_emb", "zeros_like", "exchange_temb_dims", "rearrange"),  # Stability's generative-models
}


def _chains(block: Any) -> dict[str, Any]:
    chains = {"in_layers": block.in_layers, "out_layers": block.out_layers}
    return {name: layers for name, layers in chains.items() if isinstance(layers, nn.Sequential) and len(layers) > 1}


def _norms(block: Any) -> tuple[str, ...]:
    """Return the paths of the first layers of both chains, where these start with a norm and SiLU."""
    starts = ((name, layers[0], layers[1]) for name, layers in _chains(block).items())
    return tuple(f"{name}.0" for name, norm, act in starts if is_norm(norm) and is_silu_module(act))


def _has_known_chains(block: Any) -> bool:
    """Return True where both are Sequentials that end in something else, with no other norm behind the first layer."""
    chains = _chains(block).values()
    is_plain = all(type(layers).forward is nn.Sequential.forward for layers in chains)
    return len(chains) == 2 and is_plain and len(block.in_layers) > 2 and not any(map(_has_late_norm, chains))


def _has_late_norm(layers: nn.Sequential) -> bool:
    return any(map(is_norm, list(layers)[1:]))


def _has_parts(method: str) -> Callable[[type], bool]:
    return lambda cls: used_names(getattr(cls, method, None)) >= PARTS


def _refuses(method: str) -> Callable[[nn.Module], str | None]:
    def reason(block: Any) -> str | None:
        if not _has_known_chains(block):
            return "its in_layers or out_layers are others than those of guided-diffusion's block"
        flags = {name: bool(getattr(block, name, False)) for name in FLAGS}
        cls: Any = type(block)
        off = switches_off(block, getattr(cls, method), USES)
        if _agrees(cls, getattr(cls, method), **flags, off=off):
            return None
        return f"{type(block).__name__}.{method} does not compute what guided-diffusion's block does"

    return reason


@rule(_has_parts("forward"), norms=_norms, uses=USES, refuses=_refuses("forward"))
def in_forward(block: Any, x: Tensor, emb: Tensor, **options: Any) -> Tensor:
    """Run a block without checkpointing of its own."""
    if not (is_bare(block.in_layers) and is_bare(block.out_layers)) or _is_wrapping(options):
        return type(block).forward(block, x, emb, **options)
    return residual_block(block, x, emb)


@rule(_has_parts("_forward"), method="_forward", norms=_norms, uses=USES, refuses=_refuses("_forward"))
def in_checkpoint(block: Any, x: Tensor, emb: Tensor, *given: Any, **options: Any) -> Tensor:
    """Run what the forward of a block with checkpointing calls; Forge's hands its options on by position."""
    options |= dict(zip(OPTIONS, given, strict=False))
    if not (is_bare(block.in_layers) and is_bare(block.out_layers)) or _is_wrapping(options):
        return type(block)._forward(block, x, emb, **options)
    return residual_block(block, x, emb)


def residual_block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Compute both chains, with the embedding as addition or scale-shift between them, and add the skip connection."""
    in_norm, in_act, *in_rest, in_conv = block.in_layers
    h = _run(in_rest, norm_silu(in_norm, in_act, x))
    if getattr(block, "updown", False):
        h, x = block.h_upd(h), block.x_upd(x)
    h = in_conv(h)
    out_norm, out_act, *out_rest = block.out_layers
    if getattr(block, "skip_t_emb", False):
        return block.skip_connection(x) + _run(out_rest, norm_silu(out_norm, out_act, h))
    emb_out = block.emb_layers(emb).type(h.dtype)
    emb_out = emb_out.reshape(*emb_out.shape, *(1 for _ in h.shape[emb_out.dim() :]))
    if getattr(block, "use_scale_shift_norm", False):
        scale, shift = emb_out.chunk(2, dim=1)
        h = norm_silu(out_norm, out_act, h, scale=scale, shift=shift)
    else:
        if getattr(block, "exchange_temb_dims", False):
            emb_out = emb_out.transpose(1, 2)
        h = norm_silu(out_norm, out_act, h, pre_bias=emb_out)
    return block.skip_connection(x) + _run(out_rest, h)


def _is_wrapping(options: dict[str, Any]) -> bool:
    """Return True where Forge is told to call something else in the place of the norms."""
    return any(WRAPPER in (value or ()) for value in options.values())


def _is_called_alike(method: Callable[..., Any]) -> bool:
    """Return True for a method of x and emb, and for Forge's, which asks its options for one word alone."""
    parameters = list(inspect.signature(method).parameters)[1:]
    if parameters == ["x", "emb"]:
        return True
    code = inspect.unwrap(method).__code__
    words = {word for word in code.co_consts if isinstance(word, str)} - {inspect.unwrap(method).__doc__}
    return parameters == ["x", "emb", *OPTIONS] and words <= {WRAPPER, "b t c ... -> b c t ..."}


def _run(layers: Iterable[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h)
    return h


@functools.cache
def _agrees(
    cls: Any,
    method: Callable[..., Any],
    *,
    updown: bool,
    use_scale_shift_norm: bool,
    skip_t_emb: bool,
    exchange_temb_dims: bool,
    off: tuple[str, ...],
) -> bool:
    """Return True where method and rule give the same numbers for a random block of the class, dropout included."""
    if not _is_called_alike(method):
        return False
    with trial(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            block = _miniature(cls, updown, use_scale_shift_norm)
            vars(block).update(dict.fromkeys(off, False), skip_t_emb=skip_t_emb, exchange_temb_dims=exchange_temb_dims)
            x, emb = torch.randn(2, 4, 4, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
            if exchange_temb_dims:  # an embedding for each of four times
                emb = torch.randn(2, 4, 3, dtype=torch.float64)
            torch.default_generator.manual_seed(1)
            expected = method(block, x.clone(), emb.clone())
            torch.default_generator.manual_seed(1)
            return torch.allclose(residual_block(block, x, emb), expected, rtol=1e-10, atol=1e-10)
        except Exception:  # somebody else's code may raise anything where something is not as in the known block
            return False


def _miniature(cls: Any, updown: bool, use_scale_shift_norm: bool) -> nn.Module:
    """Make a block of the class with the known parts, four channels wide, without running its constructor."""
    block: Any = cls.__new__(cls)
    nn.Module.__init__(block)
    block.updown, block.use_scale_shift_norm = updown, use_scale_shift_norm
    block.in_layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))
    block.h_upd, block.x_upd = nn.AvgPool2d(2), nn.MaxPool2d(2)
    block.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(3, 8 if use_scale_shift_norm else 4))
    block.out_layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1))
    block.skip_connection = nn.Conv2d(4, 4, 1)
    for layers in (block.in_layers, block.out_layers):  # hooked: norm_silu as it is defined, on any device
        layers[0].register_forward_hook(lambda *_: None)
    for parameter in block.parameters():
        parameter.normal_()
    return block.double()
