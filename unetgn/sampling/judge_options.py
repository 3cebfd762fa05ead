"""Reads what is asked of sampling/evaluate.py."""

from __future__ import annotations

import argparse
from typing import get_args

from unetgn.programs.paths import file_to_write, user_path
from unetgn.sampling.drawn import Drawing
from unetgn.sampling.judge import Part
from unetgn.sampling.options import above_zero, add_parts, finite, parse_seeds, scheduler_name

DEFAULT = "digits8_ddpm"
CURVES = ("fid", "kid", "precision", "recall", "label_agreement", "frechet_distance", "novelty")


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument(
        "--samples", type=user_path, metavar="PATH", help="folder, NPZ file, tar shard or folder of tars"
    )
    judged.add_argument("--checkpoint", type=user_path, metavar="RUN",
                        help="a run's folder, or one of its checkpoints: its samples go to RUN/evaluation")  # fmt: skip
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--config", metavar="NAME", help="configuration that names the real images, such as "
                          f"RUN/config.yaml (default: that of --checkpoint, or {DEFAULT})")  # fmt: skip
    compared.add_argument("--real", type=user_path, metavar="PATH", help="real images, in a set as --samples takes it")
    parser.add_argument(
        "--reference",
        choices=get_args(Part),
        help="part of the configuration's images whose features are compared with (default: held_out, or all where "
        "nothing is held out)",
    )
    parser.add_argument(
        "--extractor",
        metavar="NAME",
        help="what makes features: digits or mnist5k (small classifiers that come along), inception[=FILE], a "
        "TorchScript file, a file of sampling/train_classifier.py, or module.path:name (default: that of the embedded "
        "data, else inception where it is installed)",
    )
    parser.add_argument("--cache", type=user_path, metavar="FOLDER", help="keeps features of real images (default: "
                        "~/.cache/unetgn/features)")  # fmt: skip
    parser.add_argument(
        "--out", type=file_to_write, help="JSON file to write (default: evaluation.json beside the samples)"
    )
    parser.add_argument(
        "--all-checkpoints", action="store_true", help="judge every checkpoint of the run, draw a curve"
    )
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        metavar="WIDTH",
        help="judge averages of these widths (sigma_rel), made of what a run with ema.power_widths kept, of its newest "
        "snapshot, or with --all-checkpoints of each; the curve is over the widths",
    )
    parser.add_argument("--metric", choices=CURVES, help="what the curve shows (default: fid)")
    drawing = parser.add_argument_group("what --checkpoint draws, as sampling/sample.py")
    drawing.add_argument("--seeds", type=seeds_as_text, help="one image each, as in 0-63 or 0,5,8-9 (default: 0-999)")
    drawing.add_argument("--scheduler", type=scheduler_name, metavar="NAME")
    drawing.add_argument("--steps", type=int)
    drawing.add_argument("--batch-size", type=above_zero)
    drawing.add_argument("--guidance-scale", type=finite)
    drawing.add_argument("--prompts", nargs="+", metavar="TEXT")
    drawing.add_argument("--weights", choices=("ema", "raw"))
    add_parts(drawing)
    return parser


def parse_arguments(arguments: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """Parse the options of sampling/evaluate.py, which `description` describes."""
    parser = make_parser(description)
    parsed = parser.parse_args(arguments)
    asked = [
        name
        for name in [*vars(Drawing()), "all_checkpoints", "widths"]
        if getattr(parsed, name) is not parser.get_default(name)
    ]
    if parsed.checkpoint is None and asked:
        parser.error(f"--{asked[0].replace('_', '-')} is for --checkpoint: what --samples has is drawn already")
    if parsed.metric is not None and not parsed.all_checkpoints and parsed.widths is None:
        parser.error("--metric is for --all-checkpoints and --widths: without a curve all figures are printed")
    if parsed.widths is not None and parsed.weights == "raw":
        parser.error("--weights raw is for a checkpoint's own weights: --widths are averages, leave one of them out")
    if parsed.widths is not None and len(set(parsed.widths)) < len(parsed.widths):
        parser.error(f"--widths {' '.join(map(str, parsed.widths))} has one twice")
    if parsed.reference is not None and parsed.real is not None:
        parser.error("--reference is for --config: all images of --real are compared with")
    return parsed


def seeds_as_text(text: str) -> str:
    """Return a list of seeds as it was given. Raises argparse.ArgumentTypeError for what is none."""
    parse_seeds(text)
    return text
