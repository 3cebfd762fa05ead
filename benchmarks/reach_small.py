"""Makes small copies of U-Nets' configurations, of the same kind in all that is no width, and inputs for them.

Both are for diffusers' UNet2DModel and UNet2DConditionModel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST = 3_000_000  # parameters of a model that is run as it is
MOST_HEADS, MOST_LAYERS = 20, 2
HEAD_WIDTH = 4
SIZES = {  # what these options become where they are given
    "time_embedding_dim": 24,
    "time_cond_proj_dim": 6,
    "num_class_embeds": 5,
    "addition_time_embed_dim": 8,
    "encoder_hid_dim": 6,
    "attn_norm_num_groups": 2,
    "addition_embed_type_num_heads": 2,
}
POOLED, SIZE_NUMBERS = 4, 6  # the text and the numbers of Stable Diffusion XL's vector


def small_copy(config: dict[str, Any]) -> dict[str, Any]:
    """Make the widths, depths and tables of a configuration small, and leave its kind as it is."""
    widths = config["block_out_channels"]
    ranks = {width: rank for rank, width in enumerate(sorted(set(widths)), start=1)}
    heads, unit = _heads(config)
    small = {key: SIZES[key] if key in SIZES and value is not None else value for key, value in config.items()}
    context = 32 if config.get("cross_attention_norm") == "group_norm" else 12
    if config.get("projection_class_embeddings_input_dim") is not None:
        sized = config.get("addition_embed_type") == "text_time"
        vector = POOLED + SIZE_NUMBERS * SIZES["addition_time_embed_dim"]
        small["projection_class_embeddings_input_dim"] = vector if sized else 6
    if "cross_attention_dim" in config:
        given = config["cross_attention_dim"]
        small["cross_attention_dim"] = [context] * len(given) if isinstance(given, (list, tuple)) else context
    for key in ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if config.get(key) is not None:
            small[key] = _at_most(config[key], MOST_LAYERS)
    return {
        **small,
        "block_out_channels": [unit * ranks[width] for width in widths],
        "norm_num_groups": config["norm_num_groups"] and 4,
        "attention_head_dim": heads,
    }


def _heads(config: dict[str, Any]) -> tuple[Any, int]:
    """Return attention_head_dim, and a number that widths may be multiples of: whether heads divide stays as it is."""
    given, widths = config["attention_head_dim"], config["block_out_channels"]
    if given is None:
        return None, 8
    entries = list(given) if isinstance(given, (list, tuple)) else [given] * len(widths)
    if any(width % entry for width, entry in zip(widths, entries, strict=True)):
        return 3, 8
    blocks = " ".join((*config["down_block_types"], str(config.get("mid_block_type")), *config["up_block_types"]))
    if "Attn" in blocks.replace("CrossAttn", "").replace("Simple", "Attn") or "cross_attention_dim" not in config:
        return (HEAD_WIDTH if isinstance(given, int) else [HEAD_WIDTH] * len(entries)), 8
    fewer = [entry if entry <= MOST_HEADS else HEAD_WIDTH for entry in entries]
    return (fewer[0] if isinstance(given, int) else fewer), math.lcm(4, *fewer)


def _at_most(value: Any, most: int) -> Any:
    return [_at_most(item, most) for item in value] if isinstance(value, (list, tuple)) else min(value, most)


def inputs(model: nn.Module, *, origin: bool) -> dict[str, Any]:
    """Draw arguments for both libraries, by name.

    With `origin` all that sinusoids are made of is 0, where diffusers' float32 is as exact as float64.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = max(8, 2 ** (len(config.block_out_channels) - 1))
    hinted = config.get("addition_embed_type") == "image_hint"
    given: dict[str, Any] = {"sample": noise(2, config.in_channels - 4 * hinted, size, size)}
    noisy = [0.25, 1.5] if config.time_embedding_type == "fourier" else [3.0, 700.0]
    given["timestep"] = torch.zeros(2) if origin else torch.tensor(noisy)
    given |= _labels(model, noise, origin=origin)
    if "cross_attention_dim" not in config:
        return given
    context = config.encoder_hid_dim or config.cross_attention_dim
    width = context if isinstance(context, int) else context[0]
    given["encoder_hidden_states"] = None if config.encoder_hid_dim_type == "image_proj" else noise(2, 5, width)
    if config.time_cond_proj_dim is not None:
        given["timestep_cond"] = noise(2, config.time_cond_proj_dim)
    given["added_cond_kwargs"] = _added(config, noise, size, origin=origin) or None
    if config.attention_type != "default":
        given["cross_attention_kwargs"] = {"gligen": _boxes(config.attention_type, width, noise)}
    return given


def _boxes(kind: str, width: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Draw what GLIGEN reads: three boxes, the last of which is none."""
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    given = {"boxes": noise(2, 3, 4).sigmoid(), "masks": mask}
    if kind == "gated":
        return {**given, "positive_embeddings": noise(2, 3, width)}
    for name in ("phrases", "image"):
        given |= {f"{name}_masks": mask, f"{name}_embeddings": noise(2, 3, width)}
    return given


def _labels(model: Any, noise: Callable[..., Tensor], *, origin: bool) -> dict[str, Tensor]:
    kind, config = model.config.class_embed_type, model.config
    if kind == "timestep":
        return {"class_labels": torch.zeros(2) if origin else torch.tensor([3.0, 9.0])}
    if kind == "identity":
        return {"class_labels": noise(2, model.time_embedding.linear_2.out_features)}
    if kind is not None:
        return {"class_labels": noise(2, config.projection_class_embeddings_input_dim)}
    return {} if config.num_class_embeds is None else {"class_labels": torch.tensor([0, config.num_class_embeds - 1])}


def _added(config: Any, noise: Callable[..., Tensor], size: int, *, origin: bool) -> dict[str, Tensor]:
    """Draw what a network reads of added_cond_kwargs."""
    kind, projection, given = config.addition_embed_type, config.encoder_hid_dim_type, {}
    if kind == "text_time":
        numbers = torch.zeros(2, SIZE_NUMBERS) if origin else torch.arange(2.0 * SIZE_NUMBERS).reshape(2, SIZE_NUMBERS)
        pooled = config.projection_class_embeddings_input_dim - SIZE_NUMBERS * config.addition_time_embed_dim
        given = {"text_embeds": noise(2, pooled), "time_ids": numbers.double()}
    elif kind == "text_image":
        given = {name: noise(2, config.cross_attention_dim) for name in ("text_embeds", "image_embeds")}
    elif kind in ("image", "image_hint"):
        given = {"image_embeds": noise(2, config.encoder_hid_dim)}
        if kind == "image_hint":
            given["hint"] = noise(2, 3, 8 * size, 8 * size)
    if projection in ("image_proj", "text_image_proj") and "image_embeds" not in given:
        width = config.encoder_hid_dim if projection == "image_proj" else config.cross_attention_dim
        given["image_embeds"] = noise(2, width)
    return given
