"""The held-out loss: the same images, noise and noise levels every time, so that two figures can be compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.data import default_collate

from training.data.samples import SampleStream
from training.step import TrainState

SEED = 0  # of the noise; the run's own seed must not make two runs incomparable


@torch.no_grad()
def held_out_loss(state: TrainState, stream: SampleStream, *, go_on: Callable[[], None]) -> float:
    """Mean loss of the averaged weights over every held-out image once, each rank its share.

    `go_on` is called before every batch, by every rank equally often, and may raise to leave early.
    """
    accelerator, size = state.accelerator, state.config.batch_size
    count, ranks = len(stream.indices), accelerator.num_processes
    total = torch.zeros(2, device=accelerator.device)
    with state.averaged() as unet:
        for start in range(0, count, size * ranks):
            go_on()
            first = start + accelerator.process_index * size
            samples = [stream[counter] for counter in range(first, min(first + size, count))]
            if samples:
                losses = state.objective.losses(unet, state.to_device(default_collate(samples)))
                total += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
    total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1])
