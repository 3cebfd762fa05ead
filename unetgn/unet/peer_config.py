"""Answers what diffusers' code asks of a U-Net's configuration by the names of its own options.

Pipelines, ControlNets and adapters read `unet.config.cross_attention_dim` and the like. What is saved, listed and
compared are our own fields alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.configuration_utils import FrozenDict


class PeerConfig(FrozenDict):
    """Holds a configuration, and answers for diffusers' options where diffusers can express the network.

    `options` makes these when the first is asked for; it raises ValueError where diffusers cannot.
    """

    def __init__(self, values: Mapping[str, Any], options: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(values)
        self._options = options

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._options()[name]
        except (KeyError, ValueError) as error:
            reason = "" if isinstance(error, KeyError) else f": {error}"
            raise AttributeError(f"the configuration of a UNet has no {name!r}{reason}") from None

    def __missing__(self, key: str) -> Any:
        try:
            return self.__getattr__(key)
        except AttributeError:
            raise KeyError(key) from None

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        try:
            self.__missing__(str(key))
        except KeyError:
            return False
        return True

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)
