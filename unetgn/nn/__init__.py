"""Exports the building blocks of U-Nets, one concept a file."""

from unetgn.nn.added_embedding import (
    AttentionPooling,
    HintEmbedding,
    ImageEmbedding,
    ImageProjection,
    TextEmbedding,
    TextImageEmbedding,
    TextImageProjection,
)
from unetgn.nn.attention import AddedKVAttention, AttentionConfig, CrossAttention, MultiHeadAttention, SelfAttention
from unetgn.nn.checkpointing import CheckpointGrade
from unetgn.nn.conv import WeightStandardizedConv, convolution, standardize_weight
from unetgn.nn.conv_norm_act import ConvNormAct, make_norm
from unetgn.nn.embedding import (
    AugmentEmbedding,
    ClassEmbedding,
    FourierFeatures,
    SinusoidalFeatures,
    TimeConfig,
    TimestepEmbedding,
)
from unetgn.nn.groups import NormConfig
from unetgn.nn.input_branch import InputBranch
from unetgn.nn.norm import Activation, GroupNormAct, GroupNormSiLU, largest_group_count
from unetgn.nn.resample import Downsample, Resample, ResampleConfig, Upsample
from unetgn.nn.resblock import ResBlock, ResBlockConfig
from unetgn.nn.transformer import GEGLU, FeedForward, SpatialTransformer, TransformerBlock, TransformerConfig

__all__ = [
    "GEGLU",
    "Activation",
    "AddedKVAttention",
    "AttentionConfig",
    "AttentionPooling",
    "AugmentEmbedding",
    "CheckpointGrade",
    "ClassEmbedding",
    "ConvNormAct",
    "CrossAttention",
    "Downsample",
    "FeedForward",
    "FourierFeatures",
    "GroupNormAct",
    "GroupNormSiLU",
    "HintEmbedding",
    "ImageEmbedding",
    "ImageProjection",
    "InputBranch",
    "MultiHeadAttention",
    "NormConfig",
    "ResBlock",
    "ResBlockConfig",
    "Resample",
    "ResampleConfig",
    "SelfAttention",
    "SinusoidalFeatures",
    "SpatialTransformer",
    "TextEmbedding",
    "TextImageEmbedding",
    "TextImageProjection",
    "TimeConfig",
    "TimestepEmbedding",
    "TransformerBlock",
    "TransformerConfig",
    "Upsample",
    "WeightStandardizedConv",
    "convolution",
    "largest_group_count",
    "make_norm",
    "standardize_weight",
]
