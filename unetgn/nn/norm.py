"""Normalizes in groups, with the activation that follows, as a module; SiLU is the one that is fused."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from unetgn.ops import dispatch, group_norm_silu, group_norm_silu_with_shortcut
from unetgn.ops.checks import check_activation, check_eps, check_int, check_num_groups

Activation = Literal["silu", "gelu", "relu", "mish"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
}


def activate(x: Tensor, name: Activation) -> Tensor:
    """Apply an activation: x * sigmoid(x), x * Phi(x) (the exact GELU), max(x, 0), or x * tanh(softplus(x))."""
    return _FUNCTIONS[name](x)


class GroupNormSiLU(nn.GroupNorm):
    """Normalizes in groups and applies SiLU, in one pass over the input.

    Arguments, parameters and state dict are those of `torch.nn.GroupNorm`, so a checkpoint moves either way; bias=False
    has a weight alone. The formula, layouts and dtypes are those of `unetgn.group_norm_silu`.

    Shapes: x (N, num_channels, *spatial) -> the same; pre_bias, scale and shift (N, num_channels), each optional; scale
    and shift may have x's own shape instead.
    `activation=None` leaves the SiLU out; the module then prints as GroupNorm.

    Raises ValueError where num_groups does not divide num_channels, with the nearest counts that would do
    (`largest_group_count` picks one), where eps is negative or not finite, and for another activation; TypeError where
    num_groups or num_channels is no int or eps no float. What `forward` refuses: `unetgn.group_norm_silu`.

    Wu & He 2018 (arXiv 1803.08494), equation 7; scale and shift (AdaGN): Dhariwal & Nichol 2021 (arXiv 2105.05233),
    section 3.1.
    """

    activation: str | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = "silu",
    ) -> None:
        check_num_groups(num_groups, num_channels)
        check_eps(eps)
        check_activation(activation)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        if not bias:  # by hand: torch.nn.GroupNorm has the option from 2.13 on
            self.register_parameter("bias", None)
        self.activation = activation

    def forward(
        self, x: Tensor, pre_bias: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            pre_bias=pre_bias,
            scale=scale,
            shift=shift,
        )

    def _get_name(self) -> str:
        return type(self).__name__ if self.activation else "GroupNorm"


class GroupNormAct(GroupNormSiLU):
    """Normalizes in groups by the same operator, and applies another activation than SiLU in a pass of its own."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, after: Activation) -> None:
        super().__init__(num_groups, num_channels, eps, activation=None)
        self.after = after

    def forward(
        self, x: Tensor, pre_bias: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return activate(super().forward(x, pre_bias, scale, shift), self.after)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, after={self.after!r}"

    def _get_name(self) -> str:
        return type(self).__name__


def with_shortcut(norm: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return norm(x), and x for the shortcut around the norm and what follows it; without a norm, x twice.

    On Triton's kernels, whoever goes on with that x spares a pass over its gradient
    (`unetgn.ops.group_norm_silu_with_shortcut`). Elsewhere, and where the norm is another module than ours or someone
    has hooked into its call, it is norm(x) and x.
    """
    if (
        type(norm) is GroupNormSiLU
        and type(x) in dispatch.ORDINARY
        and x.requires_grad
        and dispatch.is_triton(dispatch.chosen(), x)
        and not _is_hooked(norm)
    ):
        num_groups, weight, bias, eps, activation = norm.num_groups, norm.weight, norm.bias, norm.eps, norm.activation
        return group_norm_silu_with_shortcut(x, num_groups, weight, bias, eps, activation=activation)
    return (x if norm is None else norm(x)), x


def _is_hooked(module: nn.Module) -> bool:
    """Return True where a call of the module is more than its class's `forward`: hooks, or a `forward` of its own."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks or "forward" in vars(module) or _has_any_global_hook())


def largest_group_count(num_channels: int, at_most: int = 32) -> int:
    """Find the largest number of groups, at most `at_most`, that divides num_channels: 32 for 320 channels, 30 for 150.

    No layer changes the count that it is given; this is how to ask for one that fits. Raises TypeError where an
    argument is no int, ValueError where one is below 1.
    """
    check_int("num_channels", num_channels)
    check_int("at_most", at_most)
    if num_channels < 1 or at_most < 1:
        raise ValueError(f"num_channels and at_most must be at least 1, got {num_channels} and {at_most}")
    return next(count for count in range(min(at_most, num_channels), 0, -1) if num_channels % count == 0)
