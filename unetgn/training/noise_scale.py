"""Measures how noisy gradients are, and so how large a batch is worth it: McCandlish et al. 2018 (arXiv 1812.06162).

With G the gradient over all data and Σ the covariance of that of one sample, the gradient of a batch of B has
E|G_B|² = |G|² + tr(Σ)/B. Two sizes of batch give both terms (appendix A.1), and the noise scale tr(Σ)/|G|²: with
batches far below it twice the batch takes nearly half the steps, far above it nearly as many.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


def noise_scale(small: float, large: float, *, small_batch: int, large_batch: int) -> float | None:
    """Compute tr(Σ)/|G|², in samples, from the mean |G_B|² of batches of two sizes.

    None where |G|² comes out as 0 or less: what was averaged is too little to tell it from the noise.
    """
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    return noise / signal if signal > 0 else None


class PartNorms:
    """Takes the squared norm of the gradient of a part of each step's batch, on this rank.

    The part is the first of several accumulated batches, whose gradient is there before others are added; without
    accumulation it is the rank's own batch, whose gradient DDP shows before it is averaged with those of others.
    """

    def __init__(self, model: nn.Module, accumulated: int, device: torch.device) -> None:
        self.accumulated, self.squared = accumulated, torch.zeros((), device=device)
        if accumulated == 1:
            assert isinstance(model, DistributedDataParallel)  # the configuration sees to it
            model.register_comm_hook(self, add_bucket)

    def begin(self) -> None:
        """Forget the step before."""
        self.squared = torch.zeros_like(self.squared)

    def after_first(self, parameters: Iterable[nn.Parameter]) -> None:
        """Look at the gradients after the first backward pass of a step, which holds 1/accumulated of its loss."""
        if self.accumulated > 1:
            norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
            self.squared = self.accumulated**2 * torch.stack(norms).square().sum()


def add_bucket(norms: PartNorms, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add the squared norm of a bucket of this rank's gradients, then average it over all ranks, as DDP does.

    DDP looks at these annotations, which must not be texts: so this file does without `from __future__`.
    """
    norms.squared = norms.squared + bucket.buffer().square().sum()
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the default group
