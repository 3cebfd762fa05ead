"""Checks that every field of a configuration changes the network, or is refused beside the others."""

import dataclasses
from functools import cache

import pytest
import torch

from unetgn import UNetConfig
from unetgn.unet.model import UNet

# What the fields are changed to.
VALUES = {
    "sample_size": 16, "in_channels": 2, "out_channels": 2, "spatial_dims": 1, "channels": (64, 64), "depth": 2,
    "attention_levels": (0,), "num_classes": 7, "dropout": 0.5, "time_cond_proj_dim": 8, "addition_time_embed_dim": 4,
    "time.features": "fourier", "time.order": "sin_cos", "time.frequency_shift": 1.0, "time.frequencies": "power",
    "time.fourier_scale": 2.0, "time.width": 16, "time.embedding_width": 16,
    "condition.context_projection": "image", "condition.added_embedding": "image", "condition.added_dim": 6,
    "condition.added_heads": 2, "condition.activations": ("gelu",), "resblock.activation": "gelu",
    "time.activation": "gelu", "time.post_activation": "gelu", "decoder.out_activation": "gelu",
    "attention.context_dim": 6, "attention.context_norm": "layer_norm", "attention.cross_only": (0,),
    "condition.class_embedding": "timestep", "condition.class_dim": 6, "condition.context_dim": 6,
    "condition.null_class": False, "condition.null_class_trained": False,
    "condition.missing_class": "zeros", "condition.class_entry": "before_mlp",
    "condition.class_bias": True, "condition.class_scale": 2.0, "condition.augment_dim": 4, "condition.vector_dim": 8,
    "norm.num_groups": 8, "norm.group_size": 2, "norm.min_group_size": 16, "norm.eps": 0.5,
    "resblock.embedding": "scale_shift", "resblock.activate_embedding": False, "resblock.residual_scale": 0.5,
    "resblock.project_resampled": True, "resblock.zero_init": False,
    "attention.narrow": True,
    "attention.num_heads": 2, "attention.head_dim": 16, "attention.norm": {"num_groups": 4}, "attention.qk_norm": True,
    "attention.upcast": True, "attention.zero_init": False,
    "transformer.context_dim": 5, "transformer.depth": 2, "transformer.linear_projection": True,
    "transformer.cross_only": (1,), "transformer.grounding": "text",
    "resample.kind": "plain", "resample.padding": "end", "resample.taps": (1.0, 3.0, 3.0, 1.0),
    "resample.strides": (1, 2),
    "encoder.stem_channels": 64, "encoder.stem_kernel": 1, "encoder.attention_blocks": ((0,), ()),
    "encoder.attention_kinds": ("transformer", "added"), "decoder.attention_kinds": ("self", "added"),
    "mid.attention_kind": "added", "mid.num_heads": 2, "transformer.norm": {"num_groups": 4},
    "encoder.resample": ("plain",), "encoder.residual_input": True,
    "mid.depth": 3, "mid.attention": False, "mid.attention_norm": False, "mid.attention_num_groups": 2,
    "mid.residual_scale": 0.5, "mid.transformer_depth": 3, "mid.cross_only": True,
    "decoder.channels": (64, 32), "decoder.depth": (3, 3), "decoder.attention_blocks": ((0,), ()),
    "decoder.num_heads": 4, "decoder.transformer_depth": (2, 3), "decoder.resample": ("plain",),
    "decoder.out_kernel": 1,
}  # fmt: skip
NETWORKS = {
    "plain": {},
    "everything": {
        "num_classes": 3,
        "condition": {"vector_dim": 9, "null_class": False},
        "addition_time_embed_dim": 2,
        "transformer": {"context_dim": 6},
        "resample": {"kind": "resblock"},
    },
    "added": {
        "attention": {"context_dim": 32},
        "attention_levels": [0],
        "resblock": {"activate_embedding": False},
        "condition": {"context_dim": 5, "added_embedding": "text_image", "added_dim": 9},
    },
    "mixed": {
        "attention": {"context_dim": 6},
        "attention_levels": [0, 1],
        "encoder": {"attention_kinds": ["added", "transformer"]},
        "transformer": {"context_dim": 6},
    },
    "fourier": {"time": {"features": "fourier"}},
    "no middle": {"mid": {"depth": 0}},
    "no attention": {"attention_levels": [], "mid": {"attention": False}},
}
# The fields that are tried beside each network, by the beginnings of their names.
TRIED = {
    "plain": ("",),
    "everything": ("condition.", "transformer.", "resblock.", "resample.", "mid.", "decoder.", "addition", "num_"),
    "added": ("attention.", "condition.", "resblock.", "mid."),
    "mixed": ("encoder.attention_kinds", "decoder.attention_kinds", "mid.", "transformer.", "attention."),
    "fourier": ("time.", "addition"),
    "no middle": ("mid.", "transformer."),
    "no attention": ("attention.", "mid.", "transformer.", "decoder."),
}
SAME = {
    ("fourier", "time.features"),
    ("no attention", "mid.attention"),
    ("added", "resblock.activate_embedding"),
    ("added", "mid.attention_kind"),
    ("mixed", "attention.context_dim"),
}  # which have this value already
CASES = [
    (network, name)
    for network, prefixes in TRIED.items()
    for name in VALUES
    if name.startswith(prefixes) and (network, name) not in SAME
]
# Fields that may stand where there is nothing to make, as unetgn/unet/checks.py says; sample_size is for pipelines.
ALLOWED = {
    "plain": {"sample_size", "condition.null_class"},
    "added": {"condition.null_class"},
    "no middle": {"mid.attention"},
    "no attention": {"decoder.num_heads", *(name for name in VALUES if name.startswith("attention."))},
}


def leaves(kind=UNetConfig, prefix=""):
    """Yield the dotted names of all fields that hold no further fields."""
    parts = {field.name: field for field in dataclasses.fields(kind)}
    plain = UNetConfig.from_dict({"transformer": {}, "channels": [32]})
    for name in parts:
        value = getattr(plain, name) if kind is UNetConfig else None
        if dataclasses.is_dataclass(value):
            yield from leaves(type(value), f"{name}.")
        else:
            yield f"{prefix}{name}"


@cache
def described(config):
    """Describe the network of a configuration: the text of its modules, its shapes, and where it starts at zero."""
    torch.manual_seed(0)
    unet = UNet.from_unet_config(config)
    zeros = {name: not parameter.any() for name, parameter in unet.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    read_by_forward = (config.resblock.activate_embedding, config.embedding_activations)
    return repr(unet), zeros, shapes, read_by_forward


def test_there_is_a_value_for_every_field():
    assert set(leaves()) == set(VALUES)


@pytest.mark.parametrize(("network", "name"), CASES, ids=map("-".join, CASES))
def test_a_field_changes_the_network_or_is_refused(network, name):
    base = {"channels": [32, 32], "depth": 1, **NETWORKS[network]}
    part, _, field = name.rpartition(".")
    value = True if (network, name) == ("everything", "condition.null_class") else VALUES[name]
    changed = {**base, part: {**(base.get(part) or {}), field: value}} if part else {**base, name: value}
    before = UNetConfig.from_dict(base)
    try:
        after = UNetConfig.from_dict(changed)
        ignored = described(before) == described(after)
    except ValueError:
        return
    assert ignored == (name in ALLOWED.get(network, ())), name
