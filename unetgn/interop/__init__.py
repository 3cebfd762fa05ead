"""Other projects' U-Nets as ours, and ours as theirs."""

from unetgn.interop.families import FAMILIES, convert, load
from unetgn.interop.from_diffusers import from_diffusers
from unetgn.interop.to_diffusers import to_diffusers

__all__ = ["FAMILIES", "convert", "from_diffusers", "load", "to_diffusers"]
