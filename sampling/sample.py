"""Make images with a trained U-Net: accelerate launch sampling/sample.py --checkpoint RUN --seeds 0-63 --out DIR

Image n depends on seed n alone, up to the rounding that batch size and device bring: not on the other images or the
number of processes. What was stopped goes on where it was when the same line is started again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from sampling.pictures import save_png, to_grid, to_picture, to_uint8
from sampling.sampler import SCHEDULERS, make_sampling_scheduler, sample
from training.checkpoint import MANIFEST, CheckpointError, find_checkpoint
from unetgn import UNet

GRID = 256  # images in grid.png at most


class SamplingError(Exception):
    """What was asked for cannot be sampled; the message says why and what would do."""


@dataclass(frozen=True)
class Request:
    """Everything that decides what an image looks like beside its seed and class."""

    network: str  # sha256 of the weights
    scheduler: str
    steps: int
    guidance_scale: float
    image_size: int


def parse_numbers(text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises argparse.ArgumentTypeError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers and ranges such as 0-63 or 0,5,8-9")
        numbers.extend(range(int(first), int(last if dash else first) + 1))
    if max(numbers) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} has a number of 2**63 or more; seeds are smaller")
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return numbers


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--seeds", type=parse_numbers, required=True, help="one image each, as in 0-63 or 0,5,8-9")
    parser.add_argument("--out", type=Path, required=True, help="folder for 000000.png …, grid.png and samples.csv")
    parser.add_argument(
        "--class-labels",
        type=parse_numbers,
        help="classes as in 0-9, cycled: seed n has number n modulo their count (default: all)",
    )
    parser.add_argument(
        "--guidance-scale", type=float, default=1.0, help="uncond + W·(cond - uncond); 1 (default) is off"
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddpm", help="default: ddpm")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 250 for ddpm, 50 for the others)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per process at a time (default: 64)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or raw weights")
    parser.add_argument("--image-size", type=int, help="height and width (default: what the network was trained on)")
    parser.add_argument(
        "--npz", action="store_true", help="also write samples.npz: arr_0 (N, H, W, C) uint8, seeds, labels"
    )
    parsed = parser.parse_args(arguments)
    for name in ("batch_size", "image_size"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small; at least 1 is needed")
    if not math.isfinite(parsed.guidance_scale):
        parser.error(f"argument --guidance-scale: {parsed.guidance_scale} is not a finite number")
    if parsed.steps is None:
        parsed.steps = 250 if parsed.scheduler == "ddpm" else 50
    return parsed


def load_network(checkpoint: Path, weights: str) -> tuple[UNet, DDPMScheduler, float, str]:
    """The U-Net of a checkpoint in evaluation mode, the scheduler that it was trained with, the share of labels that
    were dropped in training, and the sha256 of its weights."""
    file = "ema.safetensors" if weights == "ema" else "model.safetensors"
    unet = UNet.from_config(json.loads((checkpoint / "config.json").read_text()))
    unet.load_state_dict(load_file(checkpoint / file))
    scheduler = DDPMScheduler.from_config(json.loads((checkpoint / "scheduler_config.json").read_text()))
    dropped = yaml.safe_load((checkpoint / "config.yaml").read_text())["objective"]["label_dropout"]
    return unet.eval(), scheduler, dropped, json.loads((checkpoint / MANIFEST).read_text())["sha256"][file]


def choose_labels(seeds: Sequence[int], asked: list[int] | None, num_classes: int | None) -> dict[int, int | None]:
    """The class of each seed's image: those asked for (default: all), cycling with the seed. Raises SamplingError."""
    if num_classes is None:
        if asked is not None:
            raise SamplingError("--class-labels was given, but this network was trained without classes: leave it out")
        return dict.fromkeys(seeds)
    asked = list(range(num_classes)) if asked is None else asked
    if wrong := [label for label in asked if label >= num_classes]:
        raise SamplingError(f"--class-labels {wrong}: this network has the classes 0 to {num_classes - 1}")
    return {seed: asked[seed % len(asked)] for seed in seeds}


def claim(out: Path, request: Request, labels: dict[int, int | None]) -> None:
    """Make the folder this request's. Raises SamplingError where it holds images of another one."""
    file = out / "request.json"
    if not file.exists() and any(path.stem.isdigit() for path in out.glob("*.png")):
        raise SamplingError(f"{out} holds numbered images that were not made here: give another --out")
    now = {**asdict(request), "labels": {str(seed): label for seed, label in labels.items()}}
    if file.exists():
        before = json.loads(file.read_text())
        shared = set(before["labels"]) & set(now["labels"])
        differences = [
            f"{key} was {before[key]!r} and is {now[key]!r}" for key in asdict(request) if before[key] != now[key]
        ]
        differences += [
            f"the class of seed {seed} differs"
            for seed in sorted(shared)
            if before["labels"][seed] != now["labels"][seed]
        ]
        if differences:
            raise SamplingError(f"{out} holds images made otherwise: {'; '.join(differences[:4])}. Give another --out")
        now["labels"] = before["labels"] | now["labels"]
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / ".tmp-request.json"
    unfinished.write_text(json.dumps(now, indent=1) + "\n")
    unfinished.replace(file)


def file_of(out: Path, seed: int) -> Path:
    """Where the image of a seed goes."""
    return out / f"{seed:06d}.png"


def make_images(
    unet: UNet,
    scheduler: Any,
    request: Request,
    labels: dict[int, int | None],
    out: Path,
    accelerator: Accelerator,
    batch: int,
) -> None:
    """Write the images that are missing, each rank its share."""
    share = list(labels)[accelerator.process_index :: accelerator.num_processes]
    mine = [seed for seed in share if not file_of(out, seed).exists()]
    shape = (unet.config.in_channels, request.image_size, request.image_size)
    with tqdm(total=len(mine), unit="image", disable=not accelerator.is_main_process, dynamic_ncols=True) as bar:
        for start in range(0, len(mine), batch):
            seeds = mine[start : start + batch]
            classes = [label for seed in seeds if (label := labels[seed]) is not None]
            sampler = make_sampling_scheduler(request.scheduler, scheduler, request.steps)
            images = sample(
                unet,
                sampler,
                seeds,
                shape,
                class_labels=classes or None,
                guidance_scale=request.guidance_scale,
            )
            for seed, pixels in zip(seeds, to_uint8(images), strict=True):
                save_png(to_picture(pixels), file_of(out, seed))
            bar.update(len(seeds))


def write_summary(out: Path, labels: dict[int, int | None], npz: bool) -> None:
    """grid.png, samples.csv and, where asked for, samples.npz, of the images of `labels`."""
    with (out / "samples.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["file", "seed", "class_label"])
        writer.writerows(
            [file_of(out, seed).name, seed, "" if label is None else label] for seed, label in labels.items()
        )
    arrays = [np.asarray(Image.open(file_of(out, seed))) for seed in labels]
    pixels = np.stack([array if array.ndim == 3 else array[..., None] for array in arrays])
    first = torch.from_numpy(pixels[:GRID]).permute(0, 3, 1, 2).float() / 127.5 - 1
    save_png(to_grid(first), out / "grid.png")
    if npz:
        classes = [-1 if label is None else label for label in labels.values()]
        np.savez(out / "samples.npz", arr_0=pixels, seeds=list(labels), labels=classes)


def run(arguments: argparse.Namespace) -> None:
    """From the parsed arguments to the folder of images."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    found = [find_checkpoint(arguments.checkpoint)] if accelerator.is_main_process else [Path()]
    broadcast_object_list(found)  # the main process looks and verifies, for all
    checkpoint = found[0]
    unet, scheduler, dropped, network = load_network(checkpoint, arguments.weights)
    num_classes = unet.config.num_classes
    if arguments.guidance_scale != 1 and (num_classes is None or dropped == 0):
        raise SamplingError(
            f"--guidance-scale {arguments.guidance_scale}: guidance needs a network that was trained with classes and "
            "without (objective.label_dropout above 0), and this one was not: leave it out"
        )
    size = arguments.image_size or unet.config.sample_size
    if size is None:
        raise SamplingError("this network has no model.sample_size: give --image-size")
    labels = choose_labels(arguments.seeds, arguments.class_labels, num_classes)
    steps = arguments.steps
    request = Request(network, arguments.scheduler, steps, arguments.guidance_scale, size)
    try:
        make_sampling_scheduler(request.scheduler, scheduler, request.steps)
    except ValueError as error:
        raise SamplingError(f"--scheduler and --steps: {error}") from error
    if accelerator.is_main_process:
        claim(arguments.out, request, labels)
    accelerator.wait_for_everyone()
    make_images(
        unet.to(accelerator.device), scheduler, request, labels, arguments.out, accelerator, arguments.batch_size
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_summary(arguments.out, labels, arguments.npz)
        print(f"{len(labels)} images in {arguments.out}, all in one picture: {arguments.out / 'grid.png'}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 what was asked for cannot be."""
    try:
        run(parse_arguments(arguments))
    except (SamplingError, CheckpointError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"sample.py: {error}; the images that were made stay", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
