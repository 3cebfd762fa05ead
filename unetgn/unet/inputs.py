"""Takes what a U-Net is given beside the image: checks it, embeds it, joins the results.

Checks come before torch complains in its own words or broadcasts without one. They look at shapes and dtypes alone:
they cost nothing on a GPU and leave no trace in a compiled graph.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from unetgn.nn.added_embedding import (
    HintEmbedding,
    ImageEmbedding,
    ImageProjection,
    TextEmbedding,
    TextImageEmbedding,
    TextImageProjection,
)
from unetgn.nn.attention import check_context
from unetgn.nn.embedding import (
    AugmentEmbedding,
    ClassEmbedding,
    FourierFeatures,
    SinusoidalFeatures,
    TimeConfig,
    TimestepEmbedding,
    feature_dtype,
)
from unetgn.nn.grounding import box_embedding
from unetgn.nn.norm import Activation, activate
from unetgn.unet.config import ConditionConfig, UNetConfig


class Conditioning:
    """Gives `UNet`, which is a module, its conditioning layers; their parameters have flat names in the network.

    Fields of `ConditionConfig` say which layers there are.
    """

    unet_config: UNetConfig
    _activations: tuple[Activation, ...]  # found once: a configuration derives it anew each time

    def build_conditions(self, config: UNetConfig) -> None:
        """Build the layers that `config` asks for."""
        time, condition = config.time, config.condition
        features, width = config.feature_width, config.time_width
        self._activations = config.embedding_activations
        if time.features == "fourier":
            self.time_proj: nn.Module = FourierFeatures(features, order=time.order, scale=time.fourier_scale)
        else:
            self.time_proj = _sinusoid(features, time)
        self.time_embedding = TimestepEmbedding(
            features,
            width,
            cond_channels=config.time_cond_proj_dim,
            activation=time.activation,
            post_activation=time.post_activation,
        )
        self.class_embedding = _class_layer(config, features if condition.class_entry == "before_mlp" else width)
        self.augment_embedding = self.add_time_proj = None
        if condition.augment_dim is not None:
            self.augment_embedding = AugmentEmbedding(condition.augment_dim, features)
        self.add_embedding = _added_layer(condition, width)
        if config.addition_time_embed_dim is not None:
            self.add_time_proj = _sinusoid(config.addition_time_embed_dim, time)
        self.encoder_hid_proj: Any = None
        self.text_encoder_hid_proj: Any = None  # the former, while IP-Adapters take its name (`unetgn.unet.ip_adapter`)
        self.position_net = None
        if config.transformer is not None and config.transformer.grounding is not None:
            self.position_net = box_embedding(cast(int, config.transformer.context_dim), config.transformer.grounding)
        if condition.context_dim is not None:
            kind = CONTEXT_LAYERS[condition.context_projection]
            self.encoder_hid_proj = kind(condition.context_dim, cast(int, config.context_dims))

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Compute the embedding (N, embedding_width) that the blocks receive; arguments are those of `forward`.

        Of encoder_hidden_states only condition.added_embedding="text" makes anything here.
        """
        config, batch, dtype = self.unet_config, sample.shape[0], sample.dtype
        check_tensors(class_labels=class_labels, augment_labels=augment_labels, timestep_cond=timestep_cond)
        check_tensors(**(added_cond_kwargs or {}))
        timesteps = as_timesteps(timestep, batch, sample)
        labelled, entry = self._embed_class(class_labels, batch, dtype), config.condition.class_entry

        hidden = self.time_proj(timesteps, feature_dtype(dtype)).to(dtype)
        if labelled is not None and entry == "before_mlp":
            hidden = hidden + labelled
        if augment_labels is not None:
            if self.augment_embedding is None:
                raise ValueError("augment_labels were given, but condition.augment_dim is None")
            check_rows("augment_labels", augment_labels, batch, config.condition.augment_dim, "condition.augment_dim")
            hidden = hidden + self.augment_embedding(augment_labels.to(dtype))
        if timestep_cond is not None and config.time_cond_proj_dim is not None:
            check_rows("timestep_cond", timestep_cond, batch, config.time_cond_proj_dim, "time_cond_proj_dim")
        emb = self.time_embedding(hidden, timestep_cond)
        if labelled is not None and entry == "after_mlp":
            emb = emb + labelled
        elif labelled is not None and entry == "concat":
            emb = torch.cat([emb, labelled], dim=1)
        added = self._added(added_cond_kwargs or {}, encoder_hidden_states, batch, dtype)
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(*added)
        for activation in self._activations:
            emb = activate(emb, activation)
        return emb

    def project_context(
        self, context: Tensor | None, added_cond_kwargs: Mapping[str, Tensor] | None, sample: Tensor
    ) -> Tensor | None:
        """Make what attention reads of encoder_hidden_states, of "image_embeds", or of both."""
        kind, width = self.unet_config.condition.context_projection, self.unet_config.condition.context_dim
        project = self.encoder_hid_proj if self.text_encoder_hid_proj is None else self.text_encoder_hid_proj
        if project is None or width is None:
            return context
        given, batch = added_cond_kwargs or {}, sample.shape[0]
        if kind == "image":
            if context is not None:
                raise ValueError("encoder_hidden_states were given, but condition.context_projection is 'image'")
            return project(_rows("image_embeds", given, batch, width, "condition.context_dim", sample))
        check_context(context, batch, width)
        if kind == "text":
            return project(context)
        own = cast(int, self.unet_config.context_dims)
        image = _rows("image_embeds", given, batch, own, "that of the context that attention reads", sample)
        return project(context, image)

    def join_hint(self, sample: Tensor, added_cond_kwargs: Mapping[str, Tensor] | None) -> Tensor:
        """Append the channels that a hint, a picture of eight times the sample's size, becomes."""
        if not isinstance(self.add_embedding, HintEmbedding):
            return sample
        hint = (added_cond_kwargs or {})["hint"]  # which `embed` has seen to
        size = tuple(8 * length for length in sample.shape[2:])
        if hint.shape != (sample.shape[0], 3, *size):
            expected = (sample.shape[0], 3, *size)
            raise ValueError(f"the hint must be {expected}, eight times the sample's size, got {tuple(hint.shape)}")
        return torch.cat([sample, self.add_embedding.hint(hint.to(sample.dtype))], dim=1)

    def _embed_class(self, labels: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        kind = self.unet_config.condition.class_embedding
        if isinstance(self.class_embedding, ClassEmbedding):
            return self.class_embedding(labels, batch)
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("class_labels were given, but num_classes is None")
            return None
        if labels is None:
            raise ValueError(f"class_labels are missing: condition.class_embedding={kind!r} has no row for that")
        if kind == "timestep":
            if labels.shape != (batch,):
                raise ValueError(f"class_labels must be ({batch},) numbers, as timesteps, got {tuple(labels.shape)}")
            return self.class_embedding(self.time_proj(labels, feature_dtype(dtype)).to(dtype))
        width, field = self._class_width()
        return self.class_embedding(check_rows("class_labels", labels, batch, width, field).to(dtype))

    def _class_width(self) -> tuple[int | None, str]:
        """Give the width of labels that are vectors, and the field that sets it."""
        config = self.unet_config
        if config.condition.class_embedding != "identity":
            return config.condition.class_dim, "condition.class_dim"
        if config.condition.class_entry == "before_mlp":
            return config.feature_width, "that of the time features (time.width)"
        return config.time_width, "that of the embedding (time.embedding_width)"

    def _added(
        self, given: Mapping[str, Tensor], context: Tensor | None, batch: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return what `add_embedding` takes. Raises ValueError for keys of added_cond_kwargs that nothing reads."""
        condition = self.unet_config.condition
        kind, width = condition.added_embedding, condition.added_dim
        projects_image = condition.context_dim is not None and condition.context_projection != "text"
        if condition.vector_dim is not None:
            if projects_image and "image_embeds" not in given:
                raise ValueError(
                    f"added_cond_kwargs has {sorted(given)}, and this network needs 'image_embeds' beside it"
                )
            vector = {name: value for name, value in given.items() if not (projects_image and name == "image_embeds")}
            return (self._vector(vector, batch, dtype),)
        rows = {
            "text_image": ("text_embeds", "image_embeds"),
            "image": ("image_embeds",),
            "image_hint": ("image_embeds",),
        }
        names = rows.get(kind or "", ())
        read = {*names, *(("hint",) if kind == "image_hint" else ())}
        if projects_image:
            read.add("image_embeds")
        if set(given) != read:
            needs = (
                f"this network needs {sorted(read)}"
                if read
                else "but condition.vector_dim is None, nor is it told more"
            )
            raise ValueError(f"added_cond_kwargs has {sorted(given)}, {needs}")
        if kind == "text":
            check_context(context, batch, cast(int, width))
            return (cast(Tensor, context),)
        return tuple(check_rows(name, given[name], batch, width, "condition.added_dim").to(dtype) for name in names)

    def _vector(self, added: Mapping[str, Tensor], batch: int, dtype: torch.dtype) -> Tensor:
        """Return the conditioning vector (N, vector_dim), as given or joined from pooled text and size numbers."""
        if set(added) == {"vector"}:
            vector = added["vector"]
        elif set(added) == {"text_embeds", "time_ids"} and self.add_time_proj is not None:
            numbers, pooled = added["time_ids"], added["text_embeds"]
            if numbers.ndim != 2 or pooled.ndim != 2 or not numbers.shape[0] == pooled.shape[0] == batch:
                shapes = f"{tuple(pooled.shape)} and {tuple(numbers.shape)}"
                raise ValueError(f"text_embeds and time_ids must be ({batch}, D) and ({batch}, K), got {shapes}")
            features = self.add_time_proj(numbers.flatten(), feature_dtype(dtype)).to(dtype)
            vector = torch.cat([pooled.to(dtype), features.reshape(batch, -1)], dim=1)
        else:
            raise ValueError(
                "this network needs added_cond_kwargs with 'vector', or with 'text_embeds' and 'time_ids' where "
                f"addition_time_embed_dim is set; got {sorted(added)}"
            )
        width = self.unet_config.condition.vector_dim
        return check_rows("the conditioning vector", vector, batch, width, "condition.vector_dim").to(dtype)


CONTEXT_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "text": nn.Linear,
    "text_image": TextImageProjection,
    "image": ImageProjection,
}


def _rows(name: str, given: Mapping[str, Tensor], batch: int, width: int, field: str, sample: Tensor) -> Tensor:
    return check_rows(name, given[name], batch, width, field).to(sample.dtype)


def _added_layer(condition: ConditionConfig, width: int) -> nn.Module | None:
    """Build the layer whose result is added to the embedding."""
    if condition.vector_dim is not None:
        return TimestepEmbedding(condition.vector_dim, width)
    if condition.added_dim is None:
        return None
    if condition.added_embedding == "text":
        return TextEmbedding(condition.added_dim, width, num_heads=cast(int, condition.added_heads))
    kinds = {"text_image": TextImageEmbedding, "image": ImageEmbedding, "image_hint": HintEmbedding}
    return kinds[cast(str, condition.added_embedding)](condition.added_dim, width)


def _class_layer(config: UNetConfig, width: int) -> nn.Module | None:
    """Build the layer that turns class labels into (N, width)."""
    condition = config.condition
    if config.num_classes is not None:
        return ClassEmbedding(
            config.num_classes,
            width,
            null_class=condition.null_class,
            missing=condition.missing_class,
            null_class_trained=condition.null_class_trained or not condition.null_class,
            bias=condition.class_bias,
            scale=condition.class_scale,
        )
    if condition.class_embedding == "timestep":
        return TimestepEmbedding(config.feature_width, width, activation=config.time.activation)
    if condition.class_embedding == "identity":
        return nn.Identity()
    if condition.class_dim is None:
        return None
    if condition.class_embedding == "projection":
        return TimestepEmbedding(condition.class_dim, width)
    return nn.Linear(condition.class_dim, width)


def _sinusoid(width: int, time: TimeConfig) -> SinusoidalFeatures:
    return SinusoidalFeatures(
        width, order=time.order, frequency_shift=time.frequency_shift, frequencies=time.frequencies
    )


def check_tensors(**given: Any) -> None:
    """Raise TypeError, naming the argument, where one is neither a tensor nor None."""
    for name, value in given.items():
        if isinstance(value, torch.fx.Proxy):
            raise TypeError(
                f"torch.fx.symbolic_trace cannot follow this network, which looks at the shape of {name}; "
                "torch.export.export and make_fx can"
            )
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def as_timesteps(timestep: Tensor | float | int, batch: int, sample: Tensor) -> Tensor:
    """Return (N,) timesteps on the sample's device, from a number, one element or N. Raises TypeError for else."""
    if not isinstance(timestep, Tensor):
        if not isinstance(timestep, Real):
            raise TypeError(f"timestep must be a number or a tensor, got {timestep!r}")
        timestep = torch.tensor(timestep, dtype=feature_dtype(sample.dtype), device=sample.device)
    timesteps = timestep.to(sample.device).reshape(-1)
    count = timesteps.shape[0]
    if count != batch and count != 1:  # `in` would compare symbolic sizes by identity
        raise ValueError(f"timestep must be a number or one for each of {batch} samples, got {count}")
    return timesteps.expand(batch)


def check_sample(sample: Tensor, config: UNetConfig, channels: int) -> None:
    """Raise ValueError where `sample` is not (N, channels, *spatial) with at least one pixel."""
    if sample.ndim != 2 + config.spatial_dims or sample.shape[1] != channels:
        axes = ", ".join("DHW"[-config.spatial_dims :])
        raise ValueError(f"sample must be (N, {channels}, {axes}), got {tuple(sample.shape)}")
    if min(sample.shape[2:]) == 0:
        raise ValueError(f"sample must have at least one pixel along each axis, got {tuple(sample.shape)}")


def is_other_dtype(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return True where `tensor` cannot meet weights of `dtype`; under autocast the layers convert it."""
    return tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type)


def check_rows(name: str, rows: Tensor, batch: int, width: int | None, field: str) -> Tensor:
    """Return `rows`. Raises ValueError where they are not (batch, width); `field` names what sets the width."""
    if rows.ndim != 2 or rows.shape[0] != batch or rows.shape[1] != width:
        raise ValueError(f"{name} must be ({batch}, {width}), its width being {field}, got {tuple(rows.shape)}")
    return rows


def add_residuals(skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Add ControlNet's residuals to the skip connections. Raises ValueError where their number or a shape differs."""
    name = "down_block_additional_residuals"
    if len(residuals) != len(skips):
        raise ValueError(
            f"{name} must be one for each of {len(skips)} skip connections, got {len(residuals)} (those of a "
            "T2I-Adapter are down_intrablock_additional_residuals)"
        )
    pairs = zip(skips, residuals, strict=True)
    return [add_residual(skip, residual, f"{name}[{index}]") for index, (skip, residual) in enumerate(pairs)]


def add_residual(hidden: Tensor, residual: Tensor, name: str) -> Tensor:
    """Return hidden + residual. Raises ValueError, naming the argument `name`, where its shape is another."""
    check_tensors(**{name: residual})
    if residual.shape != hidden.shape:
        raise ValueError(f"{name} must be {tuple(hidden.shape)}, got {tuple(residual.shape)}")
    return hidden + residual
