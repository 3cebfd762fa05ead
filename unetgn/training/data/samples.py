"""Decides in which order training meets its images, and draws all that is random about them.

Everything random about a training sample is a function of (seed, sample counter) and nothing else: which image it is,
its flip, its noise, its noise level, whether its label is dropped. Sample s is the same whoever computes it, on
whichever rank or worker, so a run that stops at sample s goes on with sample s + 1 as if it had never stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from unetgn.training.data.buckets import Buckets
from unetgn.training.data.images import DIGITS, Images, fingerprint, fingerprint_parts, part_of
from unetgn.training.data.looking import advise_without
from unetgn.training.data.standing import RankState
from unetgn.training.errors import DataError, one_line, reason

logger = logging.getLogger("unetgn.training")

Batch = dict[str, torch.Tensor]
Loaded = TypeVar("Loaded")
DEATH = (RuntimeError, OSError, EOFError)  # what a worker's death looks like, by the moment at which it comes


class Purpose(IntEnum):
    """Says what a generator of random numbers is for. It is part of the seed, so that no two are alike."""

    ORDER = 0
    SAMPLE = 1
    STEP = 2


def random_generator(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Return a generator that depends on its arguments alone (Philox, counter-based, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, *numbers))))


@dataclass(frozen=True)
class StepBatches:
    """Lists the samples that this rank takes for each forward pass: a batch sampler of sample counters.

    Step k, micro-batch a, rank r of R takes B consecutive samples from ((k·A + a)·R + r)·B on, so that a step uses the
    same samples however they are divided between ranks, accumulation and batch.
    """

    first_step: int
    last_step: int
    batch_size: int
    accumulation: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first_step * self.accumulation, self.last_step * self.accumulation):
            start = (batch * self.ranks + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class Samples(Protocol):
    """Gives what a run trains on, without end: images by number (IndexedSamples) or in sequence (ShardStream)."""

    def __str__(self) -> str:
        """Return how many images of what there are, for messages."""
        ...

    def progress(self, samples: int) -> dict[str, float]:
        """Return {"epoch": visits of each image after so many samples}; {} where the number of images is unknown."""
        ...

    def fingerprint(self) -> str:
        """Compute a sha256 of which images these are."""
        ...

    def state(self, step: int, *, main: bool = True) -> RankState:
        """Say what a checkpoint after this step is to know of the samples of this rank, as JSON has it.

        What all ranks would say alike is for the `main` process to say.
        """
        ...

    def restore(self, step: int, states: list[RankState]) -> None:
        """Have the next loader go on where all ranks stood after a step; also after what `state` says of this run.

        Where the number of a sample says all, there is nothing to do.
        """
        return

    def check_restore(self, states: list[RankState]) -> None:
        """Raise CheckpointError where these cannot be states of these samples."""
        return

    def loader(self, batches: StepBatches, *, num_workers: int, pin_memory: bool) -> Iterable[Batch]:
        """Load the batches of `batches` in order, decoded ahead of time in `num_workers` processes.

        Raises DataError, here and not in those processes, for an image that cannot be read.
        """
        ...


@dataclass(frozen=True)
class Draws:
    """Draws what is random about sample `counter` of a run: a function of (seed, counter)."""

    seed: int
    random_flip: bool = False

    def sample(
        self,
        counter: int,
        image: Callable[[np.random.Generator], np.ndarray],
        *,
        shape: tuple[int, int, int],
        label: int,
        text: np.ndarray | None = None,
    ) -> Batch:
        """Make the sample of the image that `image` makes. What that draws for itself changes nothing else.

        image (C, H, W) float32 in [-1, 1], noise of the same shape from N(0, 1), label () int64 (-1 without classes),
        two numbers uniform in [0, 1): `time`, which the objective maps to a noise level, and `drop`, which it compares
        with the probability of dropping the label; and, where there is a text, text (tokens, width) float32.
        """
        random = random_generator(self.seed, Purpose.SAMPLE, counter)
        time, drop, flip = random.random(3)
        noise = random.standard_normal(shape, dtype=np.float32)
        pixels = image(random)
        if self.random_flip and flip < 0.5:
            pixels = pixels[:, :, ::-1]
        sample = {
            "image": torch.from_numpy(np.ascontiguousarray(pixels)),
            "noise": torch.from_numpy(noise),
            "label": torch.tensor(label),
            "time": torch.tensor(time),
            "drop": torch.tensor(drop),
        }
        return sample if text is None else sample | {"text": torch.from_numpy(text)}


class IndexedSamples(Dataset[Batch], Samples):
    """Numbers training samples without end: item s is a function of (seed, s).

    Epoch e = s // len(indices) visits every image once, in an order of its own. An item is what Draws.sample makes. In
    the place of an image that is `left_out` comes the next one of the epoch that is not (after the last the first), so
    that all other items are what they are with it.
    """

    def __init__(
        self,
        images: Images,
        indices: np.ndarray,
        seed: int,
        *,
        random_flip: bool = False,
        left_out: Collection[int] = (),
        buckets: Buckets | None = None,
    ) -> None:
        self.left_out = frozenset(left_out)
        self.usable = indices[~np.isin(indices, list(self.left_out))] if self.left_out else indices
        self.parts: list[str] | None = None
        self.buckets = buckets
        self.epoch_length = len(indices) if buckets is None else buckets.length(self.usable)
        self.images, self.indices, self.seed, self.draws = images, indices, seed, Draws(seed, random_flip)
        self.order = lru_cache(maxsize=2)(self._order)  # an epoch's order is asked for by each of its samples

    def _order(self, epoch: int) -> np.ndarray:
        random = random_generator(self.seed, Purpose.ORDER, epoch)
        if self.buckets is not None:
            return self.buckets.arrange(random, self.usable)
        order = random.permutation(self.indices)
        if len(self.usable) < len(order):
            stays = np.flatnonzero(~np.isin(order, list(self.left_out)))
            order = order[stays[np.searchsorted(stays, np.arange(len(order))) % len(stays)]]
        return order

    def __str__(self) -> str:
        return f"{len(self.usable)} images"

    def progress(self, samples: int) -> dict[str, float]:
        return {"epoch": samples / self.epoch_length}

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "order"}  # a cache does not travel

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.order = lru_cache(maxsize=2)(self._order)

    def fingerprint(self) -> str:
        found = fingerprint(self.images, self.indices, self.left_out)
        return found if self.buckets is None else self.buckets.fingerprint(found)

    def state(self, step: int, *, main: bool = True) -> RankState:
        if not main:
            return {}
        if self.parts is None:
            self.parts = fingerprint_parts(self.images, self.indices, self.left_out)
        return {"images": len(self.images), "parts": "".join(self.parts)}

    def changed(self, states: list[RankState], without: Iterable[str]) -> list[str] | None:
        """Name the images that were left out since, for they cannot be read, beside those that are `without` by name.

        None where other images have changed, too, or it is not known; of buckets, whose order is another one then.
        """
        if self.buckets is not None:
            return None
        now, without, count = self.state(0)["parts"], set(without), len(self.images)
        if not states or states[0].get("images") != count or not (was := states[0]["parts"]):
            return None
        starts = range(0, len(now), DIGITS)
        differ = {start // DIGITS for start in starts if was[start : start + DIGITS] != now[start : start + DIGITS]}
        differ -= {part_of(index, count) for index in range(count) if self.images.key(index) in without}
        rotten = [index for index in sorted(self.left_out - self.images.without.keys())
                  if part_of(index, count) in differ]  # fmt: skip
        named = [key for index in rotten if (key := self.images.key(index)) is not None]
        explained = differ == {part_of(index, count) for index in rotten}
        return named if (named or without) and explained and len(named) == len(rotten) else None

    def __getitem__(self, counter: int) -> Batch:
        """Make sample `counter`. Raises DataError, naming the image, where it cannot be read."""
        epoch, position = divmod(counter, self.epoch_length)
        index = int(self.order(epoch)[position])
        images = self.images
        try:
            sample = self.draws.sample(
                counter,
                lambda random: images.image(index, random),
                shape=images.shape if self.buckets is None else (images.shape[0], *self.buckets.size_of(index)),
                label=images.label(index),
                text=images.text(index),
            )
            if sample["image"].shape != sample["noise"].shape:
                raise ValueError("it has other proportions than when the run began")
            return sample
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            key = images.key(index)
            remedy = "" if key is None else (
                f"; mend it, or go on without it: {advise_without([*images.without.values(), key])}")  # fmt: skip
            raise DataError(f"{images.name(index)} cannot be read any more: {reason(error)}{remedy}") from error

    def loader(self, batches: Iterable[list[int]], *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """Load batches as Samples says; any lists of sample counters will do."""
        return load_batches(BatchReader(self), batches, num_workers=num_workers, pin_memory=pin_memory)


class BatchReader(Dataset["Batch | DataError"]):
    """Reads whole batches of items by their numbers: a batch, or the DataError that came up in reading it."""

    def __init__(self, items: Dataset[Batch]) -> None:
        self.items = items

    def __getitem__(self, numbers: list[int]) -> Batch | DataError:
        try:
            return default_collate([self.items[number] for number in numbers])
        except DataError as error:
            return error


def load_batches(
    reader: Dataset, batches: Iterable[list[int]] | None, *, num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Load what `reader` makes of `batches` (None: it knows itself) in `num_workers` processes beside this one.

    Raises DataError where that is what it makes.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_process_group,
    )
    return raise_errors(iter(loader))


def raise_errors(batches: Iterator[Batch | DataError]) -> Iterator[Batch]:
    """Give the batches, and raise an error here: coming out of a worker it would be a traceback in text."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def leave_process_group(worker: int) -> None:
    """Leave the trainer's process group, whose signals it answers alone, and end at SIGTERM, as it does not."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
