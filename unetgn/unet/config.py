"""Configures the U-Net: one frozen dataclass, with the blocks' own configurations as its parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unetgn.nn.fields import freeze_lists
from unetgn.serialize import check_types, from_plain, to_plain
from unetgn.unet.checks import check_unet
from unetgn.unet.description import ConditionConfig, DecoderConfig, EncoderConfig, MidConfig, UNetDescription

__all__ = ["ConditionConfig", "DecoderConfig", "EncoderConfig", "MidConfig", "UNetConfig"]


@dataclass(frozen=True)
class UNetConfig(UNetDescription):
    """Decides everything about which U-Net this is. The fields are those of `UNetDescription`.

    Raises ValueError, naming the field, where fields contradict each other or one would change nothing, as
    `unetgn.unet.checks` says; TypeError where a value is not of its field's type.
    """

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_types(self)
        check_unet(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """Read plain nested dicts. An unknown key is a ValueError that names it, a wrong type a TypeError."""
        return from_plain(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Write plain nested dicts, with lists for tuples; `from_dict` reads the same configuration from them."""
        return to_plain(self)
