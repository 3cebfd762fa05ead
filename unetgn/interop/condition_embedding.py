"""Reads of the options of diffusers' UNet2DConditionModel what conditions it, and how that is embedded."""

from unetgn.interop.condition_options import ADDED, PROJECTIONS, ConditionOptions
from unetgn.interop.diffusers_unet2d import activation, class_embedding
from unetgn.nn.embedding import TimeConfig
from unetgn.unet.config import ConditionConfig


def translate_time(options: ConditionOptions) -> TimeConfig:
    """Translate how the timestep is embedded."""
    order = "cos_sin" if options.flip_sin_to_cos else "sin_cos"
    first, after = options.block_out_channels[0], options.timestep_post_act
    post = None if after is None else activation(after)
    if options.time_embedding_type == "fourier":
        width = options.time_embedding_dim or 2 * first
        return TimeConfig(
            features="fourier",
            order=order,  # type: ignore[arg-type]
            # the shift is that of the size numbers' features, where there are any
            frequency_shift=options.freq_shift if options.addition_embed_type == "text_time" else 0.0,
            width=width,
            embedding_width=width,
            fourier_scale=1.0,
            activation=activation(options.act_fn),
            post_activation=post,
        )
    return TimeConfig(
        order=order,  # type: ignore[arg-type]
        frequency_shift=options.freq_shift,
        embedding_width=options.time_embedding_dim,
        activation=activation(options.act_fn),
        post_activation=post,
    )


def translate_condition(options: ConditionOptions, *, attends: bool) -> ConditionConfig:
    """Translate what else is embedded, and what becomes of the context of a model that `attends`."""
    projected = options.projection_class_embeddings_input_dim
    added = options.addition_embed_type if options.addition_embed_type in ADDED else None
    context, width = options.cross_attention_dim, options.encoder_hid_dim
    widths = {"text": width or context, "text_image": context, "image": width, "image_hint": width, None: None}
    own = activation(options.act_fn)
    applied = [] if options.time_embedding_act_fn is None else [activation(options.time_embedding_act_fn)]
    applied += [] if options.resnet_skip_time_act else [own]
    return ConditionConfig(
        class_embedding=class_embedding(options.class_embed_type),
        class_dim=projected if options.class_embed_type in ("projection", "simple_projection") else None,
        null_class=False,
        class_entry="concat" if options.class_embeddings_concat else "after_mlp",
        vector_dim=projected if options.addition_embed_type == "text_time" else None,
        context_projection=PROJECTIONS[options.encoder_hid_dim_type or "text_proj"] if attends else "text",  # type: ignore[arg-type]
        context_dim=width if attends else None,
        added_embedding=added,  # type: ignore[arg-type]
        added_dim=widths[added],  # type: ignore[arg-type]
        added_heads=options.addition_embed_type_num_heads if added == "text" else None,
        activations=None if applied == [own] else tuple(applied),
    )
