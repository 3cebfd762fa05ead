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
from unetgn.fusion.recognition import Settings, has_own_call, is_bare, trial, used_names, uses_only

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PROBABILITIES = ("p", "drop_prob", "drop_rate", "drop_path_rate", "drop_path_prob")
# What the forwards of stochastic depth and of copies of dropout use: timm's, torchvision's, MONAI's and others'.
USED = frozenset(PROBABILITIES) | {
    "training", "inplace", "scale_by_keep", "mode", "block_size", "eps", "drop_path", "stochastic_depth",
    "drop_block2d", "drop_block3d", "dropout", "dropout1d", "dropout2d", "dropout3d", "torch", "nn", "functional", "F",
}  # fmt: skip
# From a forward to the ways in which it hands on what it is given: an attribute is 0 (None: there is none), and others
# are what they were on the module that was tried.
_forwards: dict[Callable[..., Any], set[tuple[str | None, Settings]]] = {
    nn.Identity.forward: {(None, ())},
    **{dropout.forward: {("p", ())} for dropout in DROPOUTS},
}


def hands_on(module: Any) -> bool:
    """Return True where the forward of the module's class returns its input: in training, too, and without a draw."""
    forward = forward_of(module)
    if forward is nn.Sequential.forward:
        return all(hands_on(layer) and is_bare(layer) for layer in module)
    if has_own_call(module):
        return False
    for probability, settings in _forwards.get(forward, ()):
        is_as_tried = all(getattr(module, name, None) == value for name, value in settings)
        if is_as_tried and (probability is None or getattr(module, probability) == 0):
            return True
    return False


def register_identity(module: nn.Module) -> None:
    """Register the class of a module if it hands on its input, always or where it drops with probability 0.

    Its forward is believed after a trial, if it uses a few known names and no others, and for modules whose attributes
    of these names are those of the module that was tried.
    """
    forward = forward_of(module)
    holds_more = module._parameters or module._buffers or module._modules
    if hands_on(module) or holds_more or not uses_only(forward, USED):
        return
    found = [name for name in PROBABILITIES if isinstance(vars(module).get(name), (int, float))]
    others = sorted(used_names(forward) & USED & vars(module).keys() - {"training", *found})
    settings = tuple((name, vars(module)[name]) for name in others)
    is_plain = all(isinstance(value, (int, float, str, type(None))) for _, value in settings)
    if len(found) <= 1 and is_plain and _returns_its_input(module, found):
        _forwards.setdefault(forward, set()).add((found[0] if found else None, settings))


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
