"""Make images with a trained U-Net: python sampling/sample.py --checkpoint RUN --seeds 0-63 --out DIR

Image n depends on seed n alone, up to the rounding that batch size and device bring: not on the other images or the
number of processes. What was stopped goes on where it was when the same line is started again.
"""

from __future__ import annotations

from training.last_words import last_words  # the first of all

# isort: split
import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from sampling.folder import Request, SamplingError, Subject, claim, file_of, write_summary
from sampling.trained import Trained, load_trained, open_autoencoder, open_text_encoder
from training.checkpoint import find_checkpoint
from training.data.autoencoder import Autoencoder, digest
from training.data.images import shorten
from training.data.text import TextEncoder
from training.errors import CheckpointError, ConfigError
from training.files import user_path, write_png
from training.processes import ask_main
from unetgn.pipelines.pictures import to_picture, to_uint8
from unetgn.pipelines.sampling import SCHEDULERS, make_sampling_scheduler, sample


def parse_numbers(text: str) -> list[int]:
    """Parse '0-3,7' -> [0, 1, 2, 3, 7]. Raises argparse.ArgumentTypeError for anything else."""
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
    """Parse the options of this script."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=user_path, required=True, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--seeds", type=parse_numbers, required=True, help="one image each, as in 0-63 or 0,5,8-9")
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for 000000.png …, grid.png and samples.csv"
    )
    parser.add_argument(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help='classes by number, as in 0-9, or by name, as in cat,dog or "sea lion" dog (RUN/data.json has the names), '
        "cycled: seed n has number n modulo their count (default: all)",
    )
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="for networks that read text; cycled likewise")
    parser.add_argument(
        "--guidance-scale", type=float, default=1.0, help="uncond + W·(cond - uncond); 1 (default) is off"
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddpm", help="default: ddpm")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 250 for ddpm, 50 for the others)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per process at a time (default: 64)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or raw weights")
    parser.add_argument("--image-size", type=int, help="height and width of what the network makes, images or latents "
                        "(default: what it was trained on)")  # fmt: skip
    parser.add_argument("--autoencoder", type=user_path, metavar="FOLDER",
                        help="what makes images of latents (default: in data.path of the run)")  # fmt: skip
    parser.add_argument("--text-encoder", type=user_path, metavar="FOLDER",
                        help="what reads the prompts (default: in data.path of the run)")  # fmt: skip
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


def parse_classes(given: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the numbers of classes that are given by name or by number, several parted by commas, numbers as ranges.

    Raises SamplingError for what is neither, and for what is the name of one class and the number of another.
    """
    number = {name: i for i, name in enumerate(names)}
    parts = [part for text in given for part in ([text] if text in number else text.split(","))]
    labels: list[int] = []
    for part in (part.strip() for part in parts):
        kind, marked, marked_part = part.partition("=")
        if marked and kind == "number":
            labels += to_numbers(marked_part, names)
        elif part not in number:
            labels += to_numbers(part, names)
        elif part.isdecimal() and int(part) != number[part] and int(part) < len(names):
            raise SamplingError(
                f"--class-labels {part} is the name of class {number[part]}, and class {part} is {names[int(part)]!r}: "
                f"say which by number, --class-labels number={number[part]} or number={part}"
            )
        else:
            labels.append(number[part])
    return labels


def to_numbers(part: str, names: Sequence[str]) -> list[int]:
    """Read a number or a range. Raises SamplingError with the names that there are for anything else."""
    try:
        return parse_numbers(part)
    except argparse.ArgumentTypeError as error:
        there = f"the names are {shorten(names)}" if names else "this run knows no names of its classes (data.json)"
        near = difflib.get_close_matches(part, names, n=1)
        raise SamplingError(
            f"--class-labels {part!r} is neither the name nor the number of a class; {there}, numbers are as in 0-9"
            + (f". Did you mean {near[0]!r}?" if near else "")
        ) from error


def choose_subjects(
    seeds: Sequence[int],
    classes: Sequence[str] | None,
    prompts: list[str] | None,
    num_classes: int | None,
    *,
    names: Sequence[str] = (),
) -> dict[int, Subject]:
    """Return the subject of each seed: classes (default: all) and prompts, both cycling. Raises SamplingError."""
    labels: list[int] | None = None
    if num_classes is None and classes is not None:
        raise SamplingError("--class-labels was given, but this network was trained without classes: leave it out")
    if num_classes is not None:
        labels = list(range(num_classes)) if classes is None else parse_classes(classes, names)
        if wrong := [label for label in labels if label >= num_classes]:
            raise SamplingError(f"--class-labels {wrong}: this network has the classes 0 to {num_classes - 1}")
        if len(set(labels)) < len(labels):
            raise SamplingError(f"--class-labels {' '.join(classes or [])} names a class twice")
    return {
        seed: Subject(labels[seed % len(labels)] if labels else None, prompts[seed % len(prompts)] if prompts else None)
        for seed in seeds
    }


def make_images(
    trained: Trained,
    request: Request,
    subjects: dict[int, Subject],
    out: Path,
    accelerator: Accelerator,
    *,
    autoencoder: Autoencoder | None,
    text_encoder: TextEncoder | None,
    batch: int,
) -> None:
    """Write the images that are missing, each rank its share."""
    share = list(subjects)[accelerator.process_index :: accelerator.num_processes]
    mine = [seed for seed in share if not file_of(out, seed).exists()]
    unet = trained.unet.to(accelerator.device)
    shape = (unet.config.in_channels, request.image_size, request.image_size)
    with tqdm(total=len(mine), unit="image", disable=not accelerator.is_main_process, dynamic_ncols=True) as bar:
        for start in range(0, len(mine), batch):
            seeds = mine[start : start + batch]
            labels = [label for seed in seeds if (label := subjects[seed].label) is not None]
            texts = None if text_encoder is None else text_encoder.encode([subjects[s].prompt or "" for s in seeds])
            images = sample(
                unet,
                make_sampling_scheduler(request.scheduler, trained.scheduler, request.steps),
                seeds,
                shape,
                class_labels=labels or None,
                texts=texts,
                empty_text=None if text_encoder is None else text_encoder.encode([""])[0],
                guidance_scale=request.guidance_scale,
                clip=autoencoder is None,
            )
            if autoencoder is not None:
                images = autoencoder.decode(images.to(accelerator.device)).cpu()
            for seed, pixels in zip(seeds, to_uint8(images), strict=True):
                write_png(file_of(out, seed), to_picture(pixels))
            bar.update(len(seeds))


def run(arguments: argparse.Namespace) -> None:
    """Go from the parsed arguments to the folder of images."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    checkpoint = ask_main(accelerator, lambda: find_checkpoint(arguments.checkpoint))  # verified once, for all
    trained = load_trained(checkpoint, arguments.weights)
    num_classes = trained.unet.config.num_classes
    if arguments.guidance_scale != 1 and not trained.unconditional:
        raise SamplingError(
            f"--guidance-scale {arguments.guidance_scale}: guidance needs a network that was trained with classes or "
            "texts and without (objective.label_dropout above 0), and this one was not: leave it out"
        )
    size = arguments.image_size or trained.unet.config.sample_size
    if size is None:
        raise SamplingError("this network has no model.sample_size: give --image-size")
    subjects = choose_subjects(
        arguments.seeds, arguments.class_labels, arguments.prompts, num_classes, names=trained.class_names
    )
    autoencoder = open_autoencoder(trained, arguments.autoencoder)
    text_encoder = open_text_encoder(trained, arguments.text_encoder, arguments.prompts)
    request = Request(
        trained.digest,
        arguments.scheduler,
        arguments.steps,
        arguments.guidance_scale,
        size,
        autoencoder=None if autoencoder is None else digest(autoencoder.model),
        text_encoder=None if text_encoder is None else digest(text_encoder.model),
    )
    try:
        make_sampling_scheduler(request.scheduler, trained.scheduler, request.steps)
    except ValueError as error:
        raise SamplingError(f"--scheduler and --steps: {error}") from error
    if accelerator.is_main_process:
        claim(arguments.out, request, subjects)
    accelerator.wait_for_everyone()
    if text_encoder is not None:
        text_encoder.model.to(accelerator.device)
    make_images(
        trained,
        request,
        subjects,
        arguments.out,
        accelerator,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        batch=arguments.batch_size,
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shown = write_summary(arguments.out, subjects, npz=arguments.npz)
        print(f"{len(subjects)} images in {arguments.out}; {arguments.out / 'grid.png'} shows {shown}")


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 the request cannot be met, 130 Ctrl-C."""
    try:
        run(parse_arguments(arguments))
    except (SamplingError, CheckpointError, ConfigError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("sample.py", error)
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"sample.py: {error}; the images that were made stay", file=sys.stderr)
        return 1
    finally:  # C++ may abort a process that leaves its process group to the exit
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
