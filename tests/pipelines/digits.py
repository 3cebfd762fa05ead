"""Has networks that were trained, for any noise schedule, and judges the digits that they draw."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

from unetgn import UNet
from unetgn.training.objective import ObjectiveConfig, make_scheduler

FOLDER = Path(__file__).parent / "trained"
SHAPE = (1, 8, 8)


@cache
def digits_network(prediction_type: str) -> UNet:
    """Load the network that predicts so, trained on the squared-cosine schedule."""
    return UNet.from_pretrained(FOLDER / prediction_type).float().eval()


def log_ratio(shares: Tensor) -> np.ndarray:
    shares = shares.double().clamp(1e-12)  # zero terminal SNR has an exact 0
    return (shares / (1 - shares)).log().numpy()


class OnSchedule(nn.Module):
    """Gives a network, at each level of a schedule, the level of its own training that has as much noise."""

    def __init__(self, unet: UNet, training_scheduler: Any) -> None:
        super().__init__()
        self.unet, self.device, self.dtype = unet, unet.device, unet.dtype
        own = log_ratio(make_scheduler(ObjectiveConfig(schedule="squared_cosine")).alphas_cumprod)
        self.level = np.interp(-log_ratio(training_scheduler.alphas_cumprod), -own, np.arange(len(own)))

    def forward(self, noisy: Tensor, timestep: Tensor, text: None = None, class_labels: Any = None) -> SimpleNamespace:
        return self.unet(noisy, torch.tensor(float(self.level[int(timestep)])), text, class_labels=class_labels)


@cache
def judge_of_digits() -> SVC:
    digits = load_digits()
    return SVC(gamma=0.001).fit(digits.data, digits.target)  # scikit-learn's example for pixels in 0 .. 16


def assert_digits(images: Tensor, classes: list[int]) -> None:
    """Check that images (N, 1, 8, 8) in [-1, 1] show the digits asked for, in shades as real ones of them have.

    Where sampling fails, a pixel is black or white, or the classes are those of chance.
    """
    pixels = (images.flatten(1).double().numpy() + 1) / 2
    assert (judge_of_digits().predict(pixels * 16) == classes).mean() >= 0.9
    digits = load_digits()
    real = digits.data[np.isin(digits.target, classes)] / 16
    assert ((pixels <= 0) | (pixels >= 1)).mean() < 0.6  # of real ones 0.54: many have a whole black edge
    assert abs(pixels.mean() - real.mean()) < 0.05
    assert abs(pixels.clip(0, 1).std() - real.std()) < 0.08
