"""Reads a saved configuration, which is not ours alone: frameworks and users keep keys of their own in it.

diffusers' averages write their decay there, quantizers what they did, users what they like (`register_to_config`).
Such keys are kept, so that they are there when the network is saved again. A warning names them with the nearest field,
since each may be a field that is misspelt. In a constructor and in our own YAML files an unknown key is an error.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unetgn.serialize import split
from unetgn.unet.config import UNetConfig

LISTED = 30  # keys that a warning names
READ_BY_DIFFUSERS = "quantization_config"  # `from_pretrained` acts on it


@dataclass(frozen=True)
class SavedConfig:
    """Holds the keys of a saved configuration that are fields of ours or diffusers' own, and the others."""

    known: dict[str, Any]
    others: dict[str, Any]

    def kept_beside(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the network of these arguments has to register for the others to be in its configuration."""
        if not self.others:
            return {}
        fields = UNetConfig.from_dict(split(UNetConfig, arguments).known).to_dict()
        return {key: _merged(fields[key], value) if key in fields else value for key, value in self.others.items()}


def read_config(config: Mapping[str, Any], arguments: Mapping[str, Any], class_name: str) -> SavedConfig:
    """Split a saved configuration. `arguments` are given beside it, in the place of what it says.

    Warns once, naming all keys that are no fields. Raises ValueError for the options of a diffusers model.
    """
    config = dict(config)  # a network's own answers for diffusers' options too
    if "block_out_channels" in config:
        name = config.get("_class_name", "a U-Net of diffusers")
        raise ValueError(
            f"these are the options of {name}, and unetgn's {class_name} has others: unetgn.UNet.from_diffusers "
            "converts the model or its folder"
        )
    own = {key: value for key, value in config.items() if key.startswith("_") or key == READ_BY_DIFFUSERS}
    parts = split(UNetConfig, {key: value for key, value in config.items() if key not in own})
    if parts.names:
        warn_of_others(f"the configuration of {class_name}", parts.names)
    given = split(UNetConfig, {key: value for key, value in arguments.items() if not key.startswith("_")}).names
    if given:
        warnings.warn(f"{class_name} takes no {', '.join(given)}: ignored", stacklevel=2)
    return SavedConfig(own | parts.known, parts.others)


def warn_of_others(where: str, names: tuple[str, ...]) -> None:
    """Warn that a configuration has keys that are no fields, and are kept."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    text = f"{where} has keys that are no fields; they are kept and change nothing: {', '.join(names[:LISTED])}{more}"
    warnings.warn(text, stacklevel=2)


def _merged(field: Any, others: Any) -> Any:
    """Put the keys that are no fields beside those of a nested configuration."""
    if not isinstance(field, dict) or not isinstance(others, dict):
        return field
    return {**field, **{key: _merged(field[key], value) if key in field else value for key, value in others.items()}}
