"""Turns the state of an optimizer into tensors with names, for safetensors, and back, with all others of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from unetgn.training.checkpoint import TENSORS, Checkpoint, check_tensors
from unetgn.training.errors import CheckpointError
from unetgn.training.sharding import part_of


def optimizer_to_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Name the optimizer's state {parameter name/state name: tensor}; `names` in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for number, name in enumerate(names)
        for key, value in state.get(number, {}).items()
    }


def check_optimizer_tensors(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], file: Path) -> None:
    """Raise CheckpointError where these are not what `optimizer_to_tensors` gives of AdamW for these parameters.

    A fused optimizer writes where it takes a parameter's numbers to be, whatever the size of its state. No state at all
    is that of an optimizer that has not made a step.
    """
    step = torch.zeros(())
    kinds = {"step": lambda _: step, "exp_avg": lambda parameter: parameter, "exp_avg_sq": lambda parameter: parameter}
    wanted = {f"{name}/{kind}": of(parameter) for name, parameter in parameters.items() for kind, of in kinds.items()}
    if tensors:
        check_tensors(tensors, wanted, file)
    for name, tensor in tensors.items():
        if not name.endswith("/exp_avg") and (tensor < 0).any():
            raise CheckpointError(f"{file}: {name} is negative")


def read_state(
    checkpoint: Checkpoint, network: Mapping[str, Tensor], parameters: Iterable[str], averages: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Read the weights, their averages and the optimizer's state for the network that has this state dict.

    `parameters` are the names of those that are trained, `averages` the power averages that the run keeps. Raises
    CheckpointError where a tensor is not one of that network, or not finite.
    """
    weights, averaged, moments = map(checkpoint.tensors, TENSORS)
    check_tensors(weights, network, checkpoint.path / "model.safetensors")
    check_tensors(averaged, network, checkpoint.path / "ema.safetensors")
    trained = {name: network[name] for name in parameters}
    check_optimizer_tensors(moments, trained, checkpoint.path / "optimizer.safetensors")
    kept = checkpoint.tensors("averages") if averages else {}
    check_tensors(kept, averages, checkpoint.path / "averages.safetensors")
    return [weights, averaged, moments, kept]


def optimizer_from_tensors(optimizer: Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_to_tensors` gave, whole; of a parameter that a rank has a part of, it takes its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[number[name]]
        of_elements = tensor.shape == parameter.shape and key != "step"
        state.setdefault(number[name], {})[key] = part_of(tensor, parameter) if of_elements else tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # a fused optimizer pairs them by place in memory: same layout
        for key, value in values.items():
            if value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)
