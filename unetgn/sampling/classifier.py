"""Classifies images by a small network, whose features stand in for Inception's where the images are small.

sampling/train_classifier.py trains it; those of the embedded data sets lie in sampling/classifiers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unetgn.json_files import parse_object
from unetgn.nn import GroupNormSiLU
from unetgn.training.checkpoint import check_tensors
from unetgn.training.errors import CheckpointError, reason
from unetgn.training.files import writing

KEY = "classifier"  # of the file's metadata, which are JSON
FOLDER = Path(__file__).with_name("classifiers")


@dataclass(frozen=True)
class Trained:
    """Says what a classifier is, and what it was trained on; the metadata of its file."""

    in_channels: int
    image_size: int
    num_classes: int
    data: str
    """Name of the images, as data.name has it, with data.path."""
    images: str
    """Fingerprint of those that it was trained on."""
    seed: int
    accuracy: float
    """Share of held-out real images whose class it sees."""
    held_out: int
    """Number of these."""
    width: int = 32
    """Channels of its first convolution."""


class Classifier(nn.Module):
    """Tells the classes of images by four convolutions, group normalization (Wu & He 2018) and SiLU.

    Shapes: images (N, in_channels, H, W), uint8 -> forward (N, num_classes), the logits; `features` (N, 7·width)
    float32, the means over all places of what each convolution makes: edges and strokes in the first ones, digits in
    the last.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, *, width: int = 32) -> None:
        super().__init__()

        def block(channels: int, out_channels: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, GroupNormSiLU(8, out_channels))

        self.blocks = nn.ModuleList(
            [
                block(in_channels, width, 1 if image_size < 16 else 2),
                block(width, 2 * width, 1),
                block(2 * width, 2 * width, 2),
                block(2 * width, 2 * width, 1),
            ]
        )
        self.hidden = nn.Linear(9 * 2 * width, 2 * width)
        self.head = nn.Linear(2 * width, num_classes)

    def activations(self, images: Tensor) -> Iterator[Tensor]:
        """Give what each convolution makes of uint8 images, (N, C, H, W)."""
        x = images.float() / 127.5 - 1
        for block in self.blocks:
            x = block(x)
            yield x

    def features(self, images: Tensor) -> Tensor:
        """Compute the features of uint8 images."""
        return torch.cat([x.mean((2, 3)) for x in self.activations(images)], 1)

    def forward(self, images: Tensor) -> Tensor:
        *_, last = self.activations(images)
        places = nn.functional.adaptive_avg_pool2d(last, 3).flatten(1)
        return self.head(nn.functional.silu(self.hidden(places)))


def save(classifier: Classifier, trained: Trained, file: Path) -> None:
    """Write a classifier to a safetensors file, whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    with writing(file) as unfinished:
        save_file(state, unfinished, metadata={KEY: json.dumps(asdict(trained))})
        unfinished.chmod(0o644)


def load(file: Path) -> tuple[Classifier, Trained]:
    """Read a classifier in evaluation mode, and what it is. Raises ValueError for a file that is none, or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
        trained = Trained(**parse_object(metadata[KEY].encode(), KEY))
        with torch.device("meta"):
            classifier = Classifier(trained.in_channels, trained.image_size, trained.num_classes, width=trained.width)
        check_tensors(state, classifier.state_dict(), file)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        raise ValueError(
            f"{file} is no classifier ({reason(error)}): give a file that sampling/train_classifier.py wrote"
        ) from error
    classifier.load_state_dict(state, assign=True)
    return classifier.eval().requires_grad_(False), trained
