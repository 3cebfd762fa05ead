"""The operator as PyTorch's compilers and dispatch modes see it: `unetgn::group_norm_silu` and its backward.

They carry shapes and layouts (for `torch.compile`, `torch.export`, fake tensors) and a derivative. Eager calls do not
come through here, since the dispatcher's detour through Python costs more than a small normalization.
Gradients that were not asked for come back as empty tensors, because an operator cannot return None.
"""

from typing import Any

import torch
from torch import Tensor

from unetgn.ops import autograd, dispatch
from unetgn.ops.layout import memory_format_of

_library = torch.library.Library("unetgn", "DEF")
_FORWARD = "unetgn::group_norm_silu"
_BACKWARD = "unetgn::group_norm_silu_backward"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library.define(
    "group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool activation, "
    "Tensor? pre_bias, Tensor? scale, Tensor? shift, str implementation) -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=_TAGS,
)
_library.define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt num_groups, Tensor? weight, "
    "Tensor? bias, bool activation, Tensor? pre_bias, Tensor? scale, Tensor? shift, bool[6] needs, "
    "str implementation) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpre_bias, Tensor dscale, Tensor dshift)",
    tags=_TAGS,
)


@torch.library.impl(_library, "group_norm_silu", "CompositeExplicitAutograd")
@torch._disable_dynamo  # a compiler has no business inside, even where it runs the operator while it traces
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_forward_mode()
    return dispatch.forward(*arguments)


@torch.library.impl(_library, "group_norm_silu_backward", "CompositeExplicitAutograd")
@torch._disable_dynamo  # a compiler has no business inside, even where it runs the operator while it traces
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    _refuse_forward_mode()
    x = arguments[1]
    return tuple(x.new_empty(0) if g is None else g for g in dispatch.backward(*arguments))


def _refuse_forward_mode() -> None:
    """A registered operator has no derivative in forward mode, and PyTorch would take it for zero."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "forward-mode differentiation through a compiled or exported group_norm_silu is not supported; "
            "call the function or module itself, not its compiled form"
        )


@torch.library.register_fake(_FORWARD, lib=_library)
def _forward_fake(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.allocate(x, num_groups)


@torch.library.register_fake(_BACKWARD, lib=_library)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: list[bool],
    implementation: str,
) -> tuple[Tensor, ...]:
    parameters = (
        t.new_empty(t.shape) if t is not None and need else x.new_empty(0)
        for t, need in zip((weight, bias, pre_bias, scale, shift), needs[1:], strict=True)
    )
    dx = torch.empty_like(x, memory_format=memory_format_of(x)) if needs[0] else x.new_empty(0)
    return dx, *parameters


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    autograd.save_for_backward(ctx, inputs, mean, rstd)


def _derivative(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return autograd.backward(ctx, dy)


def _no_derivative(*_: Any) -> None:
    """Gradients of gradients are the closed form's (`unetgn.ops.autograd`), which does not come through here."""
    raise NotImplementedError(
        f"{_BACKWARD} has no derivative; for gradients of gradients differentiate unetgn.group_norm_silu itself, with "
        "create_graph=True"
    )


torch.library.register_autograd(_FORWARD, _derivative, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(_BACKWARD, _no_derivative, lib=_library)
