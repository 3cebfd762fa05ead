"""Registers the rule for `nn.Sequential`: a group norm and the SiLU after it.

Between the two there may be modules that hand on what they are given, such as dropout that drops nothing: MONAI's ADN
has it there (norm, dropout, activation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from unetgn.fusion.activations import is_bare_silu, is_silu_module
from unetgn.fusion.identities import hands_on
from unetgn.fusion.norm_silu import norm_silu
from unetgn.fusion.norms import children, is_fusable, is_norm
from unetgn.fusion.recognition import is_bare
from unetgn.fusion.rules import rule


def norms_before_silu(block: nn.Module) -> tuple[str, ...]:
    """Return the names of the norms that a SiLU follows."""
    named = children(block)
    layers = [layer for _, layer in named]
    norms = (index for index, layer in enumerate(layers) if is_norm(layer))
    return tuple(named[index][0] for index in norms if silu_after(layers, index) is not None)


def silu_after(layers: Sequence[nn.Module], index: int) -> int | None:
    """Return the place of the SiLU that follows a layer, past modules that hand on what they are given; else None."""
    for place in range(index + 1, len(layers)):
        if is_silu_module(layers[place]):
            return place
        if not hands_on(layers[place]):
            return None
    return None


@rule(nn.Sequential, norms=norms_before_silu)
def sequential(block: nn.Sequential, x: Any) -> Any:
    """Run the chain, with each norm and its SiLU as one call. A caller that takes the chain apart gets its parts.

    Whatever carries a hook is called.
    """
    layers = list(block)
    index = 0
    while index < len(layers):
        act = silu_after(layers, index) if is_fusable(layers[index]) else None
        if act is not None and is_bare_silu(layers[act]) and all(map(is_bare, layers[index + 1 : act])):
            x = norm_silu(layers[index], layers[act], x)
            index = act + 1
        else:
            x = layers[index](x)
            index += 1
    return x
