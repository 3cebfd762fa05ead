"""Registers with PyTorch's trees what a U-Net returns, so that an exported U-Net loads after `import unetgn` alone.

diffusers registers each class of output when it is defined, and `UNetOutput` is, when the network is imported, which
takes as long as the import of torch. Until then `Output` stands for it, under the name that exported programs hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

NAME = "unetgn.unet.model.UNetOutput"


class Output(dict[str, Any]):
    """Holds the place of UNetOutput in a program that is loaded; what the program returns is a UNetOutput."""


def make_output(values: Iterable[Any], names: list[str]) -> Any:
    """Make the UNetOutput of these values, which imports the network's module."""
    from unetgn.unet.model import UNetOutput

    return UNetOutput(**dict(zip(names, values, strict=True)))


def take_apart(output: Output) -> tuple[list[Any], list[str]]:
    """Return values and names, as PyTorch does for dictionaries."""
    return list(output.values()), list(output)


pytree.register_pytree_node(Output, take_apart, make_output, serialized_type_name=NAME)
