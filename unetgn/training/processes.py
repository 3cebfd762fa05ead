"""Meets the processes that a launcher started, and checks that they are what was asked for.

Accelerate's launcher has ways to run something else than its command line says, without a word; here they are errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from unetgn import UNet
from unetgn.programs.allocator import keep_freed_memory
from unetgn.training.config import RunConfig, conditional_only
from unetgn.training.data.samples import Samples
from unetgn.training.errors import ConfigError, reason
from unetgn.training.lora import check_installed, count_trained
from unetgn.training.meeting import LEFT_ALONE, connecting
from unetgn.training.optimizers import ELEMENTWISE, describe_optimizer, load_class

T = TypeVar("T")


def make_accelerator(config: RunConfig, output: Path) -> Accelerator:
    """Make Accelerate's view of the processes. Raises ConfigError where it is not what was configured or launched,
    ConnectionError where another one does not come.
    """
    check_trackers(config.train.trackers)
    try:
        load_class(config.optimizer.name)
        if config.lora is not None:
            check_installed()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ConfigError(
            "accelerate was launched with --gradient_accumulation_steps: say train.gradient_accumulation=N instead"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.train.mixed_precision):
        raise ConfigError(
            f"accelerate was launched with --mixed_precision {launched}, but train.mixed_precision is "
            f"{config.train.mixed_precision}: set train.mixed_precision={launched}, or leave the launcher's out"
        )
    plugin = fully_sharded(config)
    try:
        with connecting() as timeout:
            accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),  # said outright, processes without GPUs find each other
                mixed_precision=config.train.mixed_precision,
                log_with=list(config.train.trackers) or None,
                project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "tb")),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout), data_parallel(config)],
                fsdp_plugin=plugin,
            )
    except ValueError as error:
        raise ConfigError(f"train.mixed_precision is {config.train.mixed_precision}: {error}") from error
    check_processes(accelerator.num_processes, config.train.processes)
    if config.train.noise_scale and accelerator.num_processes * config.train.gradient_accumulation == 1:
        raise ConfigError(
            "train.noise_scale compares the gradients of parts of a step, and here it has one part: set "
            f"train.gradient_accumulation=2 train.batch_size={max(1, config.train.batch_size // 2)}, start several "
            "processes, or leave it out"
        )
    keep_freed_memory(accelerator.device.type)
    return accelerator


def ask_main(accelerator: Accelerator, question: Callable[[], T]) -> T:
    """Return the main process's answer on every process. Where the question raises, it raises on every process.

    Raises ConnectionError where another process has gone before it came here.
    """
    found: T | None = None
    refusal: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = question()
        except Exception as error:
            refusal = error
    try:
        found, refusal = broadcast_object_list([found, refusal])
    except RuntimeError as error:  # gloo's and NCCL's
        raise ConnectionError(f"{LEFT_ALONE}: {reason(error)}") from error
    if refusal is not None:
        raise refusal
    return cast(T, found)


def data_parallel(config: RunConfig) -> DistributedDataParallelKwargs:
    """Say how DDP is to run: gradients live in the buckets that are summed, which saves a copy of them.

    The graph is static: the same at every step, so that parameters which take no part in the loss are found once. Not
    with accumulation, whose passes without a sum are another graph to DDP, which then fails.
    """
    return DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, static_graph=config.train.gradient_accumulation == 1
    )


def fully_sharded(config: RunConfig) -> FullyShardedDataParallelPlugin | None:
    """Set FSDP2 up where the launcher asks for it. Raises ConfigError for what checkpoints here cannot keep exact."""
    if not fsdp_is_asked_for():
        return None
    # Weights are gathered in float32 and autocast chooses the precision of each operator, as without FSDP2. The policy
    # that Accelerate would make from the precision rounds timesteps, norms' weights and summed gradients as well.
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    refused = {
        "fsdp_version 1": plugin.fsdp_version != 2,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "train.compile": config.train.compile,
        "lora": config.lora is not None,
        "train.noise_scale": config.train.noise_scale,
        f"optimizer.name {config.optimizer.name}": config.optimizer.name not in ELEMENTWISE,
    }
    for name in (name for name, asked in refused.items() if asked):
        raise ConfigError(f"{name} is not supported with FSDP: start with configs/accelerate/fsdp2.yaml, without it")
    return plugin


def fsdp_is_asked_for() -> bool:
    """Return True where the launcher was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a tracker that Accelerate does not know or that is not installed."""
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"train.trackers has {name!r}; Accelerate knows {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in installed:
            raise ConfigError(
                f"train.trackers has {name!r}, which is not installed: pip install {name}, or leave it out"
            )


def check_processes(started: int, asked: int | None) -> None:
    """Raise ConfigError where the processes are not those of one run, or not as many as `train.processes` asks for."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != started:
        raise ConfigError(
            f"the launcher made {world} processes, but Accelerate sees {started}, so that each would train alone: "
            f"start them with {command_for(world)}"
        )
    if asked is not None and asked != started:
        raise ConfigError(f"train.processes is {asked}, but {started} started: start them with {command_for(asked)}")


def command_for(processes: int) -> str:
    """Write the launcher's command line for so many processes of one machine."""
    if processes == 1:
        return "python training/train.py …"
    return f"accelerate launch --multi_gpu --num_processes {processes} training/train.py … (so on CPUs, too)"


def describe(config: RunConfig, accelerator: Accelerator, network: UNet, samples: Samples) -> str:
    """Describe what is about to run, for the first lines of the log; the network may be one without memory.

    Raises ConfigError where the network has no layer that is to get an adapter.
    """
    train, parameters = config.train, network.num_parameters()
    optimizer = describe_optimizer(config.optimizer, network)
    batch = train.batch_size * train.gradient_accumulation * accelerator.num_processes
    epochs = samples.progress(train.steps * batch).get("epoch")
    passes = "" if epochs is None else f" ({epochs:.1f} epochs)"
    several = {DistributedType.NO: "", DistributedType.FSDP: ", FSDP2"}.get(accelerator.distributed_type, ", DDP")
    if fsdp_is_asked_for() and not accelerator.is_fsdp2:
        several += " (Accelerate has FSDP on accelerators only: this tries out the configuration, not FSDP)"
    only = (
        "\nnever without its class or text (objective.label_dropout is 0): no sampling without, no guidance"
        if conditional_only(config)
        else ""
    )
    trained = ""
    if config.lora is not None:
        try:
            count = count_trained(network, config.lora)
            trained = f", which stay, and adapters of rank {config.lora.rank} of {count:,}"
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return (
        f"{accelerator.num_processes} process(es) on {accelerator.device}{several}, precision {train.mixed_precision}\n"
        f"{batch} images a step ({train.batch_size} × {train.gradient_accumulation} accumulated × "
        f"{accelerator.num_processes} processes), {train.steps} steps over {samples}{passes}\n"
        f"{parameters:,} parameters{trained}, {optimizer}{only}"
    )
