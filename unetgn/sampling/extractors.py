"""Names what makes features of images: a classifier of ours, Inception, or a network of the user's.

An extractor takes images as files have them, uint8 (N, C, H, W), and gives float32 (N, D). Its digest says what it
computes: features are kept under it, and figures of different extractors cannot be compared.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unetgn.messages import said
from unetgn.programs.last_words import what_brings
from unetgn.sampling.classifier import FOLDER, load
from unetgn.sampling.sets import EvaluationError
from unetgn.training.errors import reason
from unetgn.training.files import sha256

INCEPTION = "weights-inception-2015-12-05"  # of torch-fidelity's release v0.2.0, converted from TensorFlow's
KINDS = (
    "the name of a classifier that comes along ({}), inception (or inception=FILE.safetensors), a classifier's "
    ".safetensors or a TorchScript file, or module.path:name of a torch.nn.Module or of what makes one"
)


class ExtractorError(EvaluationError):
    """Says why there is no such extractor, and what would do."""


@dataclass(frozen=True)
class Extractor:
    """Makes features of images."""

    name: str
    digest: str
    """A sha256 of what computes them."""
    compute: Callable[[Tensor], Any]
    """Takes uint8 images (N, C, H, W), on the device."""
    device: torch.device
    grey_to_rgb: bool = True
    """Repeats the channel of grey images three times, for networks of photographs."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute features (N, D) float32, on the CPU. Raises ExtractorError where they are none."""
        if self.grey_to_rgb and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        try:
            found = self.compute(images.to(self.device))
        except Exception as error:  # of a network of the user's
            raise ExtractorError(
                f"the extractor {self.name} fails on images {tuple(images.shape)} of uint8: {error}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            what = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ExtractorError(f"the extractor {self.name} gives {what} for {len(images)} images, not (N, D) numbers")
        return found.float().cpu()


def shipped() -> list[str]:
    """List the data sets whose classifier comes along."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def default_name(data: str) -> str:
    """Name the extractor for images of data.name `data`, where none is asked for."""
    return data if data in shipped() else "inception"


def open_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Open an extractor by name. Raises ExtractorError where there is none, saying what is missing."""
    device = torch.device(device)
    kind, _, rest = name.partition("=")
    if name in shipped():
        return open_classifier(name, FOLDER / f"{name}.safetensors", device)
    if kind == "inception":
        return open_inception(name, Path(rest).expanduser() if rest else None, device)
    file = Path(name).expanduser()
    if file.suffix == ".safetensors":
        return open_classifier(name, file, device)
    if file.is_file():
        return open_torchscript(name, file, device)
    if ":" in name:
        return open_module(name, device)
    raise ExtractorError(f"there is no extractor {name!r}: give {KINDS.format(', '.join(shipped()))}")


def open_classifier(name: str, file: Path, device: torch.device) -> Extractor:
    """Open a classifier that sampling/train_classifier.py wrote."""
    try:
        classifier, trained = load(file)
    except ValueError as error:
        raise ExtractorError(str(error)) from error
    wanted = (trained.in_channels, trained.image_size, trained.image_size)

    def compute(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(f"it was trained on images (C, H, W) {wanted}: give another --extractor")
        return classifier.features(images)

    classifier.to(device)
    return Extractor(name, sha256(file), compute, device, grey_to_rgb=False)


def open_inception(name: str, file: Path | None, device: torch.device) -> Extractor:
    """Open torch-fidelity's Inception, the network of published FIDs. Raises ExtractorError without its weights.

    They are published as a pickle, which is not opened here: the error has the lines that convert it, once.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is for another torch
        raise ExtractorError(
            "the extractor inception is in the package torch-fidelity: pip install "
            f"{what_brings('[train,fid]')} ({error})"
        ) from error
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    weights = file or folder / f"{INCEPTION}.safetensors"
    if not weights.is_file():
        pickle = folder / f"{INCEPTION}-6726825d.pth"
        raise ExtractorError(
            f"the weights of the extractor inception are not there: {weights}. Download {INCEPTION}-6726825d.pth of "
            "torch-fidelity's release v0.2.0 from its page on GitHub, and convert it once:\n"
            "  import torch; from safetensors.torch import save_file\n"
            f'  save_file(torch.load("{pickle}", weights_only=True), "{weights}")'
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        own = io.BytesIO()  # its constructor unpickles what it is given: this, which was made here
        torch.save(load_file(weights), own)
        own.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=own)
    except (SafetensorError, RuntimeError) as error:
        raise ExtractorError(f"{weights} does not hold torch-fidelity's Inception: {reason(error)}") from error
    network.to(device).eval()  # which its constructor leaves to the caller
    return Extractor(name, sha256(weights), lambda images: network(images)[0], device)


def open_torchscript(name: str, file: Path, device: torch.device) -> Extractor:
    """Open a TorchScript file, which is a program: one from somebody who is trusted."""
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ExtractorError(f"{file} is no TorchScript file: {said(error)}") from error
    return Extractor(name, sha256(file), network, device)


def open_module(name: str, device: torch.device) -> Extractor:
    """Open `module.path:name`: a torch.nn.Module, or a class or function that makes one without arguments.

    Its digest is of its weights and of the file that defines it, not of what that file imports.
    """
    where, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the folder where the script was started
    try:
        made = getattr(importlib.import_module(where), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExtractorError(f"the extractor {name} cannot be imported: {error}") from error
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    if not isinstance(made, nn.Module):
        raise ExtractorError(f"the extractor {name} is a {type(made).__name__}: a torch.nn.Module is needed")
    network = made.to(device).eval().requires_grad_(False)
    total = hashlib.sha256(name.encode())
    total.update(inspect.getsource(sys.modules[type(network).__module__]).encode())
    for key, tensor in network.state_dict().items():
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return Extractor(name, total.hexdigest(), network, device)
