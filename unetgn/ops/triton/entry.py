"""Computes the operator on Triton, for NVIDIA and AMD GPUs: the two functions of this implementation.

`plan_contiguous` and `plan_channels_last` choose a path and tile sizes; `forward` and `backward` turn a plan into a
recipe, which is kept for the next call of the same sizes: the kernels, their grids and sizes; `recipe` runs them;
`kernels/` holds the kernels, by pass and layout. docs/kernels.md tells the story of one launch.
Results are deterministic: every slot of every intermediate has one writer, and sums run in a fixed order.
"""

import torch
from torch import Tensor

from unetgn.ops.arguments import Arguments, Gradients, Needs, tensors_of
from unetgn.ops.checks import has_maps
from unetgn.ops.layout import ACCUMULATION_DTYPE
from unetgn.ops.triton import device
from unetgn.ops.triton.backward import backward_recipe
from unetgn.ops.triton.forward import forward_recipe
from unetgn.ops.triton.launch import Strides
from unetgn.ops.triton.recipe import Recipe, run

Affine = tuple[Tensor | None, ...]  # weight, bias, pre_bias, scale, shift, scale_map, shift_map


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y like x, and mean and rstd (N, G), float32, or float64 for a float64 x.

    x has elements and is dense, contiguous or channels_last. The definition: `unetgn.ops.reference`.
    """
    x = arguments.x
    recipe = forward_recipe(
        x.shape,
        x.dtype,
        not x.is_contiguous(),  # then channels_last
        x.device,
        arguments.num_groups,
        arguments.eps,
        arguments.activation,
        device.clusters_chosen() and may_take_clusters(arguments),
    )
    return follow_forward(recipe, arguments)


def may_take_clusters(arguments: Arguments) -> bool:
    """Return False with maps, for which no cluster has been compiled."""
    return not has_maps(arguments)


def follow_forward(recipe: Recipe, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and rstd by that recipe."""
    x = arguments.x
    y = torch.empty_like(x)
    # Sizes one by one, and one number for the memory: PyTorch takes half a microsecond to read a tuple of them.
    mean = x.new_empty(x.size(0), arguments.num_groups, dtype=ACCUMULATION_DTYPE[x.dtype])
    rstd = torch.empty_like(mean)
    affine, strides = affine_operands(arguments)
    memory = mean.new_empty(recipe.elements) if recipe.elements else None
    run(recipe, (x, *affine, y, mean, rstd), memory, strides)  # in the order of ForwardOperands
    return y, mean, rstd


def backward(
    dy: Tensor,
    arguments: Arguments,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
    dshortcut: Tensor | None = None,
) -> Gradients:
    """Compute the gradients that `needs` asks for, from the statistics of `forward`, and add `dshortcut` to dx.

    dy, dshortcut and x are dense in the same layout.
    """
    x = arguments.x
    recipe = backward_recipe(
        x.shape,
        x.dtype,
        not x.is_contiguous(),  # then channels_last
        x.device,
        arguments.num_groups,
        arguments.activation,
        device.clusters_chosen() and may_take_clusters(arguments),
        of_channels(arguments, needs),
    )
    return follow_backward(recipe, dy, arguments, mean, rstd, needs, dshortcut)


def of_channels(arguments: Arguments, needs: Needs) -> Needs:
    """Return what is asked of the kernel of parameters: not maps, whose gradients are written where dz is computed."""
    return needs._replace(scale=False, shift=False) if has_maps(arguments) else needs


def follow_backward(
    recipe: Recipe,
    dy: Tensor,
    arguments: Arguments,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
    dshortcut: Tensor | None = None,
) -> Gradients:
    """Compute the gradients by that recipe."""
    x = arguments.x
    gradients = [
        None
        if tensor is None or not needed
        else torch.empty_like(tensor)  # x and maps are dense, in x's layout
        if tensor.dim() > 2 or tensor.is_contiguous()
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(tensors_of(arguments), needs, strict=True)
    ]
    affine, strides = affine_operands(arguments)
    memory = mean.new_empty(recipe.elements)
    if affine[5] is None and affine[6] is None:
        tensors = x, dy, dshortcut, mean, rstd, *affine, *gradients, None, None  # in the order of BackwardOperands
    else:
        scale_shift = gradients[4:]
        tensors = x, dy, dshortcut, mean, rstd, *affine, *gradients[:4], None, None, *scale_shift
    run(recipe, tensors, memory, strides)
    return tuple.__new__(Gradients, gradients)


def affine_operands(arguments: Arguments) -> tuple[Affine, Strides]:
    """Return weight, bias, pre_bias, scale and shift as kernels read them, maps by themselves, and the strides of rows.

    Maps are dense in x's layout.
    """
    weight, bias = arguments.weight, arguments.bias
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    pre_bias, scale, shift = arguments.pre_bias, arguments.scale, arguments.shift
    if pre_bias is None and scale is None and shift is None:
        return (weight, bias, None, None, None, None, None), (0, 0, 0)
    if has_maps(arguments):
        pre_bias = _dense_rows(pre_bias)
        return (weight, bias, pre_bias, None, None, scale, shift), (_row_stride(pre_bias), 0, 0)
    pre_bias, scale, shift = map(_dense_rows, (pre_bias, scale, shift))
    strides = _row_stride(pre_bias), _row_stride(scale), _row_stride(shift)
    return (weight, bias, pre_bias, scale, shift, None, None), strides


def _dense_rows(values: Tensor | None) -> Tensor | None:
    """Copy an (N, C) tensor whose neighbours in a row are not neighbours in memory: it is small."""
    if values is None or values.stride(1) == 1 or values.size(1) == 1:
        return values
    return values.contiguous()


def _row_stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)
