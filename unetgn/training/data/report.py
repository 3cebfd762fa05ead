"""Says what was taken from where the images are, in a paragraph for people and in a file for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from unetgn.json_files import read_object
from unetgn.training.data.config import EMBEDDED, DataConfig
from unetgn.training.data.folders import list_endings
from unetgn.training.data.images import Images, shorten
from unetgn.training.data.looking import Tally
from unetgn.training.data.pixels import Framing
from unetgn.training.files import write_json

DATA = "data.json"  # in a run's folder


@dataclass(frozen=True)
class Report:
    """Says what was taken. A stream's counts are of the images that were looked at before the start."""

    source: str
    images: int | None
    """Images that can be read; None where nobody has counted them."""
    trained_on: int | None
    held_out: int
    broken: int
    """Images that cannot be read, and are left out."""
    left_out: dict[str, int]
    """Files of other endings, how many of each."""
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    """Width and height, before anything is done to them; None where the images are no pictures."""
    colour: int
    grey: int
    profiles_applied: int
    profiles_broken: int
    first_broken_profile: str | None
    class_names: list[str] | None
    """Name the classes in the order of their numbers; None where they have no names, or there are none."""
    class_counts: list[int] | None
    """Images to train on of each class; None where nobody has counted them, or there are no classes."""
    reads_classes: bool
    """True where the network is conditioned by classes."""
    treatment: list[str]
    """Lists what is done to each image, in order."""
    buckets: str | None = None
    """Says how many images have which size; None where all have one."""

    def write(self, run: Path) -> None:
        """Write the report to a run's folder."""
        write_json(run / DATA, asdict(self))

    def __str__(self) -> str:
        """Return the paragraph."""
        parts = [f"{self._images()} from {self.source}{self._sizes()}{self._others()}", self._classes(), self._shares()]
        parts += [] if self.buckets is None else [self.buckets]
        return "; ".join(part for part in parts if part) + f". Each image: {', '.join(self.treatment)}."

    def _images(self) -> str:
        return "images" if self.images is None else f"{self.images:,} images"

    def _sizes(self) -> str:
        if self.smallest is None or self.largest is None:
            return ""
        (width, height), (wide, high) = self.smallest, self.largest
        sizes = f"{width}×{height}" + (f" to {wide}×{high}" if self.smallest != self.largest else "")
        colours = " and ".join(f"{count:,} {what}" for count, what in ((self.colour, "in colour"), (self.grey, "grey"))
                               if count)  # fmt: skip
        looked = f", of the first {self.colour + self.grey}" if self.images is None else ""
        return f" ({sizes} pixels, {colours}{looked})"

    def _others(self) -> str:
        count = sum(self.left_out.values())
        others = [f"{count:,} files left out by ending ({list_endings(self.left_out)})"] if count else []
        profiles = [f"{count:,} colour profiles {what}" for count, what in (
            (self.profiles_applied, "applied"),
            (self.profiles_broken, f"broken and ignored (first {self.first_broken_profile})")) if count]  # fmt: skip
        broken = [f"{self.broken:,} broken images left out"] if self.broken else []
        return "".join(f"; {part}" for part in (*others, *broken, *profiles))

    def _classes(self) -> str:
        names, unread = self.class_names, "" if self.reads_classes else ", which this network does not read"
        if names is not None:
            return f"{len(names)} classes{unread}: {shorten(names)}"
        return "classes by number" if self.reads_classes else "no classes"

    def _shares(self) -> str:
        if self.trained_on is None:
            return ""
        return f"{self.held_out:,} held out, {self.trained_on:,} to train on"


def report_images(
    config: DataConfig, images: Images, train: np.ndarray, held_out: np.ndarray, classes: int | None
) -> Report:
    """Make the report of images by number; the network has so many classes, or none."""
    labels = np.array([images.label(int(index)) for index in train])
    count = len(images.class_names) if images.class_names is not None else classes
    counts = None if count is None or not len(labels) or labels.min() < 0 else np.bincount(labels, minlength=count)
    return make_report(
        config,
        channels=images.shape[0],
        images=len(train) + len(held_out) if images.tally is None else images.tally.images,
        trained_on=len(train),
        held_out=len(held_out),
        tally=images.tally,
        left_out=dict(images.left_out),
        class_names=images.class_names,
        class_counts=None if counts is None else counts.tolist(),
        reads_classes=classes is not None,
    )


def make_report(
    config: DataConfig,
    *,
    channels: int,
    tally: Tally | None,
    images: int | None = None,
    trained_on: int | None = None,
    held_out: int = 0,
    left_out: dict[str, int] | None = None,
    class_names: list[str] | None = None,
    class_counts: list[int] | None = None,
    reads_classes: bool,
) -> Report:
    """Make the report; without a tally the images are no files of pictures."""
    seen = tally or Tally()
    where = EMBEDDED[config.name][2] if config.path is None else config.path
    return Report(
        source=f"{where} (data.name={config.name})",
        images=images,
        trained_on=trained_on,
        held_out=held_out,
        broken=seen.broken,
        left_out=left_out or {},
        smallest=seen.smallest,
        largest=seen.largest,
        colour=seen.colour,
        grey=seen.images - seen.colour,
        profiles_applied=seen.profiles["applied"],
        profiles_broken=seen.profiles["broken"],
        first_broken_profile=seen.first_broken_profile,
        class_names=class_names,
        class_counts=class_counts,
        reads_classes=reads_classes,
        treatment=list_treatment(config, channels),
    )


def list_treatment(config: DataConfig, channels: int) -> list[str]:
    """List what is done to each image."""
    if config.name == "latents":
        mirrored = ["its latent or that of its mirror image, as often"] if config.random_flip else []
        return [*mirrored, "noise of its posterior added", "shifted and scaled for diffusion"]
    height, width = config.size
    whole = f"{width}×{height}"
    done = []
    if config.name not in EMBEDDED:
        done = ["turned upright", "colours to sRGB", "transparency to white"]
        if channels == 1:
            done.append("colours to grey" if config.to_grey else "kept grey")
        else:
            done.append("grey repeated in 3 channels")
        resized = "enlarged or reduced" if config.enlarge else "resized"
        framing = Framing(config.size, channels, crop_scale=config.crop_scale)
        high, wide = framing.covered((height, width))
        covers = f"to cover {wide}×{high}"
        to = f"shorter side {resized} to {high}" if height == width else f"{resized} {covers}"
        if config.buckets:
            place = "cut at random" if config.random_crop else "cut out in the middle"
            done.append(f"{resized} to cover the size of its proportions, and that {place}")
        else:
            done += [to, f"{whole} cut at random" if config.random_crop else f"the middle {whole} cut out"]
    if config.random_flip:
        done.append("every other one mirrored, at random")
    return [*done, f"scaled to [-1, 1] in {channels} channel{'s' if channels > 1 else ''}"]


def read_class_names(run: Path) -> list[str] | None:
    """Read the names of the classes that a run was trained on; None where it knows none."""
    try:
        names = read_object(run / DATA)["class_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
