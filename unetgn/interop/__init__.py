"""Other projects' U-Nets as ours, and ours as theirs."""

from unetgn.interop.families import FAMILIES, convert, load

__all__ = ["FAMILIES", "convert", "load"]
