"""Shows pictures to trackers: each of Accelerate's has its own call for that, and some have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from unetgn.training.data.pictures import open_picture


def show_picture(tracker: GeneralTracker, name: str, picture: Image.Image | Path, step: int) -> None:
    """Show a picture, or that of a file, to a tracker, under a name and at a step.

    Raises TypeError for a tracker that takes none.
    """
    coloured = (open_picture(picture) if isinstance(picture, Path) else picture).convert("RGB")
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(coloured)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(coloured)}, step=step)
    elif not hasattr(tracker, "log_images"):
        raise TypeError("it takes no pictures through Accelerate; the run's folder has them")
    elif tracker.name == "clearml":
        tracker.log_images({name: np.asarray(coloured)}, step=step)
    else:  # a list for wandb, swanlab and a tracker of the user's; aim takes one by itself
        tracker.log_images({name: coloured if tracker.name == "aim" else [coloured]}, step=step)
