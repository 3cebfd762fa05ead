"""Trains the classifier whose features judge samples: python sampling/train_classifier.py --config NAME [--out FILE]

The images that the configuration holds out are not trained on; the share of them whose class it sees is printed, and
kept in the file. `sampling/evaluate.py --extractor FILE` takes it. The same seed gives the same bytes with the same
version of torch, of this package and kind of CPU, however many threads there are: all of these decide how sums round.
The classifiers that come along were written by earlier ones, and keep their bytes: published figures name their sha256.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unetgn.programs.last_words import last_words, say
from unetgn.programs.paths import check_file, file_to_write
from unetgn.sampling.classifier import FOLDER, Classifier, Trained, save
from unetgn.sampling.sets import EvaluationError
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config
from unetgn.training.config_yaml import find_config
from unetgn.training.data.config import open_images, split_images
from unetgn.training.data.images import Images, fingerprint
from unetgn.training.errors import ConfigError

BATCH, LEARNING_RATE = 64, 2e-3


def read(images: Images, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """Read images, (N, C, H, W) uint8, and their classes. Raises EvaluationError where one has none."""
    labels = torch.tensor([images.label(int(number)) for number in numbers])
    if len(numbers) == 0 or labels.min() < 0:
        raise EvaluationError("a classifier needs images with classes, to train on and held out (data.held_out)")
    pixels = torch.from_numpy(np.stack([images.image(int(number)) for number in numbers]))
    return ((pixels + 1) * 127.5).round().to(torch.uint8), labels


def shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to `most` pixels in each direction; its border is repeated."""
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images.float(), (most,) * 4, mode="replicate").to(torch.uint8)
    places = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, places, strict=True)])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let one thread compute: with more of them sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def fit(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> Classifier:
    """Train a classifier, with AdamW, half a cosine of its learning rate, and images moved about a little."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = Classifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            moved = shift(images[chosen], images.shape[-1] // 14, generator)
            loss = torch.nn.functional.cross_entropy(classifier(moved), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch} of {epochs}: loss {total / len(images):.4f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images whose class the classifier sees."""
    seen = torch.cat([classifier(part).argmax(1) for part in images.split(BATCH)])
    return (seen == labels).double().mean().item()


def train_classifier(config: RunConfig, *, epochs: int, seed: int) -> tuple[Classifier, Trained]:
    """Train a classifier on the images of a configuration; say what it is. Raises EvaluationError or ValueError."""
    if config.data.name == "latents":
        raise EvaluationError(
            "data.name is latents, but a classifier sees images: give a configuration that names them"
        )
    images = open_images(config.data.of_one_size(), config.model.in_channels)
    channels, size, width = images.shape
    if width != size:
        raise EvaluationError(
            f"the images are {width}×{size} pixels, but this classifier sees squares: set data.image_size to one number"
        )
    numbers, held_out = split_images(images, images.usable(), config.data.held_out)
    inside, outside = read(images, numbers), read(images, held_out)
    classifier = fit(*inside, epochs=epochs, seed=seed)
    name = config.data.name if config.data.path is None else f"{config.data.name} {config.data.path}"
    trained = Trained(
        channels,
        size,
        classifier.head.out_features,
        data=name,
        images=fingerprint(images, numbers),
        seed=seed,
        accuracy=accuracy(classifier, *outside),
        held_out=len(held_out),
    )
    return classifier, trained


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 where the request cannot be met."""
    parser = argparse.ArgumentParser(
        prog="train_classifier.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configuration that names the images")
    parser.add_argument(
        "--out",
        type=file_to_write,
        help="file to write (default: sampling/classifiers/NAME.safetensors, where evaluate.py finds that of an "
        "embedded data set)",
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the images (default: 0)")
    parsed = parser.parse_args(arguments)
    if parsed.epochs < 1 or parsed.seed < 0:
        parser.error("--epochs is at least 1, --seed at least 0")
    try:
        config = load_config(find_config(parsed.config))
        out: Path = parsed.out or FOLDER / f"{config.data.name}.safetensors"
        check_file(out)
        classifier, trained = train_classifier(config, epochs=parsed.epochs, seed=parsed.seed)
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("train_classifier.py", error)
    except (EvaluationError, ConfigError, ValueError, OSError) as error:
        say(f"train_classifier.py: error: {error}")
        return 2
    print(f"accuracy {trained.accuracy:.4f} on {trained.held_out} held-out images")
    try:
        save(classifier, trained, out)
    except OSError as error:
        say(f"train_classifier.py: {error}")
        return 1
    print(f"written to {out}")
    return 0
