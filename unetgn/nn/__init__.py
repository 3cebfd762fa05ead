"""Building blocks, one concept a file."""

from unetgn.nn.norm import GroupNormSiLU, largest_group_count

__all__ = ["GroupNormSiLU", "largest_group_count"]
