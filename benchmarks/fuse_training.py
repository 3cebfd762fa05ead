"""Trains networks of other people's packages with and without `unetgn.fuse`: `python -m benchmarks.fuse_training`.

PhysicsNeMo's EDM network with its preconditioning and loss, and MONAI's diffusion U-Net with its inferer and scheduler,
each for 50 steps of Adam on the CPU, from the same weights, images and noise. Prints the largest difference between the
two loss curves relative to the loss, and writes `benchmarks/results/fuse_training.json`. A package that is missing is
a row that says so. Exit code 1 where curves differ by more than 1e-5.
"""

from __future__ import annotations

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unetgn
from benchmarks.fuse_recipes_libraries import without_torchvisions_operators

RESULTS = Path(__file__).parent / "results" / "fuse_training.json"
STEPS, TOLERANCE = 50, 1e-5
Program = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]  # a network, and its loss for a batch of images


def physicsnemo_edm() -> Program:
    """Make PhysicsNeMo's EDM network (DDPM++), with its preconditioning and its loss."""
    without_torchvisions_operators()
    from physicsnemo.diffusion.metrics.legacy_losses import EDMLoss
    from physicsnemo.diffusion.preconditioners.legacy import EDMPrecond

    network = EDMPrecond(16, 3, model_type="SongUNet", model_channels=32, channel_mult=[1, 2], num_blocks=1)
    loss = EDMLoss()
    return network, lambda net, images: loss(net, images).mean()


def monai_ddpm() -> Program:
    """Make MONAI's diffusion U-Net, which its inferer trains to tell the noise of its scheduler."""
    from monai.inferers import DiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDPMScheduler

    settings = {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 32}
    network = DiffusionModelUNet(spatial_dims=2, in_channels=3, out_channels=3, **settings)
    inferer = DiffusionInferer(DDPMScheduler(num_train_timesteps=1000))

    def loss(net: nn.Module, images: Tensor) -> Tensor:
        noise, timesteps = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        prediction = inferer(inputs=images, diffusion_model=net, noise=noise, timesteps=timesteps)
        return nn.functional.mse_loss(prediction, noise)

    return network, loss


PROGRAMS = {"nvidia-physicsnemo": physicsnemo_edm, "monai": monai_ddpm}


def losses(make: Callable[[], Program], *, fused: bool, steps: int = STEPS) -> tuple[list[float], int]:
    """Train from seed 0 in float64; return the loss of each step, and the number of places that were fused."""
    torch.manual_seed(0)
    network, loss = make()
    network = network.double().train()
    places = len(unetgn.fuse(network).fused) if fused else 0
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    curve = []
    for _ in range(steps):
        value = loss(network, torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve, places


def compare(package: str, steps: int = STEPS) -> dict[str, Any]:
    """Train twice; return what is recorded of a package."""
    try:
        version = importlib.metadata.version(package)
        plain, _ = losses(PROGRAMS[package], fused=False, steps=steps)
    except ImportError as error:
        return {"package": package, "skipped": f"{type(error).__name__}: {error}"}
    curve, places = losses(PROGRAMS[package], fused=True, steps=steps)
    difference = max(abs(one - other) / abs(other) for one, other in zip(curve, plain, strict=True))
    return {"package": package, "version": version, "fused": places, "difference": difference, "losses": plain}


def main() -> int:
    """Print and write the comparison."""
    rows = [compare(package) for package in PROGRAMS]
    for row in rows:
        said = row.get("skipped") or f"{row['fused']} places fused, loss curves differ by {row['difference']:.1e}"
        print(f"{row['package']}: {said}")
    record = {"torch": torch.__version__, "steps": STEPS, "dtype": "float64", "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.get("difference", 0) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
