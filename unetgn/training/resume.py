"""Finds where a run begins: at the beginning, or after a checkpoint, and checks that the checkpoint is this run's."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unetgn.messages import plain
from unetgn.training.checkpoint import (
    CONFIG,
    LEFT,
    Check,
    Checkpoint,
    aside,
    find_checkpoint,
    list_checkpoints,
    newer,
    newest_valid,
    old,
    places,
)
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config, walk
from unetgn.training.data.folders import few
from unetgn.training.data.looking import advise_without
from unetgn.training.data.samples import IndexedSamples, Samples
from unetgn.training.errors import CheckpointError, RunDirectoryError
from unetgn.training.power_averages import AVERAGES, snapshots_after
from unetgn.training.run_directory import COLUMNS, RunDirectory

logger = logging.getLogger(__name__)

# Keys that may change from one part of a run to the next: they decide what is written and how fast, not the weights.
FREE = ("train.steps", "train.log_every", "train.validate_every", "train.trackers", "train.processes", "train.profile",
        "data.path", "data.num_workers", "data.to_grey", "data.max_pixels", "data.cut_shards", "data.without",
        "data.held_out_most", "checkpoint", "preview", "evaluate")  # fmt: skip

# Keys that decide the figures in evaluation.csv, by group: those to come have to compare with those that are there.
OF_FIGURES = {"evaluate": ("count", "extractor"), "preview": ("steps", "scheduler", "guidance_scale")}

ABSENT = "left out"

# How a step's images are shared out: free with another number of processes, where a step takes as many as before.
SHARES = ("train.batch_size", "train.gradient_accumulation")


def find_start(output: RunDirectory, resume: str, check: Check | None = None) -> Checkpoint | None:
    """Find the checkpoint to go on from, verified and checked; None to begin.

    Raises RunDirectoryError where the folder holds another run, CheckpointError where `resume` leads to nothing.
    """
    if resume == "auto":
        found = newest_valid(output.checkpoints, check)
        if found is None and output.holds_a_run():
            logger.warning("%s has no checkpoint yet: beginning at step 0", output.path)
        return found
    if resume == "none":
        if output.holds_a_run():
            raise RunDirectoryError(
                f"{output.path} already holds a run: go on with --resume auto, or give another --output"
            )
        return None
    found = find_checkpoint(Path(resume), check)
    if output.holds_a_run() and not is_of(found, output):
        raise RunDirectoryError(f"{output.path} holds another run than {resume}: give another --output")
    return found


def is_of(checkpoint: Checkpoint, output: RunDirectory) -> bool:
    """Return True where a checkpoint is this run's, be it or the folder of checkpoints on another disk."""
    return any(place.parent.resolve() == output.checkpoints.resolve() for place in places(checkpoint.path))


def check_same_run(config: RunConfig, samples: Samples, checkpoint: Checkpoint, world_size: int) -> None:
    """Raise CheckpointError where the checkpoint is another run's: what decides the weights differs, or the images do.

    Also where the checkpoint is beyond the last step.
    """
    before, now = flat(load_config(checkpoint.config_file)), flat(config)
    # Of a group that is null at one time, the keys are there at the other time only.
    changed = [key for key in {**before, **now} if before.get(key, ABSENT) != now.get(key, ABSENT)]
    was = checkpoint.world_size
    same_step = images_a_step(before, was) == images_a_step(now, world_size)
    may_change = (*FREE, *SHARES) if was != world_size and same_step else FREE
    if config.data.buckets:  # the order is made of whole batches
        may_change = FREE
    if config.lora is not None:
        may_change = (*may_change, "train.initial_weights")  # wherever they are: that they are the same is looked at
    fixed = [key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in may_change)]
    if fixed:
        differences = "; ".join(
            f"{key} was {plain(str(before.get(key, ABSENT)))} and is {plain(str(now.get(key, ABSENT)))}"
            for key in fixed
        )
        raise CheckpointError(
            f"{checkpoint.path} was made with another configuration: {differences}. Set it back, or begin a run of its "
            f"own with these weights: train.initial_weights={checkpoint.path} --resume none and another --output"
        )
    if "train.steps" in changed:
        logger.warning("train.steps was %s and is %s: the learning rate follows the new one", before["train.steps"],
                       now["train.steps"])  # fmt: skip
    if checkpoint.images != samples.fingerprint():
        rotten = rotten_since(samples, checkpoint, before, now)
        if rotten is None:
            raise CheckpointError(
                f"{checkpoint.path} was made with other images than are here now ({samples}; data.path, --overfit): "
                "put them back, or begin a run of its own with these weights: "
                f"train.initial_weights={checkpoint.path} --resume none and another --output"
            )
        if rotten:
            raise CheckpointError(
                f"{len(rotten)} images that {checkpoint.path} was made with cannot be read any more ({few(rotten)}): "
                f"mend them, or go on without them: {advise_without([*now['data.without'], *rotten])}"
            )
    if checkpoint.step > config.train.steps:
        raise CheckpointError(
            f"{checkpoint.path} is at step {checkpoint.step}, beyond train.steps, which is {config.train.steps}: raise "
            "it, or give an older checkpoint to --resume"
        )
    if was != world_size:
        logger.warning("%d processes were at work and now %d: %s", was, world_size, (
            "close to the unbroken run, but not equal to the bit" if same_step else
            "a step takes another number of images, unless train.batch_size or .gradient_accumulation makes up for it"
        ))  # fmt: skip


def check_judged_alike(config: RunConfig, output: RunDirectory) -> None:
    """Raise CheckpointError where a run was judged, and would be from now on in another way: its best would be none."""
    if not (config.evaluate.every and output.rows("evaluation.csv") and (output.path / CONFIG).is_file()):
        return
    before, now = flat(load_config(output.path / CONFIG)), flat(config)
    keys = [f"{group}.{name}" for group, names in OF_FIGURES.items() for name in names]
    if changed := [f"{key} was {before[key]} and is {now[key]}" for key in keys if before[key] != now[key]]:
        raise CheckpointError(
            f"{output.path / 'evaluation.csv'} has figures that do not compare with those to come: "
            f"{'; '.join(changed)}. Set it back, set evaluate.every to 0, or move that file away"
        )


def dry_run_words(config: RunConfig, output: RunDirectory, start: Checkpoint | None) -> str:
    """Say that nothing was written, and what would be deleted once the run has saved."""
    step = 0 if start is None else start.step
    after = newer(output.checkpoints, step)
    before = old([path for path in list_checkpoints(output.checkpoints) if path not in after], config.checkpoint.keep)
    rows = {name: count for name in COLUMNS if (count := output.rows_after(name, step))}
    doomed = [f"{path} (after step {step}; put aside until the next checkpoint is written)" for path in after]
    doomed += [f"{path} (put aside before)" for path in aside(output.checkpoints)]
    doomed += [f"{path} (checkpoint.keep is {config.checkpoint.keep})" for path in before]
    doomed += [f"{path} (after step {step}; {path.name}.{LEFT} until then)"
               for path in snapshots_after(output.path / AVERAGES, step)]  # fmt: skip
    doomed += [f"{count} rows of {output.path / name} (after step {step}; {name}.{LEFT} has them until then)"
               for name, count in rows.items()]  # fmt: skip
    return "\na dry run: nothing was written" + "".join(f"\nthe run would delete {what}" for what in doomed)


def rotten_since(
    samples: Samples, checkpoint: Checkpoint, before: dict[str, Any], now: dict[str, Any]
) -> list[str] | None:
    """Name the images that became unreadable after the checkpoint, where nothing else changed but data.without.

    None where other images changed.
    """
    if not isinstance(samples, IndexedSamples):
        return None
    return samples.changed(checkpoint.samples(), {*before.get("data.without", ()), *now["data.without"]})


def images_a_step(keys: dict[str, Any], processes: int) -> int:
    """Count the images of an optimizer step, of a flat configuration."""
    return processes * math.prod(int(keys[key]) for key in SHARES)


def flat(config: RunConfig) -> dict[str, Any]:
    """Flatten the configuration to {dotted key: value}, groups left out."""
    return dict(leaves(asdict(config)))


def leaves(keys: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """List every (dotted key, plain value)."""
    return ((key, value) for key, value in walk(keys) if not isinstance(value, dict))
