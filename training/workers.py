"""Loads ahead in processes that may die: by a kill for lack of memory, or by a decoder that crashes."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

from training.errors import one_line

logger = logging.getLogger("training")

Loaded = TypeVar("Loaded")
DEATH = (RuntimeError, OSError, EOFError)  # what a worker's death looks like, by the moment at which it comes


class Restarting(Generic[Loaded]):
    """Gives what `load(n)` loads from the n-th item on, and calls it anew where a worker died: the items are the same.

    Raises what the death looks like where one comes at the same item again.
    """

    def __init__(
        self,
        load: Callable[[int], Iterator[Loaded]],
        *,
        num_workers: int,
        raising_deaths: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.load, self.num_workers, self.raising_deaths = load, num_workers, raising_deaths
        self.given = 0
        self.died_at: int | None = None
        self._items: Iterator[Loaded] | None = load(0)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        while True:
            try:
                if self._items is None:
                    self._items = self.load(self.given)
                with self.raising_deaths():  # without, torch finds out within five seconds
                    item = next(self._items)
            except DEATH as error:
                if not self.num_workers or self.died_at == self.given:
                    raise
                self.died_at, self._items = self.given, None
                traceback.clear_frames(error.__traceback__)  # which hold the other workers: they end here
                logger.warning(
                    "a loader's worker died (%s): all are started anew, for the same images", one_line(error)
                )
            else:
                self.given += 1
                return item
