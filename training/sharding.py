"""Tensors of which each process may hold a part: FSDP2 keeps parameters and what belongs to them as DTensors.

A checkpoint knows nothing of it: it holds whole tensors, so that a run goes on with or without FSDP2, on any number of
processes. Every rank has to ask for a whole tensor, since each gives its part.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Network = TypeVar("Network", bound=nn.Module)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts, on this rank's device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, cut as `like` is; all of it where `like` is not cut."""
    if not isinstance(like, DTensor):
        return tensor
    # Without a source rank every one cuts its own part, and nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def to_cpu(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole contiguous copies on the CPU, which is what safetensors writes; none on ranks that do not `keep` them."""
    copies = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keep:
            copies[name] = complete.to("cpu", copy=True).contiguous()
    return copies


def without_weights(network: Network) -> Network:
    """A copy of the network that has no memory for its parameters: `load_state_dict(…, assign=True)` gives it some."""
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()}
    return copy.deepcopy(network, parameters)


def shard_by_block(network: nn.Module, accelerator: Accelerator) -> None:
    """Have FSDP2 gather the network block by block: by those of `network._no_split_modules` that are in it.

    Accelerate takes that list by itself, but fails where the network has no block of one of the classes.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        classes = {type(module).__name__ for module in network.modules()}
        blocks = getattr(network, "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = [name for name in blocks if name in classes]


def run_in_precision(network: nn.Module, accelerator: Accelerator) -> None:
    """Have the network compute in the run's precision and give float32, as Accelerate has it for all but FSDP2."""
    network.forward = convert_outputs_to_fp32(accelerator.autocast()(network.forward))
