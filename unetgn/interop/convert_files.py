"""Converts somebody else's U-Net to ours, or ours to diffusers': unetgn convert SOURCE OUT

SOURCE is a safetensors file of CompVis, Stability, guided-diffusion, EDM or MONAI, or the folder of a model or pipeline
of diffusers, or of ours. What the file does not say is given by the name of the original's option, as in
num_head_channels=64, or by the authors' own file, --config v1-inference.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from unetgn.interop.families import FAMILIES, load
from unetgn.interop.from_diffusers import from_diffusers
from unetgn.interop.to_diffusers import to_diffusers
from unetgn.json_files import read_object
from unetgn.programs.last_words import say
from unetgn.programs.paths import folder_to_write, user_path
from unetgn.unet import UNet


def read(source: Path, options: dict[str, Any], *, family: str | None, config: Path | None, ema: bool | None) -> UNet:
    """Read a network of any kind. Raises ValueError or OSError, with what would do."""
    if not source.is_dir():
        given = (source,) if family is None else (family, source)
        return load(*given, config=config, ema=ema, **options)
    given_beside = (("--family", family), ("--config", config), ("--ema", ema))
    for_files = [name for name, value in given_beside if value is not None]
    if for_files or options:
        raise ValueError(f"{', '.join([*for_files, *options])} is for a file; the folder {source} says what it is")
    network = source if (source / "config.json").is_file() else source / "unet"
    if (network / "config.json").is_file() and read_object(network / "config.json").get("_class_name") == UNet.__name__:
        return UNet.from_pretrained(network)
    return from_diffusers(source)


def option(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as YAML has it. Raises argparse.ArgumentTypeError."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value, such as num_head_channels=64")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {' '.join(str(error).split())}") from error


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="unetgn convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=user_path, metavar="SOURCE", help="a safetensors file, or a folder")
    parser.add_argument("out", type=folder_to_write, metavar="OUT", help="the folder to write, which must not be there")
    parser.add_argument("options", nargs="*", type=option, metavar="name=value", help="options of the original network")
    parser.add_argument("--to", choices=("unetgn", "diffusers"), default="unetgn", help="whose model (default: unetgn)")
    parser.add_argument("--family", choices=[*FAMILIES], help="whose file it is (default: recognised by its tensors)")
    parser.add_argument("--config", type=user_path, metavar="FILE", help="the authors' YAML file")
    either = "of a file that has both, the averaged weights, or the trained ones"
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help=either)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code: 0 done, 1 where writing failed, 2 where there is nothing to convert."""
    parsed = make_parser().parse_intermixed_args(arguments)
    source, out = parsed.source, parsed.out
    try:
        if out.exists():
            raise ValueError(f"{out} is there already: give another folder")
        unet = read(source, dict(parsed.options), family=parsed.family, config=parsed.config, ema=parsed.ema)
        model = to_diffusers(unet) if parsed.to == "diffusers" else unet
    except (ValueError, TypeError, OSError) as error:
        say(f"unetgn convert: error: {error}")
        return 2
    try:
        model.save_pretrained(out)
    except OSError as error:
        say(f"unetgn convert: {error}")
        return 1
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, a {type(model).__name__}, in {out}"
    )
    return 0
