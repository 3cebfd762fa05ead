"""Checks that a checkpoint is one that a run could go on from, whatever its sums say: a stranger writes right ones."""

from __future__ import annotations

import re

from unetgn import __version__
from unetgn.messages import plain, said
from unetgn.training.checkpoint import BASE, Checkpoint
from unetgn.training.config_files import load_config
from unetgn.training.data.samples import Samples
from unetgn.training.data.standing import SAMPLES
from unetgn.training.errors import CheckpointError, CheckpointFormatError, ConfigError
from unetgn.training.lora import add_adapter, trained_parameters
from unetgn.training.network import described_network
from unetgn.training.objective import described_scheduler
from unetgn.training.optimizer import read_state
from unetgn.training.power_averages import PowerAverages
from unetgn.unet.model import empty_unet


def check_sound(checkpoint: Checkpoint, samples: Samples) -> None:
    """Raise CheckpointError where no run at all could go on from a checkpoint.

    Its configurations can be read, each describes a network whose tensors these are, finite ones, and, if it is of
    these samples, no reader has read more than there is. Raises CheckpointFormatError, for which none is passed over,
    where a newer unetgn wrote what cannot be read here.
    """
    try:
        check_contents(checkpoint)
        if checkpoint.images == samples.fingerprint():
            check_samples(checkpoint, samples)
    except CheckpointError as error:
        if numbers(checkpoint.unetgn_version) > numbers(__version__):
            raise CheckpointFormatError(
                f"{error} (unetgn {plain(checkpoint.unetgn_version)} wrote it, and this is {__version__}: use that one)"
            ) from error
        raise


def check_contents(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where configurations or tensors cannot be read, or do not belong together."""
    try:
        config = load_config(checkpoint.config_file)
        network = empty_unet(config.model)
    except (ValueError, RuntimeError) as error:  # the second where a size is beyond what torch counts
        if isinstance(error, ConfigError) and isinstance(error.__cause__, OSError):  # no sign of damage
            raise error.__cause__ from None
        raise CheckpointError(f"{checkpoint.path} is damaged: {said(error)}") from error
    shapes, others = ({name: tensor.shape for name, tensor in each.state_dict().items()}
                      for each in (network, described_network(checkpoint)))  # fmt: skip
    if shapes != others:
        raise CheckpointError(f"{checkpoint.path} is damaged: its config.yaml and config.json are of two networks")
    if (config.lora is None) != (checkpoint.base() is None):
        raise CheckpointError(f"{checkpoint.path} is damaged: its config.yaml and {BASE} do not both speak of adapters")
    if config.lora is not None:
        try:
            add_adapter(network, config.lora)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path} is damaged: {said(error)}") from error
    averages = PowerAverages(trained_parameters(network), widths=config.ema.power_widths).state()
    read_state(checkpoint, network, averages, optimizer=config.optimizer, betas=config.train.betas)
    described_scheduler(checkpoint, config.objective)


def check_samples(checkpoint: Checkpoint, samples: Samples) -> None:
    """Raise CheckpointError where these cannot be where the readers of these samples stood."""
    try:
        samples.check_restore(checkpoint.samples())
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path} is damaged: {SAMPLES}: {said(error)}") from error


def numbers(version: str) -> list[int]:
    """Return the numbers in a version, to compare."""
    return [int(number) for number in re.findall(r"\d{1,9}", version)[:3]]
