"""train.py in which rank 1 meets, from sample BAD_FROM on, a loss that is no number or a loader that stands still."""

import os
import sys
import time

import torch

from unetgn.training.data.samples import IndexedSamples
from unetgn.training.train import main

original = IndexedSamples.__getitem__


def bad_on_rank_1(stream: IndexedSamples, counter: int) -> dict[str, torch.Tensor]:
    sample = original(stream, counter)
    if os.environ["RANK"] == "1" and counter >= int(os.environ["BAD_FROM"]):
        if os.environ["BAD"] == "stuck":
            time.sleep(120)
        sample["image"] = torch.full_like(torch.as_tensor(sample["image"]), float("nan"))
    return sample


IndexedSamples.__getitem__ = bad_on_rank_1
sys.exit(main())
