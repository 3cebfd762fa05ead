"""Computes the operator on Triton, for NVIDIA and AMD GPUs: the two functions of this implementation.

`plan_contiguous` and `plan_channels_last` choose a path and tile sizes; `forward` and `backward` turn a plan into a
recipe, which is kept for the next call of the same sizes: the kernels, their grids and sizes; `launch` runs them;
`kernels/` holds the kernels, by pass and layout. docs/kernels.md tells the story of one launch.
Results are deterministic: every slot of every intermediate has one writer, and sums run in a fixed order.
"""

import torch
from torch import Tensor

from unetgn.ops.arguments import Arguments, Gradients, Needs, tensors_of
from unetgn.ops.layout import ACCUMULATION_DTYPE
from unetgn.ops.triton import device
from unetgn.ops.triton.backward import BackwardRecipe, backward_recipe
from unetgn.ops.triton.forward import ForwardRecipe, forward_recipe
from unetgn.ops.triton.launch import affine_operands, kind_of, run


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y like x, and mean and rstd (N, G), float32, or float64 for a float64 x.

    x has elements and is dense, contiguous or channels_last. The definition: `unetgn.ops.reference`.
    """
    x = arguments.x
    # Clusters never take pre_bias: Triton's planner of cluster layouts fails on some of those builds (3.7.1).
    clusters = device.clusters_chosen() and arguments.pre_bias is None
    recipe = forward_recipe(
        x.shape,
        x.dtype,
        not x.is_contiguous(),  # then channels_last
        x.device,
        arguments.num_groups,
        arguments.eps,
        arguments.activation,
        clusters,
    )
    return follow_forward(recipe, arguments)


def follow_forward(recipe: ForwardRecipe, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and rstd by that recipe."""
    x = arguments.x
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], arguments.num_groups), dtype=ACCUMULATION_DTYPE[x.dtype])
    rstd = torch.empty_like(mean)
    partials = None if recipe.partials is None else mean.new_empty(recipe.partials)
    affine = affine_operands(arguments)
    operands = (x, y, mean, rstd, partials, *affine)  # ForwardOperands, but for the time to make one
    run(recipe.launches, operands, x, recipe.ready, kind_of((x, *affine[:5]), *affine[5:]))
    return y, mean, rstd


def backward(dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients that `needs` asks for, from the statistics of `forward`.

    dy and x are dense in the same layout.
    """
    x = arguments.x
    recipe = backward_recipe(
        x.shape,
        x.dtype,
        not x.is_contiguous(),  # then channels_last
        x.device,
        arguments.num_groups,
        arguments.activation,
        needs,
    )
    return follow_backward(recipe, dy, arguments, mean, rstd, needs)


def follow_backward(
    recipe: BackwardRecipe, dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs
) -> Gradients:
    """Compute the gradients by that recipe."""
    x, *parameters = tensors_of(arguments)
    dx = torch.empty_like(x) if needs.x else None
    others = [
        None if tensor is None or not needed else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(parameters, needs[1:], strict=True)
    ]
    sums = None if recipe.sums is None else mean.new_empty(recipe.sums)
    folded = sums if recipe.folded is None else mean.new_empty(recipe.folded)
    m1_m2 = mean.new_empty((mean.numel(), 2))
    affine = affine_operands(arguments)
    operands = (x, dy, mean, rstd, sums, folded, m1_m2, *affine, dx, *others)  # BackwardOperands
    run(recipe.launches, operands, x, recipe.ready, kind_of((x, dy, mean, rstd, *affine[:5]), *affine[5:]))
    return Gradients(dx, *others)
