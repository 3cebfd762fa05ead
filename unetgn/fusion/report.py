"""Says what `fuse` did, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FusedPlace:
    """Names a norm that takes in the SiLU after it: by `path` in the model, by `norm` in its block of class `block`.

    `only` is a sentence where the block calls the norm in other places of its forward, too, with something else after
    it, and is empty otherwise.
    """

    path: str
    block: str
    norm: str
    only: str = ""


@dataclass(frozen=True)
class LeftPlace:
    """Names a group norm that stays as it was, and says why."""

    path: str
    block: str
    norm: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Says what is fused in a model now, and which group norms are not and why. `print` it for a table."""

    model: str
    fused: tuple[FusedPlace, ...]
    left: tuple[LeftPlace, ...]

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return f"{self.model}: nothing to fuse, there is no group norm in it"
        head = f"{self.model}: {len(self.fused)} places fused, {len(self.left)} group norms left as they are"
        rows = [["", "block", "norm", "places", "first at", "why"]]
        rows += _grouped("fused", ((place.block, place.norm, place.only, place.path) for place in self.fused))
        rows += _grouped("left", ((place.block, place.norm, place.reason, place.path) for place in self.left))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([head, *lines])


def _grouped(what: str, places: Iterable[tuple[str, str, str, str]]) -> list[list[str]]:
    """Make one row of places that are alike in block, norm and reason, with their number and the first path."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for block, norm, reason, path in places:
        groups.setdefault((block, norm, reason), []).append(path)
    return [[what, block, norm, str(len(paths)), paths[0], reason] for (block, norm, reason), paths in groups.items()]
