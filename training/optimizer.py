"""Turns the state of an optimizer into tensors with names, for safetensors, and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.errors import CheckpointError
from training.sharding import part_of


def optimizer_to_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Name the optimizer's state {parameter name/state name: tensor}; `names` in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for number, name in enumerate(names)
        for key, value in state.get(number, {}).items()
    }


def optimizer_from_tensors(optimizer: Optimizer, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_to_tensors` gave, whole; a rank that has a part of a parameter takes its part of them.

    Raises CheckpointError where parameters differ.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in number:
            raise CheckpointError(f"the checkpoint's optimizer has a parameter that the model has not: {name}")
        parameter = parameters[number[name]]
        of_elements = tensor.shape == parameter.shape and key != "step"
        state.setdefault(number[name], {})[key] = part_of(tensor, parameter) if of_elements else tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # a fused optimizer pairs them by place in memory: same layout
        for key, value in values.items():
            if value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)
