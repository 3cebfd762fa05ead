"""Tells PyTorch's DTensor how the operator may be sharded: by samples, or not at all.

A group lies within a sample, so each device normalizes its own samples. Gradients of weight and bias are sums over
samples: each device has a part of the sum. Tensors in any other placement are put together first.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from unetgn.ops.arguments import DIFFERENTIABLE, SCHEMA
from unetgn.ops.library import BACKWARD_SCHEMA

_OF_CHANNELS = ("weight", "bias")  # the others have an axis of samples, which comes first


def register_for(x: Tensor) -> None:
    """Register the operators with DTensor where x is one. Without a DTensor, nothing of it is imported."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(x, tensors.DTensor):
        _register()


# A compiler calls it and does not look inside: what `torch.compiler.assume_constant_result` would say.
register_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole, by_sample = Replicate(), Shard(0)

    def inputs(schema: dict[str, str], values: tuple[Any, ...], *, sharded: bool) -> list[Any]:
        """Return the placement of each input; None for what is absent or no tensor."""
        given = [
            kind.startswith("Tensor") and value is not None for kind, value in zip(schema.values(), values, strict=True)
        ]
        places = [by_sample if sharded and name not in _OF_CHANNELS else whole for name in schema]
        return [place if is_tensor else None for place, is_tensor in zip(places, given, strict=True)]

    @register_sharding(torch.ops.unetgn.group_norm_silu.default)
    def forward(*values: Any) -> list[tuple[list[Any], list[Any]]]:
        return [
            ([whole] * 3, inputs(SCHEMA, values, sharded=False)),
            ([by_sample] * 3, inputs(SCHEMA, values, sharded=True)),
        ]

    @register_sharding(torch.ops.unetgn.group_norm_silu_backward.default)
    def backward(*values: Any) -> list[tuple[list[Any], list[Any]]]:
        needs = values[list(BACKWARD_SCHEMA).index("needs")]
        own = [Partial() if name in _OF_CHANNELS else by_sample for name in DIFFERENTIABLE]
        sharded = [
            place if need else whole for place, need in zip(own, needs, strict=True)
        ]  # what is not needed is empty
        return [
            ([whole] * len(own), inputs(BACKWARD_SCHEMA, values, sharded=False)),
            (sharded, inputs(BACKWARD_SCHEMA, values, sharded=True)),
        ]
