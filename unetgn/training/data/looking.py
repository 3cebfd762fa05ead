"""Looks at every image before a run begins: which can be read, and what they are."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from tqdm import tqdm

from unetgn.training.data.folders import NAMED
from unetgn.training.data.pictures import Facts, TooLarge
from unetgn.training.data.pixels import InColour, TooSmall, size_text
from unetgn.training.errors import Misfit, all_at_once, reason

logger = logging.getLogger(__name__)

LISTED = 20  # images that a message names, to be left out by name
BROKEN_AT_MOST = 0.01  # share of the images that may be unreadable before it is an error
AHEAD = 4  # images for each thread that are read, or wait to be asked for, at a time

LEAST = 4  # pixels of a side, below which nobody is advised to make all images as small as one

IN_COLOUR = {"model.in_channels": 3, "model.out_channels": 3}

# What no run begins with: what is said of such images, and what would do.
REFUSED: dict[type[Exception], tuple[str, str]] = {
    TooSmall: ("are smaller than data.image_size × data.crop_scale", "remove them, set data.image_size={most}, or "
               "enlarge them by data.enlarge=true"),
    TooLarge: ("have more pixels than data.max_pixels", "raise it, or remove them"),
    InColour: ("are in colour, but model.in_channels is 1", "set model.in_channels=3 model.out_channels=3 to train on "
               "colours, or data.to_grey=true to train on shades of grey"),
}  # fmt: skip


class Looked(Protocol):
    """Numbers images that can be looked at."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def look(self, index: int) -> Facts: ...


@dataclass
class Tally:
    """Adds up what pictures were found to be."""

    images: int = 0
    colour: int = 0
    smallest: tuple[int, int] | None = None
    """Width and height of the picture with the fewest pixels."""
    largest: tuple[int, int] | None = None
    profiles: Counter[str] = field(default_factory=Counter)
    """Pictures whose colour profile was "applied" or "broken"."""
    first_broken_profile: str | None = None
    """The name of a picture."""
    broken: int = 0
    """Pictures that cannot be read, and are left out."""
    first_broken: str | None = None
    """The name of one, and what is wrong with it."""
    sorted: list[int] = field(default_factory=list)
    """Numbers of those that can be read, in order, where they are sorted."""

    def add(self, name: str, facts: Facts) -> None:
        """Count a picture."""
        self.images += 1
        self.colour += facts.colour
        self.smallest = min(self.smallest or facts.size, facts.size, key=np.prod)
        self.largest = max(self.largest or facts.size, facts.size, key=np.prod)
        if facts.profile != "none":
            self.profiles[facts.profile] += 1
        if facts.profile == "broken" and self.first_broken_profile is None:
            self.first_broken_profile = name

    def leave_out(self, name: str, why: str) -> None:
        """Count a picture that cannot be read."""
        self.broken += 1
        self.first_broken = self.first_broken or f"{name} ({why})"


def advise_without(names: Iterable[str]) -> str:
    """Say how a run goes on without the images of these names."""
    listed = json.dumps(names := list(names), ensure_ascii=False)
    return f"'data.without={listed if listed.isprintable() else json.dumps(names)}'"


class Broken:
    """Collects images that cannot be read, by what is wrong with them, and says each kind in a line."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, name: str, error: Exception) -> None:
        """Count an image."""
        kind = type(error).__name__
        self.counts[kind] += 1
        if len(named := self.first.setdefault(kind, [])) < NAMED:
            named.append(f"{name} ({reason(error)})")

    def say(self) -> None:
        """Log what there was, and forget it."""
        for kind, count in self.counts.items():
            which = "a broken image" if count == 1 else f"{count:,} broken images"
            more = "" if count <= NAMED else " …"
            logger.warning("skipping %s: %s%s", which, ", ".join(self.first[kind]), more)
        self.counts.clear()
        self.first.clear()


def look_at_all(
    images: Looked,
    without: Mapping[int, str] = MappingProxyType({}),
    key: Callable[[int], str] | None = None,
    *,
    unfit: Callable[[Facts], Sequence[Exception]] = lambda facts: (),
    sort: Callable[[Facts], int] | None = None,
) -> tuple[np.ndarray, Tally]:
    """Decode every image once but those `without`; return the numbers of those that can be read, and what they are.

    `sort` gives a number of each that can be read, for the tally's `sorted`.
    A broken image found now is a line in the log; found in the middle of the night it is a lost run.
    Raises Misfit where an image is one of REFUSED, by itself or by what `unfit` says of it; ValueError where more than
    1 % are broken.
    """
    usable, unusable, tally = [], [], Tally()
    refused: dict[type[Exception], tuple[str, str]] = {}  # of each kind the first one
    counts: Counter[type] = Counter()
    most: list[tuple[int, int]] = []  # the largest size that the smallest image has
    broken = Broken()
    for index, found in enumerate(tqdm(look(images, without), "reading images", len(images), disable=None)):
        if found is None:
            continue
        if isinstance(found, Facts):
            usable.append(index)
            tally.add(images.name(index), found)
            if sort is not None:
                tally.sorted.append(sort(found))
        elif type(found) not in REFUSED:
            tally.leave_out(images.name(index), reason(found))
            unusable.append(index)
            broken.add(images.name(index), found)
        for misfit in unfit(found) if isinstance(found, Facts) else [found] * (type(found) in REFUSED):
            counts[type(misfit)] += 1
            refused.setdefault(type(misfit), (images.name(index), str(misfit)))
            if isinstance(misfit, TooSmall):
                most = [min([*most, misfit.most])]
    broken.say()
    misfits = []
    for kind, (name, error) in refused.items():
        what, remedy = REFUSED[kind]
        said = "" if kind is InColour else f" ({error})"
        words = f"{counts[kind]} of {len(images)} images {what}, first {name}{said}: "
        fitting = size_text(most[0]) if most else ""
        if kind is TooSmall and min(most[0]) < LEAST:  # one is no picture: a smaller size for all is no way out
            remedy, sizes = "remove them, or enlarge them by data.enlarge=true", {}
        else:
            sizes = {"data.image_size": fitting}
        keys = {InColour: IN_COLOUR, TooSmall: sizes}.get(kind, {})
        misfits.append(Misfit(words + remedy.format(most=fitting), keys))
    if misfits:
        raise all_at_once(misfits)
    if tally.broken > BROKEN_AT_MOST * len(images):
        advice = ""
        if key is not None and len(names := [*without.values(), *map(key, unusable)]) <= min(LISTED, len(images) - 1):
            advice = f", or go on without them: {advise_without(names)}"
        raise ValueError(
            f"{tally.broken} of {len(images)} images cannot be read, more than {BROKEN_AT_MOST:.0%}; the first is "
            f"{tally.first_broken}: mend or remove them{advice}"
        )
    return np.array(usable), tally


def look(images: Looked, without: Collection[int]) -> Iterator[Facts | Exception | None]:
    """Look at the images in order, in threads: a few of them ahead, so that memory does not grow with their number.

    Of those `without` there is None.
    """

    def one(index: int) -> Facts | Exception | None:
        if index in without:
            return None
        try:
            return images.look(index)
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            return error.with_traceback(None)  # which holds the picture

    threads = os.cpu_count() or 1
    waiting: deque[Future[Facts | Exception | None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for index in range(len(images)):
            waiting.append(pool.submit(one, index))
            if len(waiting) == AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
