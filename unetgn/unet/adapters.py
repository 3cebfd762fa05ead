"""Scales adapters (LoRA) in one forward pass and for each block, as diffusers' own U-Net does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

THROUGH_DIFFUSERS = {  # attributes of diffusers' U-Net, and why there are none here
    "set_default_attn_processor": "attention is computed in one way",
    "load_attn_procs": "attention is computed in one way (load_lora_adapter loads LoRA)",
    "save_attn_procs": "attention is computed in one way (save_lora_adapter saves LoRA)",
    "fuse_qkv_projections": "projections are not joined",
    "unfuse_qkv_projections": "projections are not joined",
    "set_attention_slice": "attention keeps no scores that slices would save",
    "enable_freeu": "FreeU changes the decoder",
    "disable_freeu": "FreeU changes the decoder",
}
THE_WAY = "unetgn.interop.to_diffusers(unet) has it"


def why_not(name: str) -> str:
    """Say why a U-Net of ours has no attribute `name` of THROUGH_DIFFUSERS, and what has."""
    return f"UNet has no {name}: {THROUGH_DIFFUSERS[name]}. {THE_WAY}"


@contextmanager
def scaled(unet: nn.Module, attention_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Scale all adapters of a network by cross_attention_kwargs["scale"], and back.

    Raises ValueError for other keys, which diffusers hands on to attention processors.
    """
    others = sorted(set(attention_kwargs) - {"scale", "gligen"})
    if "ip_adapter_masks" in others:
        raise ValueError(
            "cross_attention_kwargs has 'ip_adapter_masks', and UNet reads an IP-Adapter's image everywhere: leave the "
            "masks out, or use unetgn.interop.to_diffusers(unet) and load the adapter there"
        )
    if others:
        raise ValueError(
            f"cross_attention_kwargs={others} are for attention processors, and UNet has none: give 'scale' alone, or "
            "use unetgn.interop.to_diffusers(unet)"
        )
    scale = attention_kwargs.get("scale", 1.0)
    if not getattr(unet, "_hf_peft_config_loaded", False):  # nothing to scale, as in diffusers
        yield
        return
    scale_lora_layers(unet, scale)
    try:
        yield
    finally:
        unscale_lora_layers(unet, scale)


def block_scales(weights: float | Mapping[str, Any], attending: Mapping[str, Mapping[int, Sequence[str]]]) -> Any:
    """Write the scales of one adapter for each attention layer, as {"down_blocks.1.attentions.0": 0.5}.

    weights: a number for all; or {"down": …, "mid": …, "up": …}, for each side a number, or {"block_1": …}, and for a
    block a number or a list of one for each of its attention layers. What is left out has 1. attending: for each side,
    each block that has attention, and the names of its layers.
    Raises ValueError, naming it, for a key that is no part of the network, and a list of another length.
    """
    if not isinstance(weights, Mapping):
        return weights
    sides = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
    _check_keys("the adapter's weights", weights, sides)
    scales: dict[str, float] = {}
    for side, module in sides.items():
        given = weights.get(side, 1.0)
        if side == "mid":
            given = {"block_0": given}
        blocks = {f"block_{index}": (index, layers) for index, layers in attending[side].items()}
        if isinstance(given, Mapping):
            _check_keys(f"the adapter's weights of {side!r}", given, blocks)
        for name, (index, layers) in blocks.items():
            own = given.get(name, 1.0) if isinstance(given, Mapping) else given
            values = list(own) if isinstance(own, (list, tuple)) else [own]
            if len(values) not in (1, len(layers)):
                raise ValueError(f"{side} {name} has {len(layers)} attention layers, and {len(values)} scales: {own}")
            place = module if side == "mid" else f"{module}.{index}"
            for layer, value in zip(layers, values * (len(layers) if len(values) == 1 else 1), strict=True):
                scales[f"{place}.attentions.{layer}"] = value
    return scales


def _check_keys(what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{what} name {unknown}, which have no attention or are not there; these have: {list(known)}")
