"""Defines the configurable U-Net, as a diffusers model."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers import ConfigMixin
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from unetgn.nn.attention import AttentionConfig
from unetgn.nn.checkpointing import CheckpointGrade, recomputed
from unetgn.nn.conv import convolution, zero_parameters
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.unet.adapters import THROUGH_DIFFUSERS, scaled, why_not
from unetgn.unet.beside import NOTHING, embed_boxes, read_masks
from unetgn.unet.config import ConditionConfig, DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.inputs import Conditioning, add_residual, add_residuals, check_sample, check_tensors, is_other_dtype
from unetgn.unet.levels import DecoderLevel, EncoderLevel, Level, MidLevel
from unetgn.unet.loading import Loading
from unetgn.unet.peer_config import PeerConfig
from unetgn.unet.plan import plan_unet
from unetgn.unet.saved import read_config


def _says_something(record: logging.LogRecord) -> bool:
    """Return False for diffusers' advice, at each `to(dtype)`, to keep modules in float32 where it names none."""
    return "in UNet that should be kept in float32: []" not in record.getMessage()


logging.getLogger("diffusers.models.modeling_utils").addFilter(_says_something)
_DEFAULT = UNetConfig()
_recomputed = functools.partial(recomputed, random=True)  # a block has dropout


@dataclass
class UNetOutput(BaseOutput):
    """Holds the network's output: `sample`, (N, out_channels, *spatial)."""

    sample: Tensor


class UNet(Loading, ConfigMixin, Conditioning):
    """Predicts noise, image or velocity from a noisy sample over one, two or three spatial axes.

    The arguments are the fields of `UNetConfig`; nested ones are dataclasses or plain dicts. Attention goes to the
    coarsest level unless `attention_levels` names others. `from_unet_config` takes a whole configuration, `unet_config`
    holds it. As a diffusers model it saves and loads itself (`save_pretrained`, `from_pretrained`, safetensors) and
    works in diffusers' pipelines. A saved pipeline names it `unetgn.unet.UNet`; diffusers loads classes of imported
    modules only: `import unetgn.unet` before `DiffusionPipeline.from_pretrained`.
    Raises ValueError or TypeError, naming the field, where the configuration is wrong.
    Ho et al. 2020 (arXiv 2006.11239), appendix B; Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3; Karras et al.
    2022 (arXiv 2206.00364), appendix F.
    """

    __module__ = "unetgn.unet"  # its permanent name
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: list[str] | None = ["time_proj"]  # noqa: RUF012 - for from_pretrained: see FourierFeatures
    _no_split_modules: ClassVar[list[str]] = ["ResBlock", "SelfAttention", "AddedKVAttention", "SpatialTransformer"]
    _repeated_blocks: ClassVar[list[str]] = _no_split_modules  # for compile_repeated_blocks

    def __init__(
        self,
        *,
        sample_size: int | Sequence[int] | None = _DEFAULT.sample_size,
        in_channels: int = _DEFAULT.in_channels,
        out_channels: int = _DEFAULT.out_channels,
        spatial_dims: int = _DEFAULT.spatial_dims,
        channels: Sequence[int] = _DEFAULT.channels,
        depth: int | Sequence[int] = _DEFAULT.depth,
        attention_levels: Sequence[int] | None = _DEFAULT.attention_levels,
        num_classes: int | None = _DEFAULT.num_classes,
        dropout: float = _DEFAULT.dropout,
        time_cond_proj_dim: int | None = _DEFAULT.time_cond_proj_dim,
        addition_time_embed_dim: int | None = _DEFAULT.addition_time_embed_dim,
        time: TimeConfig | Mapping[str, Any] = _DEFAULT.time,
        condition: ConditionConfig | Mapping[str, Any] = _DEFAULT.condition,
        norm: NormConfig | Mapping[str, Any] = _DEFAULT.norm,
        resblock: ResBlockConfig | Mapping[str, Any] = _DEFAULT.resblock,
        attention: AttentionConfig | Mapping[str, Any] = _DEFAULT.attention,
        transformer: TransformerConfig | Mapping[str, Any] | None = _DEFAULT.transformer,
        resample: ResampleConfig | Mapping[str, Any] = _DEFAULT.resample,
        encoder: EncoderConfig | Mapping[str, Any] = _DEFAULT.encoder,
        mid: MidConfig | Mapping[str, Any] = _DEFAULT.mid,
        decoder: DecoderConfig | Mapping[str, Any] = _DEFAULT.decoder,
        **kwargs: Any,
    ) -> None:
        given = locals()
        super().__init__()
        options = {field.name: given[field.name] for field in fields(UNetConfig)}
        private = {key: value for key, value in kwargs.items() if key.startswith("_")}  # diffusers' own, of a `config`
        more = {key: value for key, value in kwargs.items() if key not in private}
        self.unet_config = UNetConfig.from_dict(options | more)  # which names what is no field, and the nearest one
        self.register_to_config(**private, **self.unet_config.to_dict())
        self._keep_in_fp32_modules = None  # in `to`, FourierFeatures sees to it itself
        self.checkpointing: CheckpointGrade = "none"
        self.build_conditions(self.unet_config)
        self._build_levels(self.unet_config)

    def extra_repr(self) -> str:
        """Say what training left out."""
        return "" if self.unet_config.condition.null_class_trained else "null_class_trained=False"

    def _build_levels(self, config: UNetConfig) -> None:
        plan, dims = plan_unet(config), config.spatial_dims
        self._sample_channels = config.sample_channels  # found once
        self.conv_in = convolution(dims, config.in_channels, config.stem_channels, config.encoder.stem_kernel)
        self.down_blocks = nn.ModuleList(EncoderLevel(config, level) for level in plan.encoder)
        self.mid_block = MidLevel(config, plan.mid)
        self.up_blocks = nn.ModuleList(DecoderLevel(config, level) for level in plan.decoder)
        self._skips_taken = [sum(block.skip for block in level.blocks) for level in plan.decoder]
        width = plan.decoder[-1].channels
        self.conv_norm_out = config.norm.build(width, activation=config.decoder.out_activation)
        self.conv_out = convolution(dims, width, config.out_channels, config.decoder.out_kernel)
        if config.resblock.zero_init:
            zero_parameters(self.conv_out)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predict from a noisy `sample` at `timestep`.

        Shapes: sample (N, in_channels, *spatial), any size; timestep a number or (N,); encoder_hidden_states
        (N, M, context_dim); class_labels (N,) integers or (N, classes) rows; augment_labels (N, augment_dim);
        added_cond_kwargs {"text_embeds": (N, D), "time_ids": (N, K)} or {"vector": (N, vector_dim)}, or what
        condition.added_embedding and condition.context_projection name, and for IP-Adapters {"image_embeds":
        [(N, images, …), …]}; timestep_cond (N, time_cond_proj_dim);
        masks, 1 or True for what is read and 0 for what is not: encoder_attention_mask (N, length of the context that
        attention reads, after its projection), attention_mask (N, pixels of the level) in transformers, the context's
        instead where pixels and context are attended to together (Karlo), `unetgn.unet.beside`;
        ControlNet's residuals, one for each skip connection and one for the middle; T2I-Adapter's
        (down_intrablock_additional_residuals), one for each encoder level from the first on, and one for the middle.
        cross_attention_kwargs={"scale": s} multiplies adapters (LoRA) by s; {"gligen": …} gives boxes where
        transformer.grounding reads them.
        Returns an object with `.sample` (N, out_channels, *spatial), or a tuple of it where return_dict is False.
        Raises ValueError where an input is missing, misshapen, or not one of this network's; TypeError where it is
        no tensor.
        """
        if cross_attention_kwargs and set(cross_attention_kwargs) != {"gligen"}:
            with scaled(self, cross_attention_kwargs):
                return UNet.forward(
                    self,
                    sample,
                    timestep,
                    encoder_hidden_states,
                    class_labels=class_labels,
                    augment_labels=augment_labels,
                    added_cond_kwargs=added_cond_kwargs,
                    timestep_cond=timestep_cond,
                    attention_mask=attention_mask,
                    encoder_attention_mask=encoder_attention_mask,
                    cross_attention_kwargs={"gligen": cross_attention_kwargs.get("gligen")},
                    down_block_additional_residuals=down_block_additional_residuals,
                    mid_block_additional_residual=mid_block_additional_residual,
                    down_intrablock_additional_residuals=down_intrablock_additional_residuals,
                    return_dict=return_dict,
                )
        self._check_inputs(sample, encoder_hidden_states)

        # Conditions.
        images: tuple[Tensor, ...] = ()
        if isinstance(self.encoder_hid_proj, MultiIPAdapterImageProjection):  # as has_ip_adapters, in this file
            added_cond_kwargs, images = self.read_images(added_cond_kwargs, sample.shape[0])
        emb = self.embed(
            sample, timestep, class_labels, augment_labels, added_cond_kwargs, timestep_cond, encoder_hidden_states
        )
        context = self.project_context(encoder_hidden_states, added_cond_kwargs, sample)
        beside = NOTHING
        if attention_mask is not None or encoder_attention_mask is not None:
            beside = read_masks(self.unet_config, attention_mask, encoder_attention_mask, context, sample)
        if cross_attention_kwargs:
            beside = beside._replace(objects=embed_boxes(self.position_net, cross_attention_kwargs, sample.shape[0]))
        if images:
            beside = beside._replace(images=images)
        sample = self.join_hint(sample, added_cond_kwargs)

        # Encoder.
        x, image = self.conv_in(sample), sample
        skips = [x]
        inner = self._residuals(down_intrablock_additional_residuals)
        for level, residual in zip(self.down_blocks, inner, strict=False):
            x, image, results = level(x, image, emb, context, beside, residual)
            skips += results
        if down_block_additional_residuals is not None:
            skips = add_residuals(skips, down_block_additional_residuals)

        # Middle.
        x = self.mid_block(x, emb, context, beside)
        if inner[-1] is not None:
            x = add_residual(x, inner[-1], "the last of down_intrablock_additional_residuals")
        if mid_block_additional_residual is not None:
            x = add_residual(x, mid_block_additional_residual, "mid_block_additional_residual")

        # Decoder.
        for level, taken in zip(self.up_blocks, self._skips_taken, strict=True):
            first = len(skips) - taken
            skips, own = skips[:first], tuple(skips[first:])
            size = tuple((skips[-1] if skips else x).shape[2:])
            x = level(x, own, size, emb, context, beside)
        x = recomputed(self._output, x) if self.checkpointing == "activations" else self._output(x)

        return UNetOutput(sample=x) if return_dict else (x,)

    def __getattr__(self, name: str) -> Any:
        if name in THROUGH_DIFFUSERS:
            raise AttributeError(why_not(name))
        return super().__getattr__(name)

    def _output(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv_norm_out(x))

    def _residuals(self, given: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        """Return T2I-Adapter's residual of each encoder level and of the middle, None where there is none."""
        levels, given = len(self.down_blocks), given or ()
        most = levels + (len(self.mid_block.resnets) > 0)
        if len(given) > most:
            places = f"each of {levels} levels{' and the middle' if most > levels else ', and this has no middle'}"
            raise ValueError(f"down_intrablock_additional_residuals must be one for {places}, got {len(given)}")
        return [*given, *[None] * (levels + 1 - len(given))]

    def _check_inputs(self, sample: Tensor, context: Tensor | None) -> None:
        check_tensors(sample=sample, encoder_hidden_states=context)
        check_sample(sample, self.unet_config, self._sample_channels)
        # `dtype` walks over all modules, to see what layerwise casting computes in: asked where it may be an error only
        if is_other_dtype(sample, cast(Tensor, self.conv_in.weight).dtype) and sample.dtype != self.dtype:
            raise ValueError(f"sample is {sample.dtype}, but the network is {self.dtype}: convert one with .to(dtype)")
        if (
            context is not None
            and self.unet_config.transformer is None
            and self.unet_config.attention.context_dim is None
        ):
            raise ValueError("encoder_hidden_states were given, but this network has no transformer")
        if context is not None and is_other_dtype(context, sample.dtype):
            raise ValueError(f"encoder_hidden_states are {context.dtype}, but sample is {sample.dtype}")

    @property
    def config(self) -> PeerConfig:
        """Return the configuration, which answers for diffusers' options too (`unetgn.unet.peer_config`)."""
        return PeerConfig(self._internal_dict, self._peer_options)

    def _peer_options(self) -> Mapping[str, Any]:
        from unetgn.interop.to_diffusers import options_of  # interop stands above this file

        return options_of(self.unet_config)

    def set_checkpointing(self, grade: CheckpointGrade) -> None:
        """Set what the backward pass computes again: "none", norms and "activations" only, or whole "blocks"."""
        if grade not in ("none", "activations", "blocks"):
            raise ValueError(f"checkpointing must be 'none', 'activations' or 'blocks', got {grade!r}")
        self._set_checkpointing(grade, _recomputed)

    def _set_checkpointing(self, grade: CheckpointGrade, function: Callable[..., Any]) -> None:
        self.checkpointing = grade
        for module in self.modules():
            if isinstance(module, Level):
                module.checkpoint = function if grade == "blocks" else None
            elif hasattr(module, "recompute"):
                module.recompute = grade == "activations"

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Compute whole blocks again, as `set_checkpointing("blocks")`: what diffusers calls it.

        `gradient_checkpointing_func(block, *inputs)` returns what `block(*inputs)` does; for the default see
        `unetgn.nn.checkpointing`.
        """
        self._set_checkpointing("blocks", gradient_checkpointing_func or _recomputed)

    def disable_gradient_checkpointing(self) -> None:
        """Call `set_checkpointing("none")`, whose name in diffusers this is."""
        self.set_checkpointing("none")

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Return True where the backward pass computes anything again; diffusers asks by this name."""
        return self.checkpointing != "none"

    @classmethod
    def from_unet_config(cls, config: UNetConfig) -> "UNet":
        """Build a network of this configuration, randomly initialised."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(UNetConfig)})

    @classmethod
    def from_diffusers(cls, model_or_folder: nn.Module | str | Path, *, variant: str | None = None) -> "UNet":
        """Convert a diffusers model, or a folder that one was saved to: `unetgn.interop.from_diffusers`."""
        from unetgn.interop import from_diffusers  # interop stands above this file

        return from_diffusers(model_or_folder, variant=variant)

    def _initialize(self, keys: Sequence[str]) -> None:
        """Give the named tensors the values of a new network: diffusers leaves unwritten memory there."""
        fresh = type(self).from_unet_config(self.unet_config).state_dict() if keys else {}
        state = self.state_dict()
        for key in keys:
            state[key].copy_(fresh[key])

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read config.json or a model's `config` as ConfigMixin does: what `unetgn.unet.saved` says."""
        config = read_config(config_dict, kwargs, cls.__name__)
        arguments, unused, hidden = super().extract_init_dict(config.known, **kwargs)
        unused |= {key: value for key, value in config.others.items() if key != "dtype"}  # `from_config` would take it
        return arguments, unused, hidden | config.kept_beside(arguments)


if not hasattr(diffusers, "UNet"):  # where AutoModel looks for the class of a folder; it has no register
    diffusers.UNet = UNet


def empty_unet(config: UNetConfig) -> UNet:
    """Build a U-Net on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return UNet.from_unet_config(config)
