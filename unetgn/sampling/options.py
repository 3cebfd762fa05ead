"""Reads what is asked of sampling/sample.py: options, lists of numbers, classes by name or number."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import features

from unetgn.pipelines.sampling import Guidance
from unetgn.pipelines.schedulers import EDM_SCHEDULERS, SCHEDULERS, check_name
from unetgn.programs.paths import user_path
from unetgn.sampling.folder import SamplingError, Subject
from unetgn.training.data.images import shorten

DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH = 0.8, 1.0
MOST_SEEDS, MOST_FRAMES = 10**7, 1000
# What the pipeline's messages call an option.
ARGUMENTS = {
    r"height and width": "--image-size",
    r"height|width": "--image-size",
    r"mask_image": "--mask",
    r"class_labels": "--class-labels",
    r"guidance_scale": "--guidance-scale",
    r"guidance_interval": "--guidance-interval",
    r"guidance_rescale": "--guidance-rescale",
    r"negative_prompt": "--negative-prompt",
    r"^image\b": "--image",
    r"^strength\b": "--strength",
}
PRECISIONS = ("fp32", "bf16", "fp16")


def scheduler_name(text: str) -> str:
    """Return a scheduler's name. Raises argparse.ArgumentTypeError with the reason for one that does not fit."""
    try:
        check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def as_options(message: str) -> str:
    """Write what a pipeline says of its arguments with the options in their place."""
    for argument, option in ARGUMENTS.items():
        message = re.sub(rf"(?<![-\w])(?:{argument})(?!\w)", option, message)
    return message


def finite(text: str) -> float:
    """Parse a finite number. Raises argparse.ArgumentTypeError for anything else."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def parse_seeds(text: str) -> list[int]:
    """Parse the seeds of as many images as one request may ask for, as `parse_numbers` does."""
    return parse_numbers(text, at_most=MOST_SEEDS)


def parse_numbers(text: str, *, at_most: int | None = None) -> list[int]:
    """Parse '0-3,7' -> [0, 1, 2, 3, 7]. Raises argparse.ArgumentTypeError for anything else, and above `at_most`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers and ranges such as 0-63 or 0,5,8-9")
        part_of = range(int(first), int(last if dash else first) + 1)
        if at_most is not None and len(numbers) + part_of.stop - part_of.start > at_most:
            raise argparse.ArgumentTypeError(f"{text!r} is of more than {at_most} numbers, and no more are possible")
        numbers.extend(part_of)
    if max(numbers) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} has a number of 2**63 or more; seeds are smaller")
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return numbers


def add_network_options(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add the options that say what draws: those of sampling/sample.py and of the page."""
    parser.add_argument("--checkpoint", type=user_path, required=True, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or raw weights")
    parser.add_argument(
        "--batch-size",
        type=above_zero,
        default=batch_size,
        help=f"images per process at a time (default: {batch_size})",
    )
    add_parts(parser)


def add_parts(parser: Any) -> None:
    """Add the options that say where what goes with a network is, to a parser or a group of one."""
    for name, what in (("autoencoder", "what makes images of latents"), ("text-encoder", "what reads the prompts")):
        words = f"{what} (default: in data.path of the run)"
        parser.add_argument(f"--{name}", type=user_path, metavar="FOLDER", help=words)


def above_zero(text: str) -> int:
    """Parse a whole number of 1 or more. Raises argparse.ArgumentTypeError for anything else."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; at least 1 is needed")
    return number


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_network_options(parser, batch_size=64)
    parser.add_argument("--seeds", type=parse_seeds, required=True, help="one image each, as in 0-63 or 0,5,8-9")
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
        "--negative-prompt",
        metavar="TEXT",
        help="what guidance leads away from, of networks that read text (default: the empty text)",
    )
    parser.add_argument(
        "--guidance-scale", type=finite, default=1.0, help="uncond + W·(cond - uncond); 1 (default) is off"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only at noise levels LOW < sigma <= HIGH, such as 0.3 3 (sigma is the noise for "
        "each unit of image)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share, 0 to 1, of the guided prediction that gets the spread of the unguided one",
    )
    parser.add_argument(
        "--scheduler",
        type=scheduler_name,
        metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}; for networks with EDM's objective {', '.join(EDM_SCHEDULERS)}; or the name of "
        "the class in diffusers (default: ddpm; for EDM's edm_dpmsolver++)",
    )
    parser.add_argument("--steps", type=int, help="sampling steps (default: 250 for ddpm, 50 for the others)")
    parser.add_argument(
        "--image-size",
        type=above_zero,
        nargs="+",
        metavar="PIXELS",
        help="height and width, or one number for both, of what the network makes, images or latents (default: what it "
        "was trained on)",
    )
    parser.add_argument(
        "--image", type=user_path, metavar="FILE", help="a picture to begin with, in the place of noise"
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="share of the steps that change --image (default: "
        f"{DEFAULT_STRENGTH}, with --mask {DEFAULT_MASKED_STRENGTH:g})",
    )
    parser.add_argument(
        "--mask",
        type=user_path,
        metavar="FILE",
        help="a picture, white where --image is drawn anew and black where it stays",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the network (default: fp32)")
    parser.add_argument(
        "--strip",
        action="store_true",
        help="also write denoise.png and an animation: the first four images from noise on",
    )
    parser.add_argument(
        "--interpolate",
        type=int,
        metavar="FRAMES",
        help="also write interpolation.png and an "
        "animation: from each seed to the next in so many pictures, as the first one's class, with a --scheduler that "
        "draws no noise between steps, such as ddim",
    )
    parser.add_argument(
        "--animation", choices=("gif", "webp"), help="format of --strip's and --interpolate's (default: gif)"
    )
    parser.add_argument(
        "--webdataset",
        action="store_true",
        help="also write shards/000000.tar …, a thousand images each with their classes and prompts",
    )
    parser.add_argument(
        "--npz", action="store_true", help="also write samples.npz: arr_0 (N, H, W, C) uint8, seeds, labels"
    )
    return parser


def parse_arguments(arguments: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """Parse the options of sampling/sample.py, which `description` describes."""
    parser = make_parser(description)
    parsed = parser.parse_args(arguments)
    if parsed.image_size is not None and len(parsed.image_size) > 2:
        parser.error(f"argument --image-size: {len(parsed.image_size)} numbers; it takes the height and the width")
    check_options(parser, parsed)
    return parsed


def check_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Raise SystemExit, with what would be right, where options contradict each other or are out of range."""
    try:
        interval = parsed.guidance_interval and (parsed.guidance_interval[0], parsed.guidance_interval[1])
        Guidance(parsed.guidance_scale, interval, parsed.guidance_rescale)
    except ValueError as error:
        parser.error(as_options(str(error)))
    if parsed.negative_prompt is not None and parsed.guidance_scale == 1:
        parser.error(
            "argument --negative-prompt: guidance leads away from it, and --guidance-scale is 1, which is none"
        )
    for name in ("strength", "mask"):
        if getattr(parsed, name) is not None and parsed.image is None:
            parser.error(f"argument --{name}: it is for --image FILE, which was not given")
    if parsed.image is not None:
        if parsed.strength is None:
            parsed.strength = DEFAULT_STRENGTH if parsed.mask is None else DEFAULT_MASKED_STRENGTH
        if not 0 < parsed.strength <= 1:
            parser.error(f"argument --strength: {parsed.strength} is not a share above 0 and up to 1")
    if parsed.interpolate is not None:
        if parsed.interpolate < 2 or len(parsed.seeds) < 2:
            parser.error("argument --interpolate: it takes 2 frames or more, and --seeds of two images or more")
        if parsed.image is not None:
            parser.error("argument --interpolate: it leads from one noise to another, and --image begins with neither")
        if (frames := (len(parsed.seeds) - 1) * (parsed.interpolate - 1) + 1) > MOST_FRAMES:
            parser.error(f"argument --interpolate: that makes {frames} frames; {MOST_FRAMES} at most")
    if parsed.animation is not None and not parsed.strip and parsed.interpolate is None:
        parser.error("argument --animation: there is none without --strip or --interpolate")
    parsed.animation = parsed.animation or "gif"
    if parsed.animation == "webp" and not features.check("webp"):
        parser.error("argument --animation: Pillow was built without WebP here; gif will do")


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
