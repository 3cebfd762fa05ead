"""Describes a U-Net: the fields of its configuration, and what follows from them.

`unetgn.unet.plan` and `unetgn.unet.checks` read a description; `unetgn.unet.config.UNetConfig` is one that is checked.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from unetgn.nn.added_embedding import HINT_CHANNELS
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.fields import check_at_least, check_choice, check_kernel, check_positive, freeze_lists
from unetgn.nn.groups import NormConfig
from unetgn.nn.norm import ACTIVATIONS, Activation
from unetgn.nn.resample import ResampleConfig, ResampleKind
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig

CONTEXT_PROJECTIONS = ("text", "text_image", "image")
ADDED_EMBEDDINGS = ("text", "text_image", "image", "image_hint")
AttentionKind = Literal["self", "added", "transformer"]
CLASS_EMBEDDINGS = ("table", "timestep", "identity", "projection", "simple_projection")


def check_kinds(name: str, kinds: tuple[str, ...] | None) -> None:
    """Raise ValueError where one of `kinds` is no kind of attention."""
    for kind in kinds or ():
        check_choice(name, kind, get_args(AttentionKind))


@dataclass(frozen=True)
class ConditionConfig:
    """Says what enters the network beside the image and the timestep; `num_classes` counts the classes of a table."""

    class_embedding: Literal["table", "timestep", "identity", "projection", "simple_projection"] = "table"
    """Embeds class labels by a "table" of `num_classes` rows; numbers (N,) as a "timestep" is embedded, with an MLP of
    its own; or vectors: as they are ("identity"), by an MLP ("projection") or a linear layer ("simple_projection").
    All but the table always want labels.
    """
    class_dim: int | None = None
    """Sets the width of the vectors that a projection takes for class labels."""
    null_class: bool = True
    """Adds a last row to the class table, for missing and dropped labels."""
    missing_class: Literal["error", "zeros"] = "error"
    """Says what missing labels are without a null class: an "error", or "zeros" as in EDM."""
    null_class_trained: bool = True
    """Says that training met samples without their class or text. Training sets it: without dropped labels the row of
    the null class stays as random as it began, so that missing labels are an error; without dropped captions pipelines
    refuse the empty one, and guidance, which reads it.
    """
    class_entry: Literal["before_mlp", "after_mlp", "concat"] = "after_mlp"
    """Adds the class to the time features "before_mlp" (SongUNet) or to the embedding "after_mlp"; "concat" puts it
    behind the embedding, which is twice as wide then (AudioLDM).
    """
    class_bias: bool = False
    """Adds a bias to the row of the class table (SongUNet)."""
    class_scale: float = 1.0
    """Multiplies the labels; above 0, sqrt(classes) in SongUNet."""
    augment_dim: int | None = None
    """Sets the width of augmentation labels, which are added to the time features (EDM); None takes none."""
    vector_dim: int | None = None
    """Sets the width of a vector that is added to the embedding through its own MLP (Stable Diffusion XL); None takes
    none.
    """
    context_projection: Literal["text", "text_image", "image"] = "text"
    """Makes the context of encoder_hidden_states by a linear layer ("text": Kolors, DeepFloyd IF), of these and an
    image's embedding ("text_image": Kandinsky 2.1), or of that alone ("image": Kandinsky 2.2), as
    `unetgn.nn.added_embedding` says.
    """
    context_dim: int | None = None
    """Sets the width of what is projected so, text or image; None projects nothing."""
    added_embedding: Literal["text", "text_image", "image", "image_hint"] | None = None
    """Adds to the embedding what is made of encoder_hidden_states ("text": DeepFloyd IF), or of added_cond_kwargs'
    "text_embeds" and "image_embeds" (Kandinsky); with "image_hint" a "hint" gives the last 4 of `in_channels`.
    """
    added_dim: int | None = None
    """Sets the width of what is embedded so."""
    added_heads: int | None = None
    """Counts the heads that pool the "text"."""
    activations: tuple[Activation, ...] | None = None
    """Applies these to the embedding, in order, before the blocks read it; None is `resblock.activation`, once. It is
    for resblock.activate_embedding=False.
    """

    def __post_init__(self) -> None:
        check_choice("condition.class_embedding", self.class_embedding, CLASS_EMBEDDINGS)
        check_choice("condition.missing_class", self.missing_class, ("error", "zeros"))
        check_choice("condition.class_entry", self.class_entry, ("before_mlp", "after_mlp", "concat"))
        check_positive("condition.class_scale", self.class_scale)
        check_choice("condition.context_projection", self.context_projection, CONTEXT_PROJECTIONS)
        check_choice("condition.added_embedding", self.added_embedding, (*ADDED_EMBEDDINGS, None))
        freeze_lists(self)
        for name in self.activations or ():
            check_choice("condition.activations", name, ACTIVATIONS)
        numbers = ("class_dim", "augment_dim", "vector_dim", "context_dim", "added_dim", "added_heads")
        check_at_least(1, {f"condition.{name}": getattr(self, name) for name in numbers})
        if self.context_dim is None and self.context_projection != "text":
            raise ValueError(
                f"condition.context_projection={self.context_projection!r} needs condition.context_dim, the width of "
                "what it projects"
            )
        if (self.added_embedding is None) != (self.added_dim is None):
            raise ValueError(
                f"condition.added_embedding={self.added_embedding!r} and condition.added_dim={self.added_dim} belong "
                "together: give both or none"
            )
        if (self.added_embedding == "text") != (self.added_heads is not None):
            raise ValueError(
                f"condition.added_heads={self.added_heads} and condition.added_embedding={self.added_embedding!r}: "
                "heads belong to 'text', and to none of the others"
            )
        if self.added_dim is not None and self.added_heads is not None and self.added_dim % self.added_heads:
            raise ValueError(
                f"condition.added_heads={self.added_heads} does not divide condition.added_dim={self.added_dim}"
            )
        if self.added_embedding is not None and self.vector_dim is not None:
            raise ValueError(
                f"condition.added_embedding={self.added_embedding!r} and condition.vector_dim={self.vector_dim} "
                "contradict each other: give one of them"
            )
        if (self.class_dim is not None) != self.class_embedding.endswith("projection"):
            raise ValueError(
                f"condition.class_dim={self.class_dim} and condition.class_embedding={self.class_embedding!r}: a width "
                "belongs to 'projection' and 'simple_projection', and to none of the others"
            )
        if self.null_class and self.missing_class != "error":
            raise ValueError("condition.missing_class='zeros' and condition.null_class=True contradict each other")


@dataclass(frozen=True)
class EncoderConfig:
    """Says what the encoder has of its own. None follows the U-Net's other fields."""

    stem_channels: int | None = None
    """Sets the width after the first convolution; None is the first level's (SongUNet has another)."""
    stem_kernel: int = 3
    """Sets the kernel size of the first convolution; odd."""
    attention_blocks: tuple[tuple[int, ...], ...] | None = None
    """Names the blocks that attend, for each level, instead of `attention_levels`."""
    attention_kinds: tuple[AttentionKind, ...] | None = None
    """Sets the kind of attention of each level, where they differ: "self", "added" (with the keys and values of a
    context, `attention.context_dim`) or "transformer". Levels without attention have an entry that is not read. None is
    the one kind that the configuration has.
    """
    resample: tuple[ResampleKind, ...] | None = None
    """Sets the kind of resampling of each level but the last; None is `resample.kind` for all."""
    residual_input: bool = False
    """Adds the convolved and filtered image at each lower level: the input branch of NCSN++."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_kinds("encoder.attention_kinds", self.attention_kinds)
        check_at_least(1, {"encoder.stem_channels": self.stem_channels})
        check_kernel("encoder.stem_kernel", self.stem_kernel)


@dataclass(frozen=True)
class MidConfig:
    """Describes the blocks between encoder and decoder, at the last level's resolution."""

    depth: int = 2
    """Counts the residual blocks; 0 leaves the middle out."""
    attention: bool = True
    """Puts attention after the first block."""
    attention_kind: AttentionKind | None = None
    """Sets the kind of that attention, as encoder.attention_kinds does; None is the encoder's last level's."""
    num_heads: int | None = None
    """Counts its heads; None is as at the encoder's last level."""
    attention_norm: bool = True
    """Gives that attention a norm."""
    attention_num_groups: int | None = None
    """Sets the groups of that norm; None is the attention's."""
    residual_scale: float | None = None
    """Multiplies each block's sum, as in ResBlockConfig; None is `resblock.residual_scale`."""
    transformer_depth: int | None = None
    """Counts the transformer blocks, as in TransformerConfig; None is the last level's."""
    cross_only: bool = False
    """Makes the transformer's first attention read the context too."""

    def __post_init__(self) -> None:
        check_at_least(0, {"mid.depth": self.depth, "mid.transformer_depth": self.transformer_depth})
        check_at_least(1, {"mid.attention_num_groups": self.attention_num_groups, "mid.num_heads": self.num_heads})
        check_kinds("mid.attention_kind", (self.attention_kind,) if self.attention_kind else None)
        if self.residual_scale is not None:
            check_positive("mid.residual_scale", self.residual_scale)


@dataclass(frozen=True)
class DecoderConfig:
    """Says what the decoder has of its own. None is as in the encoder; levels are counted as there, finest first."""

    channels: tuple[int, ...] | None = None
    """Sets the width of each level; None is the encoder's."""
    depth: tuple[int, ...] | None = None
    """Counts the blocks of each level. None is one for each skip connection, which is also the least; further blocks
    take no skip connection.
    """
    attention_blocks: tuple[tuple[int, ...], ...] | None = None
    """Names the blocks that attend, for each level; None is all of them where the encoder attends."""
    attention_kinds: tuple[AttentionKind, ...] | None = None
    """Sets the kind of attention of each level, as in the encoder; None is the encoder's."""
    num_heads: int | tuple[int, ...] | None = None
    """Counts the heads, as in AttentionConfig; None is the encoder's."""
    transformer_depth: tuple[int | tuple[int, ...], ...] | None = None
    """Counts the transformer blocks, as `depth` in TransformerConfig; None is the encoder's."""
    resample: tuple[ResampleKind, ...] | None = None
    """Sets the kind of resampling that leaves each level but the first; None is `resample.kind` for all."""
    out_kernel: int = 3
    """Sets the kernel size of the last convolution; odd."""
    out_activation: Activation = "silu"
    """Stands between the last norm and convolution."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_choice("decoder.out_activation", self.out_activation, ACTIVATIONS)
        check_kinds("decoder.attention_kinds", self.attention_kinds)
        check_at_least(1, {"decoder.channels": self.channels, "decoder.num_heads": self.num_heads})
        check_at_least(0, {"decoder.depth": self.depth, "decoder.transformer_depth": self.transformer_depth})
        check_kernel("decoder.out_kernel", self.out_kernel)


@dataclass(frozen=True)
class UNetDescription:
    """Holds the fields of a U-Net's configuration and derives from them what is left open.

    Its fields may contradict each other: build a `UNetConfig`, which refuses that. Levels are counted from 0, the
    finest.
    """

    sample_size: int | tuple[int, ...] | None = None
    """Sets the resolution that pipelines ask for; the network takes any size."""
    in_channels: int = 3
    """Counts the channels of the input."""
    out_channels: int = 3
    """Counts the channels of the output."""
    spatial_dims: int = 2
    """Counts the spatial axes: 1, 2 or 3."""
    channels: tuple[int, ...] = (64, 128, 128)
    """Sets the width of each level."""
    depth: int | tuple[int, ...] = 2
    """Counts the residual blocks of each level: one number for all, or one for each."""
    attention_levels: tuple[int, ...] | None = None
    """Names the levels whose blocks attend, in the encoder and the decoder. None is the coarsest alone, or none where
    `encoder.attention_blocks` names blocks; () is no level.
    """
    num_classes: int | None = None
    """Counts the classes that condition the network; None is unconditional."""
    dropout: float = 0.0
    """Sets the probability of dropout in residual blocks."""
    time_cond_proj_dim: int | None = None
    """Sets the width of the guidance-scale embedding of distilled models; None takes none."""
    addition_time_embed_dim: int | None = None
    """Sets the width of the features of each of Stable Diffusion XL's size numbers; None takes none."""
    time: TimeConfig = field(default_factory=TimeConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    resblock: ResBlockConfig = field(default_factory=ResBlockConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    transformer: TransformerConfig | None = None
    """Puts spatial transformers in the place of self-attention; None has none."""
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    mid: MidConfig = field(default_factory=MidConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    @property
    def depths(self) -> tuple[int, ...]:
        """Count the residual blocks of each encoder level."""
        return (self.depth,) * len(self.channels) if isinstance(self.depth, int) else self.depth

    @property
    def attending_levels(self) -> tuple[int, ...]:
        """Name the levels that attend as a whole: `attention_levels`, or what None stands for there."""
        if self.attention_levels is not None:
            return self.attention_levels
        return (len(self.channels) - 1,) if self.encoder.attention_blocks is None else ()

    @property
    def encoder_resample(self) -> tuple[ResampleKind, ...]:
        """Name the kind of resampling that leaves each encoder level but the last."""
        own = self.encoder.resample
        return (self.resample.kind,) * (len(self.channels) - 1) if own is None else own

    @property
    def decoder_resample(self) -> tuple[ResampleKind, ...]:
        """Name the kind of resampling that leaves each decoder level but the first, in the order of levels."""
        own = self.decoder.resample
        return (self.resample.kind,) * (len(self.channels) - 1) if own is None else own

    @property
    def stem_channels(self) -> int:
        """Give the width after the first convolution."""
        return self.channels[0] if self.encoder.stem_channels is None else self.encoder.stem_channels

    @property
    def feature_width(self) -> int:
        """Give the width of the time features."""
        return self.channels[0] if self.time.width is None else self.time.width

    @property
    def time_width(self) -> int:
        """Give the width of the embedded timestep."""
        return 4 * self.feature_width if self.time.embedding_width is None else self.time.embedding_width

    @property
    def embedding_width(self) -> int:
        """Give the width of the embedding that the blocks receive."""
        return self.time_width * (2 if self.condition.class_entry == "concat" else 1)

    @property
    def context_dims(self) -> int | tuple[int, ...] | None:
        """Give the width of the context that attention reads, or of each level's; None where none is read."""
        widths = None if self.transformer is None else self.transformer.context_dim
        return self.attention.context_dim if widths is None else widths

    def attention_kind(self, side: Literal["encoder", "mid", "decoder"], level: int) -> AttentionKind:
        """Give the kind of the attention that there may be at a level, counted from 0, the finest."""
        if side == "mid" and self.mid.attention_kind is not None:
            return self.mid.attention_kind
        if side == "decoder" and self.decoder.attention_kinds is not None:
            return self.decoder.attention_kinds[level]
        if self.encoder.attention_kinds is not None:
            return self.encoder.attention_kinds[level]
        if self.transformer is not None:
            return "transformer"
        return "self" if self.attention.context_dim is None else "added"

    @property
    def sample_channels(self) -> int:
        """Count the channels of the sample that a caller gives; a hint adds the others of `in_channels`."""
        return self.in_channels - (HINT_CHANNELS if self.condition.added_embedding == "image_hint" else 0)

    @property
    def embedding_activations(self) -> tuple[Activation, ...]:
        """Name what is applied to the embedding before the blocks read it."""
        if self.resblock.activate_embedding:
            return ()
        return (self.resblock.activation,) if self.condition.activations is None else self.condition.activations

    @property
    def class_rows(self) -> int | None:
        """Count the rows of the class table, the null class among them; None where there is no table."""
        return None if self.num_classes is None else self.num_classes + self.condition.null_class
