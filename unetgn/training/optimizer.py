"""Turns the state of an optimizer into tensors with names, for safetensors, and back, with all others of a run.

A Python number is kept as a tensor of one int64 or float64, which no state is that is a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unetgn.training.checkpoint import TENSORS, Checkpoint, check_tensors
from unetgn.training.errors import CheckpointError
from unetgn.training.lora import trained_state
from unetgn.training.optimizers import NEVER_NEGATIVE, OF_GROUPS, OptimizerConfig, kept_of_groups, state_of
from unetgn.training.sharding import part_of

GROUPS = "param_groups"  # in the place of a parameter's name, for what holds for all of them
NUMBERS = {int: torch.int64, float: torch.float64}


def optimizer_to_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Name the optimizer's state {parameter name/state name: tensor}; `names` in the order of its parameters."""
    groups = {f"{GROUPS}/{key}": value for key, value in optimizer.param_groups[0].items() if key in OF_GROUPS}
    return {key: as_tensor(value) for key, value in groups.items()} | {
        f"{name}/{key}": as_tensor(value)
        for parameter, name in zip(parameters_of(optimizer), names, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """List the parameters of an optimizer, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def as_tensor(value: Tensor | float) -> Tensor:
    """Return a tensor as it is, and a number as one."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=NUMBERS[type(value)])


def as_it_was(tensor: Tensor) -> Tensor | float:
    """Return what `as_tensor` was given."""
    return tensor.item() if tensor.ndim == 0 and tensor.dtype in NUMBERS.values() else tensor


def check_optimizer_tensors(
    tensors: Mapping[str, Tensor],
    config: OptimizerConfig,
    network: nn.Module,
    betas: tuple[float, float],
    file: Path,
    *,
    stepped: bool,
) -> None:
    """Raise CheckpointError where these are not what `optimizer_to_tensors` gives of the network's optimizer.

    A fused optimizer writes where it takes a parameter's numbers to be, whatever the size of its state. No state at all
    is that of an optimizer that may not have `stepped` yet.
    """
    wanted = {f"{GROUPS}/{key}": tensor for key, tensor in kept_of_groups(config).items()}
    if stepped or tensors.keys() - wanted.keys():
        wanted |= state_of(config, network, betas, tensors)
    if stepped or tensors:
        check_tensors(tensors, wanted, file)
    for name, tensor in tensors.items():
        if name.rpartition("/")[2] in NEVER_NEGATIVE and (tensor < 0).any():
            raise CheckpointError(f"{file}: {name} is negative")


def read_state(
    checkpoint: Checkpoint,
    network: nn.Module,
    averages: Mapping[str, Tensor],
    *,
    optimizer: OptimizerConfig,
    betas: tuple[float, float],
) -> list[dict[str, Tensor]]:
    """Read the weights, their averages and the optimizer's state for the network.

    `averages` are the power averages that the run keeps. Raises CheckpointError where a tensor is not one of that
    network, or not finite.
    """
    weights, averaged, moments = map(checkpoint.tensors, TENSORS)
    wanted = trained_state(network)
    check_tensors(weights, wanted, checkpoint.path / "model.safetensors")
    check_tensors(averaged, wanted, checkpoint.path / "ema.safetensors")
    # With float16 the first steps, while its loss scale is looked for, may all have been left out.
    stepped = checkpoint.step > 0 and not (checkpoint.scaler and checkpoint.scaler["_growth_tracker"] == 0)
    file = checkpoint.path / "optimizer.safetensors"
    check_optimizer_tensors(moments, optimizer, network, betas, file, stepped=stepped)
    kept = checkpoint.tensors("averages") if averages else {}
    check_tensors(kept, averages, checkpoint.path / "averages.safetensors")
    return [weights, averaged, moments, kept]


def optimizer_from_tensors(optimizer: Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_to_tensors` gave, whole; of a parameter that a rank has a part of, it takes its part."""
    parameters = dict(zip(names, parameters_of(optimizer), strict=True))
    state: dict[Tensor, dict[str, Tensor | float]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name == GROUPS:
            for group in optimizer.param_groups:
                group[key] = as_it_was(tensor)
        else:
            parameter = parameters[name]
            state.setdefault(parameter, {})[key] = as_it_was(placed(tensor, key, parameter))
    optimizer.state.clear()
    optimizer.state.update(state)


def placed(tensor: Tensor, key: str, parameter: nn.Parameter) -> Tensor:
    """Copy a state to where its parameter is: a fused optimizer pairs them by place in memory, in one layout."""
    if tensor.shape != parameter.shape or key == "step":
        return tensor.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(part_of(tensor, parameter))
