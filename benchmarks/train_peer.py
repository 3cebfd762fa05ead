"""Trains as diffusers' unconditional example does, for `benchmarks.train`: the peer of training/train.py.

Written anew from what that example does at each step: Accelerate, a batch of a torch DataLoader over decoded, resized,
cropped and flipped images, noise at a random timestep by DDPMScheduler, the mean squared error of the predicted noise,
gradients clipped to norm 1, AdamW, a cosine schedule, EMAModel, a progress bar and TensorBoard after every step.

`python -m benchmarks.train_peer SETTINGS.json`, or that behind a launcher; it writes its rates to SETTINGS' "out".
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Settings:
    """Says what is trained, on what, and how long."""

    model: str
    """Folder with the network's config.json."""
    images: str
    size: int
    steps: int
    batch_size: int
    num_workers: int
    learning_rate: float
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    ema_decay: float
    window: int
    """Steps of which one rate is made."""
    logs: str
    out: str


class Pictures(Dataset[Tensor]):
    """Reads images (3, size, size) in [-1, 1]: the shorter side resized, the middle cut out, half of them mirrored."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths, self.size = sorted(folder.rglob("*.png")), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as file:
            picture = file.convert("RGB")
        shorter = min(picture.size)
        width, height = (round(side * self.size / shorter) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = np.asarray(picture.crop((left, top, left + self.size, top + self.size)), dtype=np.float32)
        image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
        return image.flip(-1) if torch.rand(()) < 0.5 else image.contiguous()


def train(settings: Settings) -> None:
    """Train, and write the images a second of each window, of all processes together."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with="tensorboard",
        project_config=ProjectConfiguration(logging_dir=settings.logs),
    )
    unet: Any = UNet2DModel.from_config(UNet2DModel.load_config(settings.model))
    average = EMAModel(unet.parameters(), decay=settings.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    average.to(accelerator.device)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        unet.parameters(), settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    loader: Any = DataLoader(
        Pictures(Path(settings.images), settings.size),
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.num_workers,
    )
    ranks = accelerator.num_processes  # Accelerate steps a schedule once for each of them
    rates: Any = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=settings.warmup_steps * ranks,
        num_training_steps=settings.steps * ranks,
    )
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    if accelerator.is_main_process:
        accelerator.init_trackers("peer")
    bar = tqdm(total=settings.steps, disable=not accelerator.is_main_process)
    windows, since, images_per_step = [], time.perf_counter(), settings.batch_size * ranks
    for step, clean in enumerate(endless(loader, settings.steps), start=1):
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        with accelerator.accumulate(unet):
            loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        average.step(unet.parameters())
        logs = {"loss": loss.detach().item(), "lr": rates.get_last_lr()[0], "ema_decay": average.cur_decay_value}
        bar.update()
        bar.set_postfix(**logs)
        accelerator.log(logs, step=step)
        if step % settings.window == 0:
            now = time.perf_counter()
            windows.append(settings.window * images_per_step / (now - since))
            since = now
    accelerator.end_training()
    if accelerator.is_main_process:
        Path(settings.out).write_text(json.dumps(windows))


def endless(loader: Any, batches: int) -> Iterator[Tensor]:
    """Go through the data as many epochs as it takes."""
    given = 0
    while True:
        for batch in loader:
            if given == batches:
                return
            given += 1
            yield batch


def main() -> None:
    """Train as the file of settings says."""
    train(Settings(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
