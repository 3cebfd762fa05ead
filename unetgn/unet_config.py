"""The configuration of the U-Net: one frozen dataclass, with the blocks' own as its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unetgn.nn.attention import AttentionConfig
from unetgn.nn.conv import check_spatial_dims
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig, ResampleKind
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.serialize import from_plain, to_plain


@dataclass(frozen=True)
class ConditionConfig:
    """What enters the network beside the image and the timestep; the class count itself is `num_classes`."""

    null_class: bool = True
    """One more last row of the class table, for missing and dropped labels."""
    missing_class: Literal["error", "zeros"] = "error"
    """Without a null class: missing labels are an "error", or "zeros" as in EDM."""
    class_entry: Literal["before_mlp", "after_mlp"] = "after_mlp"
    """The class joins the time features "before_mlp" (SongUNet) or the embedding "after_mlp"."""
    class_bias: bool = False
    """A bias beside the class table (SongUNet)."""
    class_scale: float = 1.0
    """A factor on the labels; sqrt(classes) in SongUNet."""
    augment_dim: int | None = None
    """Width of augmentation labels, which join the time features (EDM); None takes none."""
    vector_dim: int | None = None
    """Width of a vector that joins the embedding through an MLP of its own (Stable Diffusion XL); None takes none."""


@dataclass(frozen=True)
class EncoderConfig:
    """What the encoder has of its own; None is as described by the U-Net's other fields."""

    stem_channels: int | None = None
    """Width after the first convolution; None is the first level's (SongUNet has another)."""
    stem_kernel: int = 3
    """Kernel size of the first convolution."""
    attention_blocks: tuple[tuple[int, ...], ...] | None = None
    """For each level, which of its blocks attend, instead of `attention_levels`."""
    resample: tuple[ResampleKind, ...] | None = None
    """For each level but the last, its own kind of resampling; None is `resample.kind` for all."""
    residual_input: bool = False
    """NCSN++'s input branch, which adds the convolved and filtered image at each lower level."""


@dataclass(frozen=True)
class MidConfig:
    """The blocks between encoder and decoder, at the last level's resolution."""

    depth: int = 2
    """Residual blocks; 0 leaves the middle out."""
    attention: bool = True
    """Attention after the first block."""
    attention_norm: bool = True
    """Whether that attention has a norm."""
    attention_num_groups: int | None = None
    """Groups of that norm; None is the attention's."""
    residual_scale: float | None = None
    """As in ResBlockConfig; None is `resblock.residual_scale`."""
    transformer_depth: int | None = None
    """As in TransformerConfig; None is the last level's."""
    cross_only: bool = False
    """The first attention of the transformer reads the context too."""


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder has of its own; None is as in the encoder. Levels are counted as there, finest first."""

    channels: tuple[int, ...] | None = None
    """Width of each level; None is the encoder's."""
    depth: tuple[int, ...] | None = None
    """Blocks of each level; None is one for each skip connection, which is also the least: further blocks take none."""
    attention_blocks: tuple[tuple[int, ...], ...] | None = None
    """For each level, which of its blocks attend; None is all where the encoder attends."""
    num_heads: int | tuple[int, ...] | None = None
    """As in AttentionConfig; None is the encoder's."""
    transformer_depth: tuple[int | tuple[int, ...], ...] | None = None
    """As `depth` in TransformerConfig; None is the encoder's."""
    resample: tuple[ResampleKind, ...] | None = None
    """For each level but the first, the kind of resampling that leaves it; None is `resample.kind` for all."""
    out_kernel: int = 3
    """Kernel size of the last convolution."""


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides which U-Net this is. All levels are counted from 0, the finest.

    Raises ValueError, naming the field, where fields contradict each other.
    """

    sample_size: int | tuple[int, ...] | None = None
    """The resolution that pipelines ask for; the network takes any size."""
    in_channels: int = 3
    """Channels of the input."""
    out_channels: int = 3
    """Channels of the output."""
    spatial_dims: int = 2
    """1, 2 or 3 spatial axes."""
    channels: tuple[int, ...] = (64, 128, 128)
    """Width of each level."""
    depth: int | tuple[int, ...] = 2
    """Residual blocks of each level: one number for all, or one for each."""
    attention_levels: tuple[int, ...] = (1,)
    """Levels whose blocks attend, in the encoder and the decoder."""
    num_classes: int | None = None
    """Classes that condition the network; None is unconditional."""
    dropout: float = 0.0
    """Probability of dropout in residual blocks."""
    time_cond_proj_dim: int | None = None
    """Width of the guidance-scale embedding of distilled models; None takes none."""
    addition_time_embed_dim: int | None = None
    """Width of the features of each of Stable Diffusion XL's size numbers; None takes none."""
    time: TimeConfig = field(default_factory=TimeConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    resblock: ResBlockConfig = field(default_factory=ResBlockConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    transformer: TransformerConfig | None = None
    """Spatial transformers in the place of self-attention; None has none."""
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    mid: MidConfig = field(default_factory=MidConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        check_spatial_dims(self.spatial_dims)
        if not self.channels:
            raise ValueError("channels must name at least one level")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, or None for an unconditional network, got {self.num_classes}"
            )
        self._check_lengths()
        if min(self.depths) < 0 or min(self.channels) < 1:
            raise ValueError(f"depth={self.depth} and channels={self.channels} must be at least 0 and 1 at each level")
        self._check_attention()
        self._check_resampling()
        self._check_conditions()
        self.resample.axis_strides(self.spatial_dims)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """From plain nested dicts; an unknown key is a ValueError that names it, a wrong type a TypeError."""
        return from_plain(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, with lists for tuples, such that from_dict gives this configuration again."""
        return to_plain(self)

    @property
    def depths(self) -> tuple[int, ...]:
        """Residual blocks of each encoder level."""
        return (self.depth,) * len(self.channels) if isinstance(self.depth, int) else self.depth

    @property
    def encoder_resample(self) -> tuple[ResampleKind, ...]:
        """The kind of resampling that leaves each encoder level but the last."""
        return self.encoder.resample or (self.resample.kind,) * (len(self.channels) - 1)

    @property
    def decoder_resample(self) -> tuple[ResampleKind, ...]:
        """The kind of resampling that leaves each decoder level but the first, in the order of levels."""
        return self.decoder.resample or (self.resample.kind,) * (len(self.channels) - 1)

    @property
    def stem_channels(self) -> int:
        return self.encoder.stem_channels or self.channels[0]

    @property
    def feature_width(self) -> int:
        """Width of the time features."""
        return self.time.width or self.channels[0]

    @property
    def embedding_width(self) -> int:
        """Width of the embedding that the blocks receive."""
        return self.time.embedding_width or 4 * self.feature_width

    def _check_attention(self) -> None:
        levels, blocks = len(self.channels), self.encoder.attention_blocks
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise ValueError(
                    f"attention_levels={self.attention_levels} names level {level}, but channels={self.channels} has "
                    f"levels 0 to {levels - 1}"
                )
        if self.attention_levels and blocks is not None:
            raise ValueError("attention_levels and encoder.attention_blocks contradict each other: give one of them")
        for name, per_level, depths in (
            ("encoder.attention_blocks", blocks, self.depths),
            ("decoder.attention_blocks", self.decoder.attention_blocks, self.decoder.depth),
        ):
            for level, chosen in enumerate(per_level or ()):
                if depths is not None and any(not 0 <= block < depths[level] for block in chosen):
                    raise ValueError(f"{name} names blocks {chosen} of level {level}, which has {depths[level]}")
        if self.transformer is None and (self.mid.cross_only or self.mid.transformer_depth is not None):
            raise ValueError("mid.cross_only and mid.transformer_depth need a transformer")
        cross_only = () if self.transformer is None else self.transformer.cross_only
        for level in cross_only:
            if not 0 <= level < levels:
                raise ValueError(f"transformer.cross_only={cross_only} names level {level} of {levels}")
        if self.mid.attention_num_groups is not None and not self.mid.attention_norm:
            raise ValueError("mid.attention_num_groups and mid.attention_norm=False contradict each other")

    def _check_conditions(self) -> None:
        condition = self.condition
        if self.addition_time_embed_dim is not None and condition.vector_dim is None:
            raise ValueError(f"addition_time_embed_dim={self.addition_time_embed_dim} needs condition.vector_dim")
        plain = ConditionConfig()
        for name in ("class_entry", "class_bias", "class_scale"):
            if self.num_classes is None and getattr(condition, name) != getattr(plain, name):
                raise ValueError(f"condition.{name}={getattr(condition, name)!r} needs num_classes")

    def _check_resampling(self) -> None:
        down, up = self.encoder_resample, self.decoder_resample
        if self.resample.padding == "end" and "conv" not in down:
            raise ValueError(f"resample.padding='end' is for strided convolutions, but the encoder has {down}")
        if self.resample.taps != (1.0, 1.0) and set(down + up) == {"conv"} and not self.encoder.residual_input:
            raise ValueError("resample.taps are for 'resblock' and 'plain' resampling, but all of it is 'conv'")

    def _check_lengths(self) -> None:
        levels = len(self.channels)
        expected = {
            "depth": (self.depth, levels),
            "attention.num_heads": (self.attention.num_heads, levels),
            "encoder.attention_blocks": (self.encoder.attention_blocks, levels),
            "encoder.resample": (self.encoder.resample, levels - 1),
            "decoder.channels": (self.decoder.channels, levels),
            "decoder.depth": (self.decoder.depth, levels),
            "decoder.attention_blocks": (self.decoder.attention_blocks, levels),
            "decoder.num_heads": (self.decoder.num_heads, levels),
            "decoder.transformer_depth": (self.decoder.transformer_depth, levels),
            "decoder.resample": (self.decoder.resample, levels - 1),
            "transformer.context_dim": (self.transformer and self.transformer.context_dim, levels),
            "transformer.depth": (self.transformer and self.transformer.depth, levels),
        }
        for name, (value, length) in expected.items():
            if isinstance(value, tuple) and len(value) != length:
                raise ValueError(f"{name}={value} has {len(value)} entries; {levels} levels need {length}")
