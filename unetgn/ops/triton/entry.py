"""The operator on Triton, for NVIDIA and AMD GPUs: the two entry functions of the implementation.

Where to look: `plan_*` choose a path and tile sizes, `forward` and `backward` turn a plan into
kernel launches, `kernels/` holds the kernels by layout. Results are deterministic: every
slot of every intermediate has one writer, and sums run in a fixed order.
"""

import torch
from torch import Tensor

from unetgn.ops.triton.backward import Gradients, Inputs, backward_launches, backward_recipe
from unetgn.ops.triton.device import clusters_chosen, device_of
from unetgn.ops.triton.forward import forward_launches, forward_recipe
from unetgn.ops.triton.launch import call_of, empty_statistics, run


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, mean (N, G), rstd (N, G)); x is dense, contiguous or channels_last.

    Statistics come in float32, float64 for a float64 x. The definition: `unetgn.ops.reference`.
    """
    call = call_of(x, num_groups, activation, device_of(x.device), weight, bias, pre_bias, scale, shift)
    y = torch.empty_like(x)
    mean, rstd = empty_statistics(x, num_groups), empty_statistics(x, num_groups)
    if x.numel():
        # Clusters never take pre_bias: Triton's planner of cluster layouts fails on some of those builds (3.7.1).
        clusters = clusters_chosen() and pre_bias is None
        recipe = forward_recipe(call.problem, call.channels_last, call.device, clusters, activation, eps)
        run(forward_launches(recipe, call, x, y, mean, rstd), x)
    return y, mean, rstd


def backward(
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
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias, pre_bias, scale, shift), each in its tensor's dtype; None where `needs` is False.

    dy and x are dense in the same layout; mean and rstd are those of `forward`.
    """
    call = call_of(x, num_groups, activation, device_of(x.device), weight, bias, pre_bias, scale, shift)
    results = [
        None if tensor is None or not needed else torch.empty_like(tensor, memory_format=memory_format)
        for tensor, needed, memory_format in zip(
            (x, weight, bias, pre_bias, scale, shift),
            needs,
            (torch.preserve_format, *[torch.contiguous_format] * 5),
            strict=True,
        )
    ]
    gradients = Gradients(*results)
    if x.numel():
        with_xhat = gradients.dpre_bias is not None
        recipe = backward_recipe(call.problem, call.channels_last, call.device, activation, with_xhat)
        run(backward_launches(recipe, call, Inputs(dy, x, mean, rstd), gradients), x)
    else:
        for tensor in results:
            if tensor is not None:
                tensor.zero_()
    return tuple(results)  # type: ignore[return-value]
