"""Chooses the configuration that is trained here: where there is a CPU only, the one that a file names by `on_cpu`.

The key stands beside `base`. No file has it from the one that it builds on: what it sets itself is its own choice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from unetgn.messages import plain, short
from unetgn.training.config_files import split, value_of
from unetgn.training.config_yaml import ON_CPU, find_config, is_of_a_run, name_of, read_yaml
from unetgn.training.errors import ConfigError


def for_this_device(path: Path, arguments: list[str], begun: Path | None) -> tuple[Path, list[str], str]:
    """Choose between a configuration and the one that it names for a CPU; `on_cpu=null` of the `arguments` names none.

    Returns the file, the arguments without `on_cpu`, and the line that says which it is and why, empty where there was
    nothing to choose. A run that goes on keeps its own, `begun`, on another device, too. Raises ConfigError.
    """
    small = find_small(path, arguments)
    arguments = [text for text in arguments if split(text)[:2] != (ON_CPU, "=")]
    if small is None:
        return path, arguments, ""
    if begun is not None and begun.is_file():
        return begun, arguments, f"configuration: {begun}, of the run that goes on"
    if not trains_on_cpu():
        return path, arguments, f"configuration: {name_of(path)}; on a CPU it would be {name_of(small)}"
    why = f"{name_of(path)} in small, since this trains on a CPU; {ON_CPU}=null for {name_of(path)} itself"
    return small, arguments, f"configuration: {name_of(small)}, {why}"


def find_small(path: Path, arguments: list[str]) -> Path | None:
    """Find the configuration that the arguments, or else the file, name for a CPU; None where there is none."""
    text = value_of(ON_CPU, arguments)
    if text is not None:
        name, says, beside = None if text == "null" else text, "command line", Path()
    else:
        name, says, beside = None if is_of_a_run(path) else read_yaml(path).get(ON_CPU), str(path), path.parent
    if name is None:
        return None
    if not isinstance(name, str):
        raise ConfigError(f"{says}: {ON_CPU} is {short(name)}; it names one file, such as my_images32, or is null")
    small = find_config(name, asked=f"{says}: {ON_CPU}", beside=beside)
    if not is_of_a_run(small) and read_yaml(small).get(ON_CPU) is not None:
        raise ConfigError(f"{says}: {ON_CPU} {plain(name)} names another one in its turn: name the one that is trained")
    return small


def trains_on_cpu() -> bool:
    """Return True where Accelerate finds no other device, or is told to take none (`accelerate launch --cpu`)."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
