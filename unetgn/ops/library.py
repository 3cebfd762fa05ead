"""Registers `unetgn::group_norm_silu` and its backward, for PyTorch's compilers and dispatch modes.

The registered operators carry shapes and layouts (for `torch.compile`, `torch.export`, fake tensors) and a derivative.
Eager calls do not come through here: the dispatcher's detour through Python costs more than a small normalization.
Gradients that were not asked for come back as empty tensors, because an operator cannot return None.
"""

from typing import Any

import torch
from torch import Tensor

from unetgn.ops import autograd, dispatch
from unetgn.ops.arguments import SCHEMA, UNKNOWN_EPS, Arguments, Gradients, Needs, tensors_of
from unetgn.ops.checks import check_arguments
from unetgn.ops.layout import memory_format_of

_library = torch.library.Library("unetgn", "DEF")
_FORWARD = "unetgn::group_norm_silu"
_BACKWARD = "unetgn::group_norm_silu_backward"
# Inductor may choose the layouts: it runs convolutions in channels_last, and would copy x and y around each call else.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# PyTorch keeps compiled graphs on disk, which call these operators by position: keep the order where nothing is added.
_library.define(f"group_norm_silu({', '.join(SCHEMA.values())}) -> (Tensor y, Tensor mean, Tensor rstd)", tags=_TAGS)
BACKWARD_SCHEMA = {
    "dy": "Tensor dy",
    "x": SCHEMA["x"],
    "mean": "Tensor mean",
    "rstd": "Tensor rstd",
    **{name: kind for name, kind in SCHEMA.items() if name not in ("x", "eps", "implementation")},
    "needs": f"bool[{len(Needs._fields)}] needs",
    "implementation": SCHEMA["implementation"],
    "eps": f"{SCHEMA['eps']}={UNKNOWN_EPS}",  # last, and may be missing: older graphs on disk do not give it
}
_library.define(
    f"group_norm_silu_backward({', '.join(BACKWARD_SCHEMA.values())}) -> "
    f"({', '.join(f'Tensor {name}' for name in Gradients._fields)})",
    tags=_TAGS,
)


def _by_name(values: tuple[Any, ...]) -> tuple[Tensor, Arguments, Tensor, Tensor, Needs]:
    """Return dy, the arguments, mean, rstd and needs from what the registered backward is given."""
    named = {"eps": UNKNOWN_EPS, **dict(zip(BACKWARD_SCHEMA, values, strict=False))}  # PyTorch leaves a default out
    dy, mean, rstd, needs = (named.pop(name) for name in ("dy", "mean", "rstd", "needs"))
    return dy, Arguments(**named), mean, rstd, Needs._make(needs)


@torch.library.impl(_library, "group_norm_silu", "CompositeExplicitAutograd")
@torch._disable_dynamo  # a compiler has no business inside, even where it runs the operator while it traces
def _forward(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_forward_mode()
    arguments = Arguments._make(values)
    check_arguments(arguments)  # a saved graph calls with whatever it is given
    return dispatch.forward(arguments)


@torch.library.impl(_library, "group_norm_silu_backward", "CompositeExplicitAutograd")
@torch._disable_dynamo  # a compiler has no business inside, even where it runs the operator while it traces
def _backward(*values: Any) -> tuple[Tensor, ...]:
    _refuse_forward_mode()
    dy, arguments, mean, rstd, needs = _by_name(values)
    gradients = dispatch.backward(dy, arguments, mean, rstd, needs)
    return tuple(arguments.x.new_empty(0) if g is None else g for g in gradients)


def _refuse_forward_mode() -> None:
    """Raise where forward-mode differentiation is under way: PyTorch would take the derivative for zero."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "forward-mode differentiation through a compiled or exported group_norm_silu is not supported; "
            "call the function or module itself, not its compiled form"
        )


@torch.library.register_fake(_FORWARD, lib=_library)
def _forward_fake(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments._make(values)
    check_arguments(arguments)
    return dispatch.allocate(arguments.x, arguments.num_groups)


@torch.library.register_fake(_BACKWARD, lib=_library)
def _backward_fake(*values: Any) -> tuple[Tensor, ...]:
    _, arguments, _, _, needs = _by_name(values)
    x, *parameters = tensors_of(arguments)
    dx = torch.empty_like(x, memory_format=memory_format_of(x)) if needs.x else x.new_empty(0)
    return dx, *(
        x.new_empty(0)
        if t is None or not need
        else torch.empty_like(t, memory_format=torch.contiguous_format if t.dim() < 3 else memory_format_of(x))
        for t, need in zip(parameters, needs[1:], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    autograd.save_for_backward(ctx, inputs, mean, rstd)


def _derivative(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return autograd.backward(ctx, dy)


def _no_derivative(*_: Any) -> None:
    """Raise: gradients of gradients are the closed form's (`unetgn.ops.autograd`), which does not come through here."""
    raise NotImplementedError(
        f"{_BACKWARD} has no derivative; for gradients of gradients differentiate unetgn.group_norm_silu itself, with "
        "create_graph=True"
    )


torch.library.register_autograd(_FORWARD, _derivative, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(_BACKWARD, _no_derivative, lib=_library)
