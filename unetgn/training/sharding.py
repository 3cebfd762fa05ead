"""Takes tensors apart and puts them together: FSDP2 keeps parameters as DTensors, of which each process has a part.

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
    """Gather the tensor with all its parts, on this rank's device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor itself, not a copy; all of it where it has no parts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut this rank's part out of a whole tensor that all ranks have, as `like` is cut; all of it where it is not."""
    if not isinstance(like, DTensor):
        return tensor
    # Without a source rank every one cuts its own part, and nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def to_cpu(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copy tensors, whole and contiguous, to the CPU, as safetensors writes them; ranks that do not `keep` get none."""
    copies = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keep:
            copies[name] = complete.to("cpu", copy=True).contiguous()
    return copies


def without_weights(network: Network) -> Network:
    """Copy the network without memory for its parameters: `load_state_dict(…, assign=True)` gives it some."""
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
    """Have the network compute in the run's precision and return float32, as Accelerate does for all but FSDP2."""
    network.forward = convert_outputs_to_fp32(accelerator.autocast()(network.forward))
