"""Registers the rule for `nn.Sequential`: a group norm and the SiLU that is its next neighbour."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from unetgn.fusion.activations import is_bare_silu, is_silu_module
from unetgn.fusion.norm_silu import norm_silu
from unetgn.fusion.norms import children, is_fusable, is_norm
from unetgn.fusion.rules import rule


def norms_before_silu(block: nn.Module) -> tuple[str, ...]:
    """Return the names of the norms whose next neighbour is a SiLU."""
    pairs = pairwise(children(block))
    return tuple(name for (name, norm), (_, act) in pairs if is_norm(norm) and is_silu_module(act))


@rule(nn.Sequential, norms=norms_before_silu)
def sequential(block: nn.Sequential, x: Any) -> Any:
    """Run the chain, with each pair as one call. A caller that takes the chain apart gets its parts as they are."""
    layers = list(block)
    index = 0
    while index < len(layers):
        is_pair = index + 1 < len(layers) and is_fusable(layers[index]) and is_bare_silu(layers[index + 1])
        x = norm_silu(layers[index], layers[index + 1], x) if is_pair else layers[index](x)
        index += 2 if is_pair else 1
    return x
