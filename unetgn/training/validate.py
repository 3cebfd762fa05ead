"""Computes the held-out loss: of the same images, noise and noise levels every time, so that figures compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from unetgn.training.data.samples import IndexedSamples, Restarting
from unetgn.training.step import TrainState

SEED = 0  # of the noise; the run's own seed must not make two runs incomparable


@torch.no_grad()
def held_out_loss(
    state: TrainState,
    samples: IndexedSamples,
    *,
    levels: int,
    num_workers: int,
    go_on: Callable[[], None],
    noting: Callable[[], AbstractContextManager[None]],
) -> tuple[float, list[float]]:
    """Compute the mean loss of the averaged weights over every held-out image once, each rank its share.

    The list has it of each of `levels` ranges of noise levels, which are equally probable in training, the least noise
    first; NaN of one that no image has.

    Images are decoded in `num_workers` processes beside each rank. `go_on` is called before every batch, by every rank
    equally often, and may raise to leave early. What a rank does alone between two calls is done within `noting()`.
    """
    accelerator, size = state.accelerator, state.config.batch_size
    count, ranks = len(samples.indices), accelerator.num_processes
    starts = range(accelerator.process_index * size, accelerator.process_index * size + count, size * ranks)
    shares = [list(range(start, min(start + size, count))) for start in starts]  # at the end some ranks have no image
    filled, on_gpu = [share for share in shares if share], accelerator.device.type == "cuda"
    total = torch.zeros(2, 1 + levels, device=accelerator.device)  # sum and number, of all and of each range
    with state.averaged() as unet:
        with noting():
            batches = Restarting(
                lambda given: samples.loader(filled[given:], num_workers=num_workers, pin_memory=on_gpu),
                num_workers=num_workers,
            )
        for share in shares:
            go_on()
            if share:
                with noting():
                    batch = next(batches)
                    losses = state.objective.losses(unet, state.to_device(batch))
                    total += sums(losses, (batch["time"] * levels).long().to(losses.device), levels)
        go_on()  # where a rank failed, none waits for its sum
    total = accelerator.reduce(total, reduction="sum")
    mean, *by_level = (total[0] / total[1]).tolist()
    return mean, by_level


def sums(losses: Tensor, level: Tensor, levels: int) -> Tensor:
    """Add losses (N,) up, and their number: (2, 1 + levels), of all and of each of the ranges that `level` (N,) has."""
    counted = torch.stack([losses, torch.ones_like(losses)])
    ranges = torch.nn.functional.one_hot(level, levels).to(losses.dtype)
    return torch.cat([counted.sum(1, keepdim=True), counted @ ranges], dim=1)
