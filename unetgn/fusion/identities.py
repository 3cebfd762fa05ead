"""Knows which modules hand on what they are given, at all times: nn.Identity, and what drops nothing.

Not those that do so in evaluation alone, such as dropout with p > 0. `hands_on` only reads what `register_identity` has
written; but p is looked at in each call, since it may be changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unetgn.fusion.classes import forward_of
from unetgn.fusion.recognition import is_bare, trial, uses_only

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PROBABILITIES = ("p", "drop_prob", "drop_rate", "drop_path_rate", "drop_path_prob")
# What the forwards of stochastic depth and of copies of dropout use: timm's, torchvision's, MONAI's and others'.
USED = frozenset(PROBABILITIES) | {
    "training", "inplace", "scale_by_keep", "mode", "block_size", "eps", "drop_path", "stochastic_depth",
    "drop_block2d", "drop_block3d", "dropout", "dropout1d", "dropout2d", "dropout3d", "torch", "nn", "functional", "F",
}  # fmt: skip
# From a forward to the attribute that has to be 0 for it to hand on what it is given; None: it always does.
_forwards: dict[Callable[..., Any], str | None] = {
    nn.Identity.forward: None,
    **dict.fromkeys((dropout.forward for dropout in DROPOUTS), "p"),
}


def hands_on(module: Any) -> bool:
    """Return True where the forward of the module's class returns its input: in training, too, and without a draw."""
    forward = forward_of(module)
    if forward is nn.Sequential.forward:
        return all(hands_on(layer) and is_bare(layer) for layer in module)
    if forward not in _forwards:
        return False
    probability = _forwards[forward]
    return probability is None or bool(getattr(module, probability) == 0)


def register_identity(module: nn.Module) -> None:
    """Register the class of a module if it hands on its input, always or where it drops with probability 0.

    Its forward is believed after a trial, if it uses a few known names and no others.
    """
    forward = forward_of(module)
    holds_more = module._parameters or module._buffers or module._modules
    if forward in _forwards or holds_more or not uses_only(forward, USED):
        return
    found = [name for name in PROBABILITIES if isinstance(vars(module).get(name), (int, float))]
    if len(found) <= 1 and _returns_its_input(module, found):
        _forwards[forward] = found[0] if found else None


def _returns_its_input(module: nn.Module, probabilities: list[str]) -> bool:
    """Run a copy of the module, with these attributes 0, in training and in evaluation."""
    copy = nn.Identity()
    copy.__class__ = type(module)  # type: ignore[assignment]
    vars(copy).update(vars(module) | dict.fromkeys(probabilities, 0.0))
    with trial():
        probe, state = torch.linspace(-3, 5, 24).view(2, 3, 2, 2), torch.get_rng_state()
        for copy.training in (True, False):
            try:
                result = type(module).forward(copy, probe.clone())
            except Exception:  # somebody else's forward may raise anything
                return False
            if not isinstance(result, torch.Tensor) or not torch.equal(result, probe):
                return False
        return torch.equal(torch.get_rng_state(), state)
