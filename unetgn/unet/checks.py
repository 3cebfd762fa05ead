"""Checks the fields of a `UNetConfig` against each other: for contradictions, and options that would change nothing.

An option that names a place (a level, the middle, the table of classes) is an error where the network has no such
place; so is a variant of a kind of layer that the network does not have.

Some fields only say how attention is made, wherever there is attention (`attention.*`, `decoder.num_heads`, the depths
of transformers), how levels are joined (`resample.kind`, `resample.strides`), or what a sample without a class gets
(`condition.null_class`, which every family of checkpoints sets). They may stand where there is nothing to make, join or
label: a file that sets `attention_levels` to [] needs no second change. A transformer without any place is an
error all the same, since the network would take a context and never read it.
"""

from collections.abc import Sequence
from typing import Any, get_args

from unetgn.nn.conv import check_spatial_dims
from unetgn.nn.fields import check_at_least, check_choice
from unetgn.nn.resample import BOX, ResampleKind, axis_strides
from unetgn.unet.description import UNetDescription
from unetgn.unet.plan import UNetPlan, plan_unet

MOST = 1000  # levels, blocks of a level, layers of a transformer


def check_unet(config: UNetDescription) -> None:
    """Raise ValueError, naming the field, for the first contradiction in `config`."""
    check_spatial_dims(config.spatial_dims)
    if not config.channels:
        raise ValueError("channels must name at least one level")
    check_at_least(
        1,
        {
            name: getattr(config, name)
            for name in ("sample_size", "in_channels", "out_channels", "time_cond_proj_dim", "addition_time_embed_dim")
        },
    )
    if config.num_classes is not None and config.num_classes < 1:
        raise ValueError(
            f"num_classes must be at least 1, or None for an unconditional network, got {config.num_classes}"
        )
    if not 0 <= config.dropout <= 1:
        raise ValueError(f"dropout is a probability, from 0 to 1, got {config.dropout}")
    _check_lengths(config)
    _check_counts(config)
    if min(config.depths) < 0 or min(config.channels) < 1:
        raise ValueError(f"depth={config.depth} and channels={config.channels} must be at least 0 and 1 at each level")
    _check_attention(config)
    _check_middle(config)
    plan = plan_unet(config)
    _check_kinds(config, plan)
    _check_narrow(config, plan)
    _check_transformer(config, plan)
    _check_added_context(config, plan)
    _check_resampling(config)
    _check_conditions(config)


def _check_counts(config: UNetDescription) -> None:
    """Raise ValueError for what no memory holds: a file may say anything, and a plan of 10^6 blocks takes minutes."""
    transformer = config.transformer
    counts: dict[str, Any] = {
        "the number of channels": len(config.channels),
        "depth": config.depth,
        "decoder.depth": config.decoder.depth,
        "decoder.transformer_depth": config.decoder.transformer_depth,
        "transformer.depth": transformer and transformer.depth,
    }
    for name, value in counts.items():
        if _largest(value) > MOST:
            raise ValueError(f"{name} is {_largest(value)}; at most {MOST} are built")


def _largest(value: Any) -> int:
    if isinstance(value, tuple):
        return max(map(_largest, value), default=0)
    return value or 0


def _check_lengths(config: UNetDescription) -> None:
    levels, transformer = len(config.channels), config.transformer
    expected: dict[str, tuple[Any, int]] = {
        "sample_size": (config.sample_size, config.spatial_dims),
        "depth": (config.depth, levels),
        "attention.num_heads": (config.attention.num_heads, levels),
        "attention.context_dim": (config.attention.context_dim, levels),
        "encoder.attention_blocks": (config.encoder.attention_blocks, levels),
        "encoder.attention_kinds": (config.encoder.attention_kinds, levels),
        "decoder.attention_kinds": (config.decoder.attention_kinds, levels),
        "encoder.resample": (config.encoder.resample, levels - 1),
        "decoder.channels": (config.decoder.channels, levels),
        "decoder.depth": (config.decoder.depth, levels),
        "decoder.attention_blocks": (config.decoder.attention_blocks, levels),
        "decoder.num_heads": (config.decoder.num_heads, levels),
        "decoder.transformer_depth": (config.decoder.transformer_depth, levels),
        "decoder.resample": (config.decoder.resample, levels - 1),
        "transformer.context_dim": (transformer and transformer.context_dim, levels),
        "transformer.depth": (transformer and transformer.depth, levels),
    }
    for name, (value, length) in expected.items():
        if isinstance(value, tuple) and len(value) != length:
            reason = f"{levels} levels need {length}"
            if name == "sample_size":
                reason = f"spatial_dims={length} needs one number, or {length}"
            raise ValueError(f"{name}={value} has {len(value)} entries; {reason}")


def _check_attention(config: UNetDescription) -> None:
    levels, blocks = len(config.channels), config.encoder.attention_blocks
    named = config.attention_levels or ()
    _check_distinct("attention_levels", named)
    for level in named:
        if not 0 <= level < levels:
            raise ValueError(
                f"attention_levels={named} names level {level}, but channels={config.channels} has "
                f"levels 0 to {levels - 1}"
            )
        if config.depths[level] == 0 and config.decoder.attention_blocks is not None:
            raise ValueError(
                f"attention_levels={named} names level {level}, but depth={config.depth} gives the "
                "encoder no block there, and decoder.attention_blocks says where the decoder attends: leave it out"
            )
    if named and blocks is not None:
        raise ValueError("attention_levels and encoder.attention_blocks contradict each other: give one of them")
    for name, per_level, depths in (
        ("encoder.attention_blocks", blocks, config.depths),
        ("decoder.attention_blocks", config.decoder.attention_blocks, config.decoder.depth),
    ):
        for level, chosen in enumerate(per_level or ()):
            _check_distinct(f"{name} of level {level}", chosen)
            if depths is not None and any(not 0 <= block < depths[level] for block in chosen):
                raise ValueError(f"{name} names blocks {chosen} of level {level}, which has {depths[level]}")


def _check_distinct(name: str, chosen: Sequence[int]) -> None:
    twice = sorted({number for number in chosen if chosen.count(number) > 1})
    if twice:
        raise ValueError(f"{name} names {', '.join(map(str, twice))} more than once, in {chosen}: once is enough")


def _check_transformer(config: UNetDescription, plan: UNetPlan) -> None:
    transformer, mid = config.transformer, config.mid
    middle = config.attention_kind("mid", len(config.channels) - 1)
    if (mid.transformer_depth is not None and middle != "transformer") or (mid.cross_only and middle == "self"):
        raise ValueError(
            "mid.transformer_depth needs a transformer, and mid.cross_only one or attention.context_dim; this middle's "
            f"attention is of the kind {middle!r}"
        )
    if transformer is None:
        if config.decoder.transformer_depth is not None:
            raise ValueError(f"decoder.transformer_depth={config.decoder.transformer_depth} needs a transformer")
        return
    if config.attention.context_dim is not None and not _says_kinds(config):
        raise ValueError(
            f"attention.context_dim={config.attention.context_dim} and transformer contradict each other: give one, or "
            "say where each of them is (encoder.attention_kinds)"
        )
    if config.attention.context_dim is not None and config.attention.context_dim != transformer.context_dim:
        raise ValueError(
            f"attention.context_dim={config.attention.context_dim} and transformer.context_dim="
            f"{transformer.context_dim} are of one context: make them equal"
        )
    attentions = [
        [attention for attention in plan.attentions_at(level) if attention.depth is not None]
        for level in range(len(config.channels))
    ]
    everywhere = [attention for attention in plan.attentions if attention.depth is not None]
    if not everywhere:
        raise ValueError(
            "transformer has no place: nothing attends so by attention_levels, encoder.attention_blocks, "
            "decoder.attention_blocks, mid.attention and encoder.attention_kinds; set transformer to None"
        )
    if not any(attention.depth for attention in everywhere):
        raise ValueError(
            f"transformer.depth={transformer.depth} leaves every transformer without a block, so that nothing would "
            "read a context: give it, decoder.transformer_depth or mid.transformer_depth a depth of at least 1"
        )
    _check_cross_only("transformer.cross_only", transformer.cross_only, attentions)
    for level in transformer.cross_only:
        if not any(attention.depth for attention in attentions[level]):
            raise ValueError(
                f"transformer.cross_only={transformer.cross_only} names level {level}, whose transformers have depth 0 "
                "(transformer.depth): leave it out"
            )
    if mid.cross_only and not any(attention.depth for attention in plan.mid.attentions):
        raise ValueError(
            "mid.cross_only=True needs a transformer block in the middle, but its depth is 0 "
            "(mid.transformer_depth, or the last level's transformer.depth)"
        )


def _check_added_context(config: UNetDescription, plan: UNetPlan) -> None:
    attention = config.attention
    if attention.context_dim is None:
        return
    attentions = [
        [attention for attention in plan.attentions_at(level) if attention.kind == "added"]
        for level in range(len(config.channels))
    ]
    if not any(one.kind == "added" for one in plan.attentions):
        raise ValueError(
            f"attention.context_dim={attention.context_dim} has no place: nothing attends so by attention_levels, "
            "encoder.attention_blocks, decoder.attention_blocks, mid.attention and encoder.attention_kinds: leave it "
            "out"
        )
    _check_cross_only("attention.cross_only", attention.cross_only, attentions)


def _says_kinds(config: UNetDescription) -> bool:
    return any((config.encoder.attention_kinds, config.decoder.attention_kinds, config.mid.attention_kind))


def _check_narrow(config: UNetDescription, plan: UNetPlan) -> None:
    """Raise ValueError where attention is to be narrower than its layer, and is so nowhere, or adds a context."""
    if not config.attention.narrow:
        return
    blocks = [block for level in (*plan.encoder, plan.mid, *plan.decoder) for block in level.blocks if block.attention]
    narrow = [b.attention for b in blocks if b.attention and b.attention.inner_channels != b.out_channels]
    if not narrow or any(attention.kind == "added" for attention in narrow):
        reason = "heads divide the width wherever there is attention" if not narrow else "attention that adds a context"
        raise ValueError(f"attention.narrow=True is not for this network: {reason}; leave it out")


def _check_kinds(config: UNetDescription, plan: UNetPlan) -> None:
    """Raise ValueError where kinds of attention are named, and nothing attends there, or nothing differs."""
    sides = {"encoder": plan.encoder, "decoder": plan.decoder, "mid": (plan.mid,)}
    named = {
        "encoder.attention_kinds": (config.encoder.attention_kinds, ("encoder", "mid", "decoder")),
        "decoder.attention_kinds": (config.decoder.attention_kinds, ("decoder",)),
        "mid.attention_kind": (config.mid.attention_kind, ("mid",)),
        "mid.num_heads": (config.mid.num_heads, ("mid",)),
    }
    for name, (value, where) in named.items():
        if value is not None and not any(level.attentions for side in where for level in sides[side]):
            raise ValueError(f"{name}={value!r} has no place: nothing attends there")


def _check_cross_only(name: str, chosen: tuple[int, ...], attentions: Sequence[Sequence[Any]]) -> None:
    """Raise ValueError where levels named in `chosen` are not there, or attend nowhere."""
    _check_distinct(name, chosen)
    for level in chosen:
        if not 0 <= level < len(attentions):
            raise ValueError(f"{name}={chosen} names level {level} of {len(attentions)}")
        if not attentions[level]:
            raise ValueError(f"{name}={chosen} names level {level}, at which nothing attends")


def _check_middle(config: UNetDescription) -> None:
    mid, plain = config.mid, type(config.mid)()
    if mid.depth == 0 and mid.residual_scale is not None:
        raise ValueError(f"mid.residual_scale={mid.residual_scale} needs blocks in the middle, but mid.depth is 0")
    if mid.depth == 0 or not mid.attention:
        reason = "mid.depth is 0" if mid.depth == 0 else "mid.attention is False"
        for name in ("attention_norm", "attention_num_groups", "transformer_depth", "cross_only"):
            if getattr(mid, name) != getattr(plain, name):
                raise ValueError(f"mid.{name}={getattr(mid, name)} needs attention in the middle, but {reason}")
    if mid.attention_num_groups is not None and not mid.attention_norm:
        raise ValueError("mid.attention_num_groups and mid.attention_norm=False contradict each other")


def _check_resampling(config: UNetDescription) -> None:
    resample, down, up = config.resample, config.encoder_resample, config.decoder_resample
    for name, kinds in (("encoder.resample", config.encoder.resample), ("decoder.resample", config.decoder.resample)):
        for kind in kinds or ():
            check_choice(name, kind, get_args(ResampleKind))
    if config.encoder.resample is not None and config.decoder.resample is not None and resample.kind != "conv":
        raise ValueError(f"resample.kind={resample.kind!r}, but encoder.resample and decoder.resample say it for all")
    axis_strides(resample.strides, config.spatial_dims)
    used = set(down + up)
    if resample.padding == "end" and "conv" not in down:
        raise ValueError(f"resample.padding='end' is for strided convolutions, but the encoder has {down}")
    if resample.padding == "end" and set(axis_strides(resample.strides, config.spatial_dims)) == {1}:
        raise ValueError(
            f"resample.padding='end' is for axes that are halved, but resample.strides={resample.strides} halves none"
        )
    if resample.taps != BOX and not used & {"resblock", "plain"} and not config.encoder.residual_input:
        raise ValueError(f"resample.taps are for 'resblock' and 'plain' resampling, but there is {sorted(used)}")
    if config.resblock.project_resampled and "resblock" not in used:
        raise ValueError(f"resblock.project_resampled is for 'resblock' resampling, but there is {sorted(used)}")
    if config.encoder.residual_input:
        if len(config.channels) == 1:
            raise ValueError("encoder.residual_input adds the image at lower levels, but channels names one level")
        if resample.padding == "end" or set(axis_strides(resample.strides, config.spatial_dims)) != {2}:
            raise ValueError(
                "encoder.residual_input halves all axes, rounding up, but resample.padding="
                f"{resample.padding!r} with resample.strides={resample.strides} does not"
            )


def _check_conditions(config: UNetDescription) -> None:
    condition, time, plain = config.condition, config.time, type(config.condition)()
    if config.addition_time_embed_dim is not None and condition.vector_dim is None:
        raise ValueError(f"addition_time_embed_dim={config.addition_time_embed_dim} needs condition.vector_dim")
    table = condition.class_embedding == "table"
    if config.num_classes is not None and not table:
        raise ValueError(
            f"num_classes={config.num_classes} counts the rows of a table, but condition.class_embedding is "
            f"{condition.class_embedding!r}"
        )
    labelled = config.num_classes is not None and condition.null_class
    if not condition.null_class_trained and not labelled and config.context_dims is None:
        raise ValueError(
            "condition.null_class_trained=False needs num_classes and condition.null_class=True, or a context of texts"
        )
    for name in ("class_bias", "class_scale", "missing_class", "class_entry"):
        labelled = config.num_classes is not None or (name == "class_entry" and not table)
        if not labelled and getattr(condition, name) != getattr(plain, name):
            raise ValueError(f"condition.{name}={getattr(condition, name)!r} needs num_classes")
    for name in ("vector_dim", "added_embedding"):
        value = getattr(condition, name)
        if condition.class_entry == "concat" and value is not None:
            raise ValueError(
                f"condition.{name}={value!r} is added to an embedding that condition.class_entry='concat' makes twice "
                "as wide: leave one out"
            )
    if condition.context_dim is not None and not isinstance(config.context_dims, int):
        raise ValueError(
            f"condition.context_dim={condition.context_dim} is projected to the context that attention reads, whose "
            "width (transformer.context_dim or attention.context_dim) must be one number"
        )
    if condition.added_embedding == "text" and condition.added_dim != _given_context(config):
        raise ValueError(
            f"condition.added_dim={condition.added_dim}, but encoder_hidden_states, of which the 'text' is made, are "
            f"{_given_context(config)} wide (condition.context_dim, or what attention reads)"
        )
    if condition.activations is not None and config.resblock.activate_embedding:
        raise ValueError(
            f"condition.activations={condition.activations} are for resblock.activate_embedding=False: blocks that "
            "apply their own"
        )
    if config.sample_channels < 1:
        raise ValueError(
            f"in_channels={config.in_channels}, but the hint of condition.added_embedding='image_hint' takes 4 of them"
        )
    if time.features == "fourier" and config.addition_time_embed_dim is None:
        for name in ("frequency_shift", "frequencies"):
            if getattr(time, name) != getattr(type(time)(), name):
                raise ValueError(
                    f"time.{name}={getattr(time, name)!r} is for sinusoids, but time.features is 'fourier' and "
                    "addition_time_embed_dim is None"
                )


def _given_context(config: UNetDescription) -> Any:
    """Return the width of encoder_hidden_states as a caller gives them, where there is one."""
    if config.condition.context_dim is not None and config.condition.context_projection != "image":
        return config.condition.context_dim
    return config.context_dims
