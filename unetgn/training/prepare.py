"""Prepares the samples that a run trains on and those that are held out, and checks them before the start."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from unetgn.training.config import RunConfig
from unetgn.training.data.autoencoder import load_autoencoder
from unetgn.training.data.buckets import UNUSED, Buckets, list_sizes
from unetgn.training.data.config import open_images, split, split_images
from unetgn.training.data.folders import few
from unetgn.training.data.held_out import HeldOutRows
from unetgn.training.data.images import Images, check_classes
from unetgn.training.data.latents import Latents
from unetgn.training.data.report import Report, make_report, report_images
from unetgn.training.data.samples import IndexedSamples, Samples
from unetgn.training.data.stream import ShardStream
from unetgn.training.data.text import TextEncoder, check_texts
from unetgn.training.errors import ConfigError, DataError, Misfit, all_at_once
from unetgn.training.preview import Conditions
from unetgn.training.processes import ask_main
from unetgn.training.validate import SEED as VALIDATION_SEED

logger = logging.getLogger("unetgn.training")

LISTED = 10  # a message names at most this many classes


def prepare_samples(
    config: RunConfig, accelerator: Accelerator, overfit: int | None
) -> tuple[Samples, IndexedSamples | None]:
    """Open the samples to train on, and the held-out ones (None: of a stream that is not validated).

    Raises ConfigError where the data are not what the configuration says, or unfit.
    """
    try:
        if config.data.name == "stream":
            stream = prepare_stream(config, accelerator, overfit)
            return stream, hold_out(config, stream)
        images, usable, train, held_out, sizes = prepare_images(config, accelerator, overfit)
    except (ValueError, DataError) as error:
        raise ConfigError(str(error)) from error
    flip_pixels = config.data.random_flip and config.data.name != "latents"  # which choose among those that were cached
    left_out = np.setdiff1d(np.arange(len(images)), usable)
    samples = IndexedSamples(
        images,
        train,
        config.seed,
        random_flip=flip_pixels,
        left_out=left_out.tolist(),
        buckets=make_buckets(config, len(images), usable, sizes) if config.data.buckets else None,
    )
    square = images
    if config.data.buckets:  # of one size, whatever the run trains on: a loss, and figures, that compare
        square = open_images(config.data.of_one_size(), config.model.in_channels)
    return samples, IndexedSamples(square, held_out, VALIDATION_SEED)


def make_buckets(config: RunConfig, count: int, usable: np.ndarray, sizes: list[int]) -> Buckets:
    """Sort so many images by the numbers of their sizes, which those that are usable have."""
    of_image = np.full(count, UNUSED)
    of_image[usable] = sizes
    return Buckets(list_sizes(config.data.size[0], config.data.buckets), of_image, config.train.batch_size)


def prepare_stream(config: RunConfig, accelerator: Accelerator, overfit: int | None) -> ShardStream:
    """Open the shards, which the main process checks."""
    if overfit is not None:
        raise ConfigError(f"--overfit {overfit}: a stream's images have no numbers; use data.name datasets or folder")
    shards = ShardStream(config.data, config.model.in_channels, config.model.num_classes, config.seed)
    ask_main(accelerator, lambda: shards.check(accelerator.num_processes, config.data.num_workers))
    return shards


def hold_out(config: RunConfig, stream: ShardStream) -> IndexedSamples | None:
    """Read the held-out images of a stream, where a held-out loss is asked for. Raises ConfigError without any."""
    if not config.train.validate_every:
        return None
    images = HeldOutRows(stream)
    if not len(images):
        raise ConfigError(f"data.held_out is {config.data.held_out}, which is none of the images: raise it")
    return IndexedSamples(images, np.arange(len(images)), VALIDATION_SEED)


def prepare_images(
    config: RunConfig, accelerator: Accelerator, overfit: int | None
) -> tuple[Images, np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Open the images, which the main process reads once: the usable ones, those to train on and those held out.

    Those to train on may be unusable; others take their places. The list is of the sizes of the usable ones, where
    there are several.
    """
    images = open_images(config.data, config.model.in_channels, step=2 ** (len(config.model.channels) - 1))

    def look() -> tuple[np.ndarray, list[int]]:
        usable = read_all(images, config.model.num_classes)
        return usable, [] if images.tally is None else images.tally.sorted

    usable, sizes = ask_main(accelerator, look)
    text = images.text(int(usable[0]))
    check_texts(config.model, None if text is None else text.shape[1])
    if images.without:
        logger.warning("data.without leaves %d images out: %s", len(images.without), few(list(images.without.values())))
    train, _ = split(len(images), config.data.held_out)
    train_on, held_out = split_images(images, usable, config.data.held_out)
    if overfit is not None and overfit > len(train):
        raise ConfigError(f"--overfit {overfit}: there are only {len(train)} images to train on")
    train = train[:overfit]
    if not len(train_on := train_on[np.isin(train_on, train)]):
        raise ConfigError(f"no image is left to train on: data.held_out is {config.data.held_out} of {len(usable)}")
    if config.train.validate_every > 0 and not len(held_out):
        raise ConfigError(f"data.held_out is {config.data.held_out}, which is none of {len(usable)} images: raise it")
    warn_of_unseen_classes(config.model.num_classes, images, train_on)
    return images, usable, train, held_out, sizes


def warn_of_unseen_classes(num_classes: int | None, images: Images, train: np.ndarray) -> None:
    """Warn of classes that no image to train on is of: the network would draw rubbish for them."""
    unseen = set(range(num_classes or 0)) - {images.label(int(index)) for index in train} if num_classes else set()
    if unseen:
        listed = ", ".join(map(str, sorted(unseen)[:LISTED])) + (" …" if len(unseen) > LISTED else "")
        logger.warning("%d of %d classes (%s) have no image to train on: sample without them", len(unseen), num_classes,
                       listed)  # fmt: skip


def read_all(images: Images, num_classes: int | None) -> np.ndarray:
    """Find the numbers of the images that can be used.

    Raises DataError or ValueError where a run cannot begin; Misfit for all at once that does not fit the configuration.
    """
    misfits, usable = [], np.arange(len(images))
    try:
        usable = images.usable()
    except Misfit as misfit:
        misfits.append(misfit)
    try:
        check_classes(num_classes, images, usable)
    except Misfit as misfit:
        misfits.append(misfit)
    if misfits:
        raise all_at_once(misfits)
    if isinstance(images, Latents):  # what previews and the pipeline at the end are made with
        load_autoencoder(images.autoencoder)
        if images.empty_text is not None:
            TextEncoder(images.folder)
    return usable


def report(config: RunConfig, samples: Samples, held_out: IndexedSamples | None) -> Report:
    """Say what was taken; on the main process, which has looked at the images."""
    if isinstance(samples, IndexedSamples):
        none = np.array([], dtype=int)
        held = none if held_out is None else held_out.indices
        found = report_images(config.data, samples.images, samples.usable, held, config.model.num_classes)
        if samples.buckets is None:
            return found
        return replace(found, buckets=samples.buckets.describe(samples.usable))
    assert isinstance(samples, ShardStream)
    return make_report(
        config.data,
        channels=config.model.in_channels,
        tally=samples.tally,
        left_out=samples.shards.left_out,
        class_names=samples.class_names,
        reads_classes=config.model.num_classes is not None,
    )


def preview_conditions(config: RunConfig, samples: Samples) -> Conditions:
    """Collect what previews are drawn with: for latents the decoder, with captions those of the first images."""
    if not isinstance(samples, IndexedSamples) or not isinstance(images := samples.images, Latents):
        return Conditions((config.model.in_channels, *config.data.size))
    conditions = Conditions(images.shape, autoencoder=images.autoencoder)
    if images.empty_text is None:
        return conditions
    texts = [text for i in samples.indices[: config.preview.count] if (text := images.text(int(i))) is not None]
    return replace(conditions, texts=torch.from_numpy(np.stack(texts)), empty_text=torch.from_numpy(images.empty_text))
