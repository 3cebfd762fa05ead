"""Builds the U-Nets that a step is compared of: diffusers', the same fused, ours in two grades, MONAI's.

All but MONAI's have the same weights. Each is a function of the batch that `Network.inputs` draws.
"""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import unetgn
from benchmarks.host_overhead import LAYOUTS
from benchmarks.networks import Network
from unetgn.nn.checkpointing import CheckpointGrade

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]
BASE = "diffusers"
# With the grade of recomputation of ours: `UNet.set_checkpointing`.
CONTENDERS: dict[str, CheckpointGrade | None] = {
    BASE: None,
    "diffusers, checkpointed": None,
    "diffusers, fused": None,
    "ours": "none",
    "ours, activations": "activations",
    "ours, blocks": "blocks",
    "MONAI": None,
}
COMPILED = ", compiled"  # behind a name
BACKEND = "inductor"
COMPARED = (BASE, "diffusers, fused", "ours", "ours, activations", "MONAI")  # in `benchmarks.unet_step`


class Absent(RuntimeError):
    """Says that a contender cannot take part here, and why."""


class Step:
    """Holds one contender: a forward and a backward pass on one batch, by `step()`."""

    def __init__(self, model: nn.Module, call: Callable[[Batch], Tensor], batch: Batch) -> None:
        self.model, self.call, self.batch = model, call, batch

    def forward(self) -> Tensor:
        """Make the forward pass alone."""
        return self.call(self.batch)

    def __call__(self) -> None:
        """Make the step; gradients are dropped."""
        self.forward().float().square().mean().backward()
        self.model.zero_grad(set_to_none=True)


def make_step(name: str, network: Network, *, layout: str, dtype: torch.dtype, device: str = "cpu") -> Step:
    """Build a contender, by its name in `CONTENDERS`, with ", compiled" behind it for what torch.compile makes of it.

    Raises Absent where it cannot take part.
    """
    plain = name.removesuffix(COMPILED)
    if plain != name and BACKEND == "inductor" and shutil.which("g++") is None and device == "cpu":
        raise Absent("torch.compile needs a compiler, and there is no g++")
    torch.manual_seed(0)
    x, timesteps, conditions = network.inputs()
    model = (_monai(network) if plain == "MONAI" else _ours_or_theirs(plain, network)).to(device, dtype).train()
    model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    run: Callable[..., Any] = model if plain == name else torch.compile(model, backend=BACKEND)
    x = x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    moved = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in conditions.items()}
    return Step(model, (_call_monai if plain == "MONAI" else _call)(run), (x, timesteps.to(device), moved))


def _call(run: Callable[..., Any]) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        x, timesteps, conditions = batch
        sample: Tensor = run(x, timesteps, **conditions).sample
        return sample

    return call


def _call_monai(run: Callable[..., Any]) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        x, timesteps, conditions = batch
        text, labels = conditions.get("encoder_hidden_states"), conditions.get("class_labels")
        output: Tensor = run(x, timesteps, context=text, class_labels=labels)
        return output

    return call


def _ours_or_theirs(name: str, network: Network) -> nn.Module:
    model = network.build()
    if name == "diffusers, fused":
        unetgn.fuse(model)
    elif name == "diffusers, checkpointed":
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    elif grade := CONTENDERS[name]:
        ours = unetgn.UNet.from_diffusers(model)
        ours.set_checkpointing(grade)
        return ours
    return model


def _monai(network: Network) -> nn.Module:
    """Build MONAI's network of the same plan."""
    if network.monai is None:
        raise Absent("MONAI has no such network")
    try:
        from monai.networks.nets import DiffusionModelUNet
    except ModuleNotFoundError:
        raise Absent('MONAI is not installed: pip install -e ".[train,peers]"') from None
    model: nn.Module = DiffusionModelUNet(**{"spatial_dims": 2, "in_channels": 3, "out_channels": 3, **network.monai})
    return model


def kept_bytes(step: Step) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, each storage once, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.forward()
    return sum(storage.nbytes() for storage in kept.values())
