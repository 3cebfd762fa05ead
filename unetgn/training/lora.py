"""Trains low-rank adapters of a network whose own weights stay, and merges them.

Hu et al. 2021 (arXiv 2106.09685): a linear layer W becomes W + (alpha / rank)·B·A, of which A (rank, in) and
B (out, rank) are trained; B begins at 0, and so the network at what it was. The layers are PEFT's, by the names that
diffusers reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unetgn import UNet
from unetgn.programs.last_words import what_brings
from unetgn.unet.model import empty_unet

ADAPTER = "default"  # PEFT's name of the one adapter
FOLDER, WEIGHTS = "lora", "pytorch_lora_weights.safetensors"  # where a run's folder has its adapter; diffusers' name
OF_ADAPTER, OF_LAYER = ".lora_", ".base_layer."  # in the names of its tensors, and of those of the layer below
ADAPTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LoRAConfig:
    """Configures adapters that are trained in the place of a network's weights; {} takes the defaults.

    The network is that of train.initial_weights, which has to stay where it is. RUN/lora is the adapter, for
    `load_lora_weights` of diffusers' pipelines; RUN/pipeline has it merged into the weights.
    """

    rank: int = 8
    """Rank of the change of each layer: parameters grow with it."""
    alpha: float | None = None
    """The change is multiplied by alpha / rank; null is rank, a factor of 1."""
    dropout: float = 0.0
    """Probability, in [0, 1), of leaving out an element of what an adapter reads."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers and convolutions that get adapters, by the ends of their names: by default those of attention. For
    convolutions of residual blocks too: conv1, conv2."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0, or null for lora.rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it is a probability, at least 0 and below 1")
        if not self.targets:
            raise ValueError("lora.targets is empty; it names layers, such as to_q,to_k,to_v,to_out.0")


def check_installed() -> None:
    """Raise ValueError where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"lora is set, and its layers are those of the package peft: pip install {what_brings('[train,lora]')}, or "
            "leave lora out"
        )


def add_adapter(network: UNet, config: LoRAConfig) -> None:
    """Freeze a network's weights and give its layers adapters, random ones by torch's seed, that change nothing yet.

    Raises ValueError for a target that no linear layer or convolution is.
    """
    from peft import LoraConfig

    layers = [name for name, module in network.named_modules() if isinstance(module, ADAPTED)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdecimal()})
            raise ValueError(
                f"lora.targets has {target!r}, and no linear layer or convolution of the network is called so; there "
                f"are {', '.join(ends)}, and ends of longer names, such as {layers[-1]}"
            )
    chosen = [
        name for name in layers if any(name == target or name.endswith(f".{target}") for target in config.targets)
    ]
    scale = config.rank if config.alpha is None else config.alpha
    adapter = LoraConfig(r=config.rank, lora_alpha=scale, lora_dropout=config.dropout, target_modules=chosen)
    network.requires_grad_(False)
    # PEFT makes adapters in memory first, also of a network without any: of a stranger's rank there may not be so much.
    with torch.device("meta") if network.device.type == "meta" else contextlib.nullcontext():
        network.add_adapter(adapter, ADAPTER)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: all, or those of adapters."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint has of a network: its state dict, or that of its adapters."""
    state = network.state_dict()
    return {name: state[name] for name in state if OF_ADAPTER in name} if is_adapted(network) else state


def is_adapted(network: nn.Module) -> bool:
    """Return True where a network has adapters."""
    return any(OF_ADAPTER in name for name, _ in network.named_parameters())


def count_trained(network: UNet, config: LoRAConfig) -> int:
    """Count the parameters of a network's adapters; it gets them. Raises ValueError as `add_adapter` does."""
    add_adapter(network, config)
    return sum(math.prod(parameter.shape) for parameter in trained_parameters(network).values())


def base_digest(network: nn.Module) -> str:
    """Compute a sha256 of the weights below the adapters, the same with adapters and without, in float32."""
    total = hashlib.sha256()
    own = {name.replace(OF_LAYER, "."): t for name, t in network.state_dict().items() if OF_ADAPTER not in name}
    for name in sorted(own):
        total.update(name.encode())
        total.update(own[name].detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


@torch.no_grad()
def merged(network: UNet) -> UNet:
    """Make the network without adapters, on the CPU: those of `network` are added to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    changes = {f"{name}.weight": module.get_delta_weight(ADAPTER)
               for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}  # fmt: skip
    state = {name.replace(OF_LAYER, "."): t for name, t in network.state_dict().items() if OF_ADAPTER not in name}
    plain = empty_unet(network.unet_config)
    weights = {name: (t + changes[name] if name in changes else t).to("cpu", copy=True) for name, t in state.items()}
    plain.load_state_dict(weights, assign=True)
    return plain.eval()
