"""Checks that every option of every block changes what is built, or is refused: none is accepted and ignored."""

import inspect
from functools import partial

import pytest
import torch

from tests.tensors import noise, randomized
from unetgn.nn import (
    AddedKVAttention,
    AugmentEmbedding,
    ClassEmbedding,
    ConvNormAct,
    CrossAttention,
    Downsample,
    FourierFeatures,
    GroupNormSiLU,
    InputBranch,
    MultiHeadAttention,
    NormConfig,
    Resample,
    ResBlock,
    ResBlockConfig,
    SelfAttention,
    SinusoidalFeatures,
    SpatialTransformer,
    TimestepEmbedding,
    TransformerBlock,
    Upsample,
    WeightStandardizedConv,
    convolution,
    make_norm,
)

KINDS = ("group", "instance", "layer", "batch")
TAPS = (1, 3, 3, 1)
X, TOKENS, CONTEXT, EMB = noise(2, 32, 6, 6), noise(2, 7, 32), noise(2, 5, 6), noise(2, 8)
LABELS = torch.tensor([1, 3])

# An option -> another value than its default; the same for all that have it, unless a block says otherwise.
VALUES = {
    "activation": None, "affine": False, "bias": False, "cond_channels": 4, "context_dim": 6, "cross_only": True,
    "context_norm": "layer_norm", "post_activation": "relu", "depth": 2,
    "device": "meta", "dropout": 0.5, "dtype": torch.float64, "eps": 0.5, "emb_channels": 8,
    "frequencies": "power", "frequency_shift": 1.0, "head_dim": 8, "inner_channels": 16, "kernel_size": 1,
    "grounded": True, "linear_projection": True,
    "missing": "zeros", "norm": NormConfig(num_groups=4), "null_class": False,
    "null_class_trained": False, "num_groups": 4, "num_heads": 4,
    "order": "sin_cos", "out_channels": 64, "padding": "end", "qk_norm": True, "resample": "down",
    "residual_scale": 0.5, "scale": 0.5, "spatial_dims": 1, "standardize_weight": True, "stride": 2, "strides": (1, 2),
    "taps": TAPS, "upcast": True, "zero_init": False,
}  # fmt: skip

# What is built, the inputs that it is then asked for, and values of its own for some options.
BLOCKS = {
    **{f"norm {kind}": (partial(make_norm, kind, 32), [(X,)], {"activation": "silu"}) for kind in KINDS},
    **{f"ConvNormAct {kind}": (partial(ConvNormAct, 32, 32, norm=kind), [(X,)], {}) for kind in KINDS},
    "convolution": (partial(convolution, 2, 32, 32), [(X,)], {"padding": 0}),
    "WeightStandardizedConv": (partial(WeightStandardizedConv, 32, 32), [(X,)], {}),
    "GroupNormSiLU": (partial(GroupNormSiLU, 8, 32), [(X,)], {}),
    "MultiHeadAttention": (partial(MultiHeadAttention, 32), [(TOKENS,)], {"bias": True}),
    "SelfAttention": (partial(SelfAttention, 32), [(X,)], {}),
    "AddedKVAttention": (partial(AddedKVAttention, 32, 6), [(X, CONTEXT)], {}),
    "AddedKVAttention of a wide context": (
        partial(AddedKVAttention, 32, 32),
        [(X, TOKENS)],
        {"context_norm": "group_norm"},
    ),
    "CrossAttention": (partial(CrossAttention, 32, 6), [(X, CONTEXT)], {}),
    "TransformerBlock": (
        partial(TransformerBlock, 32, num_heads=1, context_dim=6),
        [(TOKENS, CONTEXT)],
        {"context_dim": None},
    ),
    "TransformerBlock alone": (partial(TransformerBlock, 32, num_heads=1, context_dim=None), [(TOKENS, None)], {}),
    "SpatialTransformer": (partial(SpatialTransformer, 32), [(X,)], {}),
    "SpatialTransformer of a context": (
        partial(SpatialTransformer, 32, context_dim=6),
        [(X, CONTEXT)],
        {"context_dim": None},
    ),
    "SpatialTransformer of linear layers": (
        partial(SpatialTransformer, 32, linear_projection=True),
        [(X,)],
        {"linear_projection": False},
    ),
    "SinusoidalFeatures": (partial(SinusoidalFeatures, 8), [(torch.arange(2.0),)], {}),
    "FourierFeatures": (partial(FourierFeatures, 8), [(torch.arange(2.0),)], {}),
    "TimestepEmbedding": (partial(TimestepEmbedding, 8, 16), [(EMB,)], {"activation": "gelu"}),
    "AugmentEmbedding": (partial(AugmentEmbedding, 8, 16), [(EMB,)], {}),
    "ClassEmbedding": (partial(ClassEmbedding, 5, 8), [(LABELS, 2), (None, 2)], {"bias": True}),
    "ClassEmbedding without a null class": (
        partial(ClassEmbedding, 5, 8, null_class=False),
        [(LABELS, 2), (None, 2)],
        {"bias": True, "null_class": True},
    ),
    "Resample down": (partial(Resample, "down"), [(X,)], {}),
    "Resample up": (partial(Resample, "up"), [(X,)], {}),
    "Downsample": (partial(Downsample, 32), [(X,)], {}),
    "Downsample of no axis": (partial(Downsample, 32, strides=(1, 1)), [(X,)], {}),
    "Upsample": (partial(Upsample, 32), [(X,)], {}),
    "InputBranch": (partial(InputBranch, 3, 32), [(X[..., :3, :3], noise(2, 3, 6, 6))], {}),
    "ResBlock": (partial(ResBlock, 32), [(X,), (X, EMB)], {}),
    "ResBlock of an embedding": (partial(ResBlock, 32, emb_channels=8), [(X, EMB)], {"emb_channels": None}),
    "ResBlock that resamples": (
        partial(ResBlock, 32, emb_channels=8, resample="up"),
        [(X, EMB)],
        {"emb_channels": None},
    ),
}  # fmt: skip
CONFIGS = {  # of a ResBlock; what its own `config` may say
    "embedding": "scale_shift", "activate_embedding": False, "residual_scale": 0.5, "project_resampled": True,
    "zero_init": False, "activation": "gelu",
}  # fmt: skip


def options_of(block):
    """List the options of a block that have a default; `config` is listed by its own."""
    names = list(inspect.signature(block.func).parameters)
    names = [name for name in names[len(block.args) :] if name != "config"]
    return [*names, *(f"config.{name}" for name in CONFIGS)] if block.func is ResBlock else names


CASES = [(name, option) for name, (block, _, _) in BLOCKS.items() for option in options_of(block)]


def effect(make, inputs):
    """Describe a module by its initial values, and by what it computes in float64 and in 16 bits."""
    torch.manual_seed(0)
    module = make()
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    if any(value.is_meta for value in initial.values()):
        return ["meta"]
    computed = []
    for dtype in (torch.float64, torch.bfloat16):
        randomized(module, dtype=dtype)
        for given in inputs:
            torch.manual_seed(0)
            try:
                moved = [value.to(dtype) if getattr(value, "is_floating_point", bool)() else value for value in given]
                computed.append(module(*moved))
            except (ValueError, RuntimeError) as error:  # for other inputs than these
                computed.append(str(error))
    return [initial, computed]


def same(one, other):
    """Return True where two descriptions are the same, to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(("name", "option"), CASES, ids=[f"{name}-{option}" for name, option in CASES])
def test_an_option_changes_what_is_built_or_is_refused(name, option):
    block, inputs, own = BLOCKS[name]
    part, _, field = option.rpartition(".")
    if part:
        options = {"config": ResBlockConfig(**{field: CONFIGS[field]})}
    elif field == "norm" and block.func is ConvNormAct:
        options = {"norm": "layer" if name != "ConvNormAct layer" else "batch"}
    else:
        options = {field: own[field] if field in own else VALUES[field]}
    before = effect(block, inputs)
    try:
        after = effect(partial(block, **options), inputs)
    except ValueError:
        return
    assert not same(before, after), options


def test_the_definition_of_an_effect_sees_no_difference_where_there_is_none():
    for block, inputs, _ in BLOCKS.values():
        assert same(effect(block, inputs), effect(block, inputs))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_norm("batch", 8, eps=-1.0), "eps"),
        (lambda: SpatialTransformer(32, depth=-3, num_heads=4), "transformer.depth"),
        (lambda: ResBlock(32, config=ResBlockConfig(project_resampled=True)), "resample='down' or 'up'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()
