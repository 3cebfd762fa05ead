"""Compares U-Nets by what they are, whichever way their configurations were written down."""

import dataclasses
from typing import Any

from unetgn.nn.resample import axis_strides
from unetgn.unet.description import UNetDescription
from unetgn.unet.plan import AttentionPlan, LevelPlan, plan_unet


def facts(config: UNetDescription) -> dict[str, Any]:
    """Describe the network that a configuration comes to, by the fields that say it.

    Two configurations that were written down in two ways and build the same network have equal facts.
    """
    plan, time = plan_unet(config), config.time
    levels = (*plan.encoder, plan.mid, *plan.decoder)
    kinds = set(config.encoder_resample + config.decoder_resample)
    widths = sorted({width for level in levels for b in level.blocks for width in (b.in_channels, b.out_channels)})
    return {
        **{name: getattr(config, name) for name in ("in_channels", "out_channels", "spatial_dims", "dropout")},
        "sample_size": list(config.sample_size) if isinstance(config.sample_size, tuple) else config.sample_size,
        "num_classes": config.class_rows,
        "condition": dataclasses.replace(
            config.condition, null_class=False, missing_class="error", null_class_trained=True, activations=None
        ),
        "time_cond_proj_dim": config.time_cond_proj_dim,
        "addition_time_embed_dim": config.addition_time_embed_dim,
        "time": (time.features, time.order, time.frequency_shift, config.feature_width, config.time_width),
        "norm": (config.norm.eps, {width: config.norm.groups(width) for width in widths}),
        "time.activation": (time.activation, time.post_activation),
        "condition.activations": (config.resblock.activation,)
        if config.resblock.activate_embedding
        else config.embedding_activations,
        "resblock.embedding": config.resblock.embedding,
        "resblock.activation": config.resblock.activation,
        "resblock.project_resampled": config.resblock.project_resampled and "resblock" in kinds,
        "resample.padding": config.resample.padding if "conv" in config.encoder_resample else "both",
        "resample.taps": config.resample.taps if kinds & {"resblock", "plain"} else (1.0, 1.0),
        "resample.strides": axis_strides(config.resample.strides, config.spatial_dims),
        "encoder.resample": config.encoder_resample,
        "decoder.resample": config.decoder_resample,
        "encoder.stem_channels": config.stem_channels,
        "encoder.stem_kernel": config.encoder.stem_kernel,
        "encoder.residual_input": config.encoder.residual_input,
        "decoder.out_kernel": config.decoder.out_kernel,
        "decoder.out_activation": config.decoder.out_activation,
        "attention.qk_norm": config.attention.qk_norm,
        "attention.upcast": config.attention.upcast,
        "transformer.linear_projection": bool(config.transformer and config.transformer.linear_projection),
        "transformer.grounding": config.transformer and config.transformer.grounding,
        "channels": [[b.out_channels for b in level.blocks] for level in plan.encoder],
        "mid.depth": len(plan.mid.blocks),
        "decoder.channels": [[b.out_channels for b in level.blocks] for level in plan.decoder],
        "resblock.residual_scale": [b.residual_scale for level in plan.encoder + plan.decoder for b in level.blocks],
        "mid.residual_scale": [b.residual_scale for b in plan.mid.blocks],
        **_attentions("encoder", plan.encoder),
        **_attentions("mid", (plan.mid,)),
        **_attentions("decoder", plan.decoder),
    }


def _attentions(side: str, levels: tuple[LevelPlan, ...]) -> dict[str, list[Any]]:
    """List each property of the attention layers, block by block; None where a block has no attention."""
    blocks = [block for level in levels for block in level.blocks]
    described: dict[str, list[Any]] = {}
    for field in dataclasses.fields(AttentionPlan):
        values: list[Any] = [block.attention and getattr(block.attention, field.name) for block in blocks]
        if field.name == "norm":  # the group count in the place of the rule that gave it
            values = [norm and (norm.groups(b.out_channels), norm.eps) for norm, b in zip(values, blocks, strict=True)]
        described[f"{side} attention's {field.name}"] = values
    return described
