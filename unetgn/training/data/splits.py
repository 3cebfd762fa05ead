"""Knows the names that folders and files of a data set's splits have, which are neither classes nor one set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from unetgn.messages import path_text, plain

# What is trained on and what is tested with, under the names that people give them.
SPLITS = {
    "train": "train", "training": "train", "trn": "train",
    "test": "test", "testing": "test", "tst": "test",
    "validation": "validation", "validate": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "development": "validation", "holdout": "validation", "heldout": "validation",
    "eval": "evaluation", "evaluation": "evaluation",
}  # fmt: skip


def split_of(name: str) -> tuple[str, str] | None:
    """Return the split that a name means, and the rest of the name; None where it means none.

    Digits and what stands between words do not count: train, Train2017, images_train, train-00001-of-00005.tar.
    """
    words = re.findall(r"[a-z]+", name.lower())
    found = next((word for word in words if word in SPLITS), None)
    if found is None:
        return None
    words.remove(found)
    return SPLITS[found], " ".join(words)


def word_end(name: str) -> int:
    """Return where the word that means a split ends in a name."""
    return next(word.end() for word in re.finditer(r"[a-z]+", name.lower()) if word[0] in SPLITS)


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Find names that differ in the split that they mean: a name of each split; {} where there are not two.

    train_images and val_images do; the classes train station and test tube do not.
    """
    alike: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        if (split := split_of(name)) is not None:
            alike.setdefault(split[1], {}).setdefault(split[0], name)
    return next((found for found in alike.values() if len(found) > 1), {})


def check_class_folders(root: Path, files: Iterable[Path]) -> None:
    """Raise ValueError where folders between `root` and its files are splits: their names would become classes.

    So are two of them side by side at any depth, and one that stands alone.
    """
    inside: dict[Path, set[str]] = {}
    seen = {Path()}
    for folder in {file.parent for file in files}:
        while folder not in seen:
            seen.add(folder)
            inside.setdefault(folder.parent, set()).add(folder.name)
            folder = folder.parent
    for above, names in sorted(inside.items()):
        found = splits_among(names)
        if not found and above == Path() and len(names) == 1 and (split := split_of(*names)) and not split[1]:
            found = {split[0]: next(iter(names))}
        if found:
            listed = plain(", ".join(sorted(found.values())))
            one = root / above / found.get("train", min(found.values()))
            where = root / above if above.parts else root
            remedy = f"give one of them, as data.path={path_text(one)}" if above == Path() else (
                f"put those to train on into a folder of their own ({plain(one.name)} of every class)")  # fmt: skip
            raise ValueError(
                f"{path_text(where)} holds folders named as the splits of a data set ({listed}), whose images would "
                f"all be trained on, and which are no classes: {remedy}; data.held_out holds a share of its images out"
            )
