"""Decodes the rows of a stream: leaves out what is broken, unfit or named, and judges how much that is."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from PIL import Image

from unetgn.messages import path_text, plain, short
from unetgn.training.data.config import DataConfig
from unetgn.training.data.folders import NAMED
from unetgn.training.data.hugging_face import number_of
from unetgn.training.data.images import shorten
from unetgn.training.data.looking import BROKEN_AT_MOST, LISTED, REFUSED, Tally, advise_without
from unetgn.training.data.pixels import Framing
from unetgn.training.data.rows import Row, Shards
from unetgn.training.errors import DataError, reason

logger = logging.getLogger(__name__)

READ_BEFORE_JUDGING = 100  # images, before a share of broken ones is too large


@dataclass(frozen=True)
class Source:
    """Holds the shards of a run, and how their rows are to be read."""

    config: DataConfig
    shards: Shards
    framing: Framing
    num_classes: int | None
    class_names: list[str] | None

    def name(self, row: Row) -> str:
        """Return what messages call a row."""
        return f"{plain(row.key)} of {path_text(self.shards.files[row.shard])}"

    def short_name(self, row: Row) -> str:
        """Return what data.without calls a row, wherever the shards are."""
        return f"{row.key} of {self.shards.names[row.shard]}"

    def is_held_out(self, row: Row) -> bool:
        """Return True for the share data.held_out of the rows, which their keys decide: always the same ones.

        A key is what a tar shard calls a sample, or of tables the row's number and the file's name.
        """
        if not self.config.held_out:
            return False
        key = row.key if self.shards.keyed else self.short_name(row)
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.config.held_out * 2**64


@dataclass(frozen=True)
class Picture:
    """Holds a row, decoded and checked."""

    row: Row
    image: Image.Image
    label: int


class RowDecoder:
    """Decodes rows, and counts those that it leaves out."""

    def __init__(self, source: Source, tally: Tally | None = None) -> None:
        self.source, self.tally = source, tally
        self.without = frozenset(source.config.without)
        self.read = self.broken = 0
        self.named: list[str] = []  # the last ones, as data.without names them
        self.kinds: Counter[str] = Counter()  # of what was left out in this pass
        self.last: tuple[str, Exception] = ("", ValueError())  # of the broken ones
        self.numbers: Mapping[str, int] = {name: i for i, name in enumerate(source.class_names or [])}

    def pictures(self, rows: Iterable[Row]) -> Iterator[Picture]:
        """Decode the pictures of the rows but those that data.without names; warn of each kind that is left out.

        Raises DataError where that is more than 1 % of at least a hundred rows, and for a label that is no class.
        """
        source, framing = self.source, self.source.framing
        for row in rows:
            if self.without and source.short_name(row) in self.without:
                continue
            self.read += 1
            try:
                value = None if source.num_classes is None else source.shards.columns.label_of(row.values)
                label = self.label(source.name(row), value)
                encoded = source.shards.columns.image_of(row.values)
                image = framing.open(encoded)
                if self.tally is not None:
                    self.tally.add(source.name(row), framing.facts(encoded))
            except DataError:
                raise
            except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
                self.named = [*self.named[-LISTED:], source.short_name(row)]
                self.leave_out(source.name(row), error)
            else:
                yield Picture(row, image, label)
            if self.read >= READ_BEFORE_JUDGING and self.broken > BROKEN_AT_MOST * self.read:
                raise self.too_many()

    def leave_out(self, name: str, error: Exception) -> None:
        """Count a picture that is broken or unfit, and name the first few of each kind."""
        self.broken, self.last = self.broken + 1, (name, error)
        kind = type(error).__name__
        self.kinds[kind] += 1
        if self.kinds[kind] <= NAMED:
            logger.warning("skipping a broken image: %s (%s)", name, reason(error))
        if self.tally is not None:
            self.tally.leave_out(name, reason(error))

    def sum_up(self) -> None:
        """Say, at the end of a pass, how many pictures were left out beyond those that were named."""
        for kind, number in self.kinds.items():
            if number > NAMED:
                logger.warning("skipping broken images: %s of this pass (%s)", f"{number:,}", kind)
        self.kinds.clear()

    def too_many(self) -> DataError:
        """Say that too many are broken, and what would do about the last one."""
        name, error = self.last
        what, remedy = REFUSED.get(type(error), ("are broken or too small", "mend the shards"))
        remedy = remedy.format(most=getattr(error, "most", None))
        if type(error) not in REFUSED and len(names := [*self.source.config.without, *self.named]) <= LISTED:
            remedy += f", or go on without them: {advise_without(names)}"
        return DataError(
            f"{self.broken} of {self.read} images of {self.source.config.path!r} {what}, more than "
            f"{BROKEN_AT_MOST:.0%}; the last is {name} ({reason(error)}): {remedy}"
        )

    def label(self, name: str, label: object) -> int:
        """Return the class that a label means, -1 for a network without classes. Raises DataError where it has none."""
        classes = self.source.num_classes
        if classes is None:
            return -1
        if label is None:
            raise DataError(f"{name} has no label; remove the row, or give it one")
        if isinstance(label, str):
            if label not in self.numbers:
                known = shorten(list(self.numbers)) or "none"
                raise DataError(
                    f"{name} has the label {short(label)}, which is not in data.class_names ({known}): add it, and set "
                    f"model.num_classes to their number"
                )
            return self.numbers[label]
        if not 0 <= number_of(label) < classes:
            raise DataError(
                f"{name} has the label {short(label)}, but with model.num_classes {classes} they are numbers from "
                f"0 to {classes - 1}: set it, or name the right data.label_column"
            )
        return number_of(label)
