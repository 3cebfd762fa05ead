"""Chooses the configuration for pictures that came without one: a run's own where it goes on, else by the device."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from unetgn.training.config_yaml import find_config

WITH_GPU, ON_CPU = "my_images", "my_images32"


def choose_config(begun: Path | None) -> tuple[Path, str]:
    """Return the file of the configuration, and the line that says which one it is and why.

    `begun` is the configuration of the run that is to go on: on another device, too, it keeps what it has.
    """
    if begun is not None and begun.is_file():
        return begun, f"configuration: {begun}, of the run that goes on"
    if trains_on_cpu():
        why = f"32×32 and a small network, since this trains on a CPU; --config {WITH_GPU} for 64×64"
        return find_config(ON_CPU), f"configuration: {ON_CPU}, {why}"
    return find_config(WITH_GPU), f"configuration: {WITH_GPU}, 64×64"


def trains_on_cpu() -> bool:
    """Return True where Accelerate finds no other device, or is told to take none (`accelerate launch --cpu`)."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
