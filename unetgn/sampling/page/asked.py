"""Holds what the page offers, reads what a visitor asks for, and keeps it within bounds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from unetgn.sampling.folder import SamplingError
from unetgn.sampling.options import parse_numbers

MOST_IMAGES, MOST_STEPS, MOST_SIDE = 64, 1000, 1024
MOST_TIMES_TRAINED = 2  # the side of an image against that of the training images
LONGEST = 2000  # characters of a text
IN_TURN, NO_CLASS = "in turn", "none"  # in the place of a class


@dataclass(frozen=True)
class Choices:
    """Holds what the fields of the page offer."""

    title: str
    classes: Sequence[str]
    """Names of the classes; none for networks without."""
    any_class: bool
    """Says whether the network can draw no class in particular."""
    reads_text: bool
    schedulers: Sequence[str]


@dataclass(frozen=True)
class Asked:
    """Holds what a visitor asks for, within bounds. Whether it fits the network is the pipeline's to say."""

    seeds: Sequence[int]
    """One image each, MOST_IMAGES at most."""
    subject: str
    """A class by number, IN_TURN (seed n has class n modulo their count) or NO_CLASS; networks without have that."""
    prompt: str | None
    """None where there is none: networks that read text take it for an empty one."""
    negative_prompt: str | None
    """The text that guidance leads away from; None is the empty one."""
    scheduler: str
    steps: int
    guidance_scale: float
    size: int | None
    """The longer side in pixels; None is what the network was trained on."""

    def labels(self, num_classes: int | None) -> list[int] | None:
        """Return the class of each seed, None where no class is asked for. Raises SamplingError for what is none."""
        if self.subject == NO_CLASS or (self.subject == IN_TURN and num_classes is None):
            return None
        if num_classes is None:
            raise SamplingError(f"class is {self.subject[:20]!r}; this network has no classes")
        if self.subject == IN_TURN:
            return [seed % num_classes for seed in self.seeds]
        if not self.subject.isdecimal() or int(self.subject) >= num_classes:
            raise SamplingError(
                f"class is {self.subject[:20]!r}; this network's classes are the numbers 0 to {num_classes - 1}"
            )
        return [int(self.subject)] * len(self.seeds)

    def height_and_width(self, trained: tuple[int, int] | None, factor: int) -> tuple[int | None, int | None]:
        """Return what was asked for, as the longer side of images of the proportions that were `trained` on.

        The other one is a multiple of `factor`, too.
        """
        if self.size is None or trained is None:
            return self.size, self.size
        height, width = (max(1, round(self.size * side / max(trained) / factor)) * factor for side in trained)
        return height, width

    def check_size(self, trained: tuple[int, int] | None, factor: int) -> None:
        """Raise SamplingError where a network cannot make images of this size, or they would be very large.

        Of latents each is `factor` pixels wide; `trained` is what they were trained on, in pixels.
        """
        if self.size is not None and trained is not None and self.size > (most := MOST_TIMES_TRAINED * max(trained)):
            raise SamplingError(
                f"size is {self.size}; this network was trained on {max(trained)}, and makes {most} at most"
            )
        if self.size is not None and self.size % factor:
            raise SamplingError(f"size is {self.size}; it must be a multiple of the autoencoder's {factor}")


def read_asked(
    seeds: str | None,
    subject: str | None,
    prompt: str | None,
    negative_prompt: str | None,
    scheduler: str | None,
    steps: float | None,
    guidance_scale: float | None,
    size: str | None,
) -> Asked:
    """Read the fields of the page, of which any may be empty. Raises SamplingError for what is missing or too much."""
    for name, text in (("seeds", seeds), ("prompt", prompt), ("negative prompt", negative_prompt), ("size", size)):
        if text is not None and len(text) > LONGEST:
            raise SamplingError(f"{name} has {len(text)} characters; {LONGEST} at most")
    try:
        numbers = parse_numbers(seeds or "", at_most=MOST_IMAGES)
    except argparse.ArgumentTypeError as error:
        raise SamplingError(f"seeds: {error}") from error
    return Asked(
        seeds=numbers,
        subject=subject or NO_CLASS,
        prompt=prompt or None,
        negative_prompt=negative_prompt or None,
        scheduler=scheduler or "",
        steps=read_whole("steps", steps, MOST_STEPS),
        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
        size=read_size(size or ""),
    )


def read_whole(name: str, value: float | None, most: int) -> int:
    """Return a whole number from 1 to `most`. Raises SamplingError for anything else."""
    if value is None or value != value // 1 or not 1 <= value <= most:
        given = "missing" if value is None else str(value)[:20]
        raise SamplingError(f"{name} is {given}; whole numbers from 1 to {most} are possible")
    return int(value)


def read_size(text: str) -> int | None:
    """Return a size in pixels; None where there is none. Raises SamplingError for anything else."""
    if not text.strip():
        return None
    try:
        return read_whole("size", int(text), MOST_SIDE)
    except ValueError:
        raise SamplingError(f"size is {text!r}; give whole numbers up to {MOST_SIDE}, or nothing") from None
