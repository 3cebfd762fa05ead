"""Measures how fast a run is: images per second, share of the device's peak, and the time that the loader takes."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from unetgn import UNet, UNetConfig
from unetgn.training.checkpoint import Checkpoint
from unetgn.training.lora import LoRAConfig, add_adapter
from unetgn.training.noise_scale import noise_scale
from unetgn.training.step import Numbers

logger = logging.getLogger(__name__)

# Dense operations per second in bf16 and fp16, no sparsity, from the data sheets: NVIDIA's A100 (2020), L40S (2023),
# H100 (2022), H200 (2023), B200 (2024), AMD's MI300X (2023). The name, as whole words, is looked for in the driver's.
PEAK_16_BIT = {"A100": 312e12, "L40S": 362e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
               "B200": 2250e12, "MI300X": 1307e12}  # fmt: skip
WAITING = 0.2  # share of the time above which the loader is said to be the bottleneck
JUDGED = 50  # steps after which that is asked; where it was so, it is asked again after ten times as many


def flops_per_image(
    config: UNetConfig,
    size: int | tuple[int, ...],
    text_shape: tuple[int, ...] | None,
    lora: LoRAConfig | None = None,
) -> int:
    """Count the floating-point operations of a training step for one image: products and convolutions, both passes.

    `size` is that of the image, one number for all axes or one each. `text_shape` is (tokens, width) of what the
    network reads, None where it reads nothing. With `lora` the network's own weights have no gradients.
    """
    with torch.device("meta"):
        unet = UNet.from_unet_config(config).train()
        if lora is not None:
            add_adapter(unet, lora)
        image = torch.empty(1, config.in_channels, *([size] * config.spatial_dims if isinstance(size, int) else size))
        labels = None if config.num_classes is None else torch.zeros(1, dtype=torch.long)
        text = None if text_shape is None else torch.empty(1, *text_shape)
        counter = FlopCounterMode(display=False)
        with counter:
            unet(image, torch.zeros(1, dtype=torch.long), text, class_labels=labels).sample.sum().backward()
    return counter.get_total_flops()


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """Look up the most operations per second that the device has in this precision; None where it is not known."""
    if mixed_precision == "no":
        return None
    return next((peak for name, peak in PEAK_16_BIT.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True)
class LoaderTimes:
    """Holds how long some steps took, in seconds, and how much of it they waited for images."""

    steps: int = 0
    waited: float = 0.0
    elapsed: float = 0.0

    def plus(self, steps: int, waited: float, elapsed: float) -> LoaderTimes:
        """Add further steps."""
        return LoaderTimes(self.steps + steps, self.waited + waited, self.elapsed + elapsed)


class Window:
    """Computes the means over the steps since the last row of the log, on the device.

    `batches` are the images of the two gradients whose norms the steps say, for the noise scale; None without it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images_per_step: int,
        flops: Callable[[], int],
        batches: tuple[int, int] | None = None,
    ) -> None:
        device = accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_flops(name, accelerator.mixed_precision)
        self.accelerator, self.images_per_step, self.batches = accelerator, images_per_step, batches
        self.flops = 0 if self.peak is None else flops()  # an image's; counting them takes a fifth of a second
        self.sums, self.steps = torch.zeros(2 if batches is None else 4, device=device), 0
        self.restored = 0
        """Of these steps, those of another process, before a run was resumed: how long they took is not known here."""
        self.closed: tuple[list[float], int] | None = None
        """Means over the ranks of the sums that the last row was made of, and of how many steps they are."""
        self.since, self.waited = time.perf_counter(), 0.0
        self.loader: LoaderTimes | None = None  # the loader's start falls into the first row, which tells nothing
        self.judge_after = JUDGED

    def add(self, steps: Iterable[Numbers]) -> None:
        """Count steps, in their order: from it the sums have their rounding."""
        for numbers in steps:
            own = torch.stack([numbers.loss.float(), numbers.gradient_norm.float()])
            self.sums += own if numbers.parts is None else torch.cat([own, numbers.parts])
            self.steps += 1

    def close(self) -> dict[str, float]:
        """Return mean loss over steps and ranks, mean gradient norm and images per second, and begin anew.

        With `noise_scale` too, where these steps tell it; without the rate where none of them was timed here.
        """
        means = self.accelerator.reduce(self.sums, reduction="mean")
        self.closed = means.tolist(), self.steps
        loss, norm, *parts = (means / self.steps).tolist()
        now = time.perf_counter()
        elapsed = now - self.since
        row = {"loss": loss, "gradient_norm": norm}
        if self.batches is not None:
            scale = noise_scale(*parts, small_batch=self.batches[0], large_batch=self.batches[1])
            row |= {} if scale is None else {"noise_scale": scale}
        if timed := self.steps - self.restored:
            row["images_per_second"] = rate = timed * self.images_per_step / elapsed
        if timed and self.peak is not None:
            row["share_of_peak"] = rate * self.flops / (self.peak * self.accelerator.num_processes)
        self._watch_loader(elapsed)
        self.clear()
        self.since, self.waited = now, 0.0
        return row

    def clear(self) -> None:
        """Forget the sums since the last row."""
        self.sums, self.steps, self.restored = torch.zeros_like(self.sums), 0, 0

    def _watch_loader(self, elapsed: float) -> None:
        """Warn where steps wait for images, judged by whole rows: `JUDGED` steps of them or more."""
        if self.loader is None:
            self.loader = LoaderTimes()
            return
        self.loader = times = self.loader.plus(self.steps, self.waited, elapsed)
        if times.steps < self.judge_after:
            return
        self.loader, self.judge_after = LoaderTimes(), JUDGED
        if times.waited > WAITING * times.elapsed:
            self.judge_after = 10 * times.steps
            logger.warning(
                "the loader is the bottleneck: %.0f %% of the last %d steps (%.3g ms of %.3g ms a step) went into "
                "waiting for images; raise data.num_workers, or make the images smaller on disk",
                100 * times.waited / times.elapsed,
                times.steps,
                1000 * times.waited / times.steps,
                1000 * times.elapsed / times.steps,
            )

    def all_sums(self) -> list[list[float]]:
        """Return the sums of each rank: with them a resumed run's first row is the unbroken run's.

        Every rank has to ask.
        """
        return self.accelerator.gather(self.sums[None]).tolist()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from what the checkpoint has; another number of ranks begins a new window."""
        sums = checkpoint.window_sums
        if len(sums) == self.accelerator.num_processes and all(len(each) == len(self.sums) for each in sums):
            rank = self.accelerator.process_index
            self.sums, self.steps = torch.tensor(sums[rank], device=self.sums.device), checkpoint.window_steps
            self.restored = self.steps
