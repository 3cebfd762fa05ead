"""The configuration of the U-Net: one frozen dataclass, with the blocks' own as its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.fields import check_at_least, check_choice, check_kernel, check_positive, freeze_lists
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig, ResampleKind
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.serialize import from_plain, to_plain
from unetgn.unet.checks import check_unet_config


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
    """A factor on the labels, above 0; sqrt(classes) in SongUNet."""
    augment_dim: int | None = None
    """Width of augmentation labels, which join the time features (EDM); None takes none."""
    vector_dim: int | None = None
    """Width of a vector that joins the embedding through an MLP of its own (Stable Diffusion XL); None takes none."""

    def __post_init__(self) -> None:
        check_choice("condition.missing_class", self.missing_class, ("error", "zeros"))
        check_choice("condition.class_entry", self.class_entry, ("before_mlp", "after_mlp"))
        check_positive("condition.class_scale", self.class_scale)
        check_at_least(1, {"condition.augment_dim": self.augment_dim, "condition.vector_dim": self.vector_dim})
        if self.null_class and self.missing_class != "error":
            raise ValueError("condition.missing_class='zeros' and condition.null_class=True contradict each other")


@dataclass(frozen=True)
class EncoderConfig:
    """What the encoder has of its own; None is as described by the U-Net's other fields."""

    stem_channels: int | None = None
    """Width after the first convolution; None is the first level's (SongUNet has another)."""
    stem_kernel: int = 3
    """Kernel size of the first convolution; odd."""
    attention_blocks: tuple[tuple[int, ...], ...] | None = None
    """For each level, which of its blocks attend, instead of `attention_levels`."""
    resample: tuple[ResampleKind, ...] | None = None
    """For each level but the last, its own kind of resampling; None is `resample.kind` for all."""
    residual_input: bool = False
    """NCSN++'s input branch, which adds the convolved and filtered image at each lower level."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_at_least(1, {"encoder.stem_channels": self.stem_channels})
        check_kernel("encoder.stem_kernel", self.stem_kernel)


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

    def __post_init__(self) -> None:
        check_at_least(0, {"mid.depth": self.depth, "mid.transformer_depth": self.transformer_depth})
        check_at_least(1, {"mid.attention_num_groups": self.attention_num_groups})
        if self.residual_scale is not None:
            check_positive("mid.residual_scale", self.residual_scale)


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
    """Kernel size of the last convolution; odd."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_at_least(1, {"decoder.channels": self.channels, "decoder.num_heads": self.num_heads})
        check_at_least(0, {"decoder.depth": self.depth, "decoder.transformer_depth": self.transformer_depth})
        check_kernel("decoder.out_kernel", self.out_kernel)


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides which U-Net this is. All levels are counted from 0, the finest.

    Raises ValueError, naming the field, where fields contradict each other or one would change nothing: see
    `unetgn.unet.checks`.
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
        freeze_lists(self)
        check_unet_config(self)

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
        own = self.encoder.resample
        return (self.resample.kind,) * (len(self.channels) - 1) if own is None else own

    @property
    def decoder_resample(self) -> tuple[ResampleKind, ...]:
        """The kind of resampling that leaves each decoder level but the first, in the order of levels."""
        own = self.decoder.resample
        return (self.resample.kind,) * (len(self.channels) - 1) if own is None else own

    @property
    def stem_channels(self) -> int:
        return self.channels[0] if self.encoder.stem_channels is None else self.encoder.stem_channels

    @property
    def feature_width(self) -> int:
        """Width of the time features."""
        return self.channels[0] if self.time.width is None else self.time.width

    @property
    def embedding_width(self) -> int:
        """Width of the embedding that the blocks receive."""
        return 4 * self.feature_width if self.time.embedding_width is None else self.time.embedding_width
