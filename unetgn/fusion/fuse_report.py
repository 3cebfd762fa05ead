"""Says what `unetgn.fuse` would do to a model: unetgn fuse-report MODEL

MODEL is a folder that diffusers wrote (a model, or a pipeline, whose models are taken one by one), of which only the
configuration is read, or package.module:name, where a function of no arguments, or a class, makes a model.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from torch import nn

from unetgn.fusion import fuse
from unetgn.json_files import read_object
from unetgn.programs.last_words import say

CONFIG, INDEX = "config.json", "model_index.json"  # of a model, and of a pipeline


class NoModel(ValueError):
    """Says why there is no model where one was asked for, and what would do."""


def models_of(name: str) -> Iterator[nn.Module]:
    """Make the models that `name` means, without their weights where it is a folder. Raises NoModel."""
    folder = Path(name).expanduser()
    if (folder / INDEX).is_file():
        parts = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        models = [part for part in parts if "_class_name" in read_object(part / CONFIG)]
        if not models:
            raise NoModel(f"{name} is a pipeline without a model of diffusers: none of its folders has a {CONFIG} "
                          "that names a class of it")  # fmt: skip
        for part in models:
            yield model_in(part)
    elif (folder / CONFIG).is_file():
        yield model_in(folder)
    elif ":" in name:
        yield made_by(name)
    else:
        raise NoModel(f"{name} is no folder with a {CONFIG} or {INDEX}, nor package.module:name")


def model_in(folder: Path) -> nn.Module:
    """Make the model that the configuration in a folder describes, with empty weights. Raises NoModel."""
    config = read_object(folder / CONFIG)
    class_name = config.get("_class_name")
    if class_name == "UNet":
        raise NoModel(f"{folder} is a network of unetgn, whose norms are fused as they are")
    kind = getattr(diffusers, str(class_name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise NoModel(f"{folder / CONFIG} names {class_name!r}, which is no model of diffusers {diffusers.__version__}")
    with torch.device("meta"):
        model = kind.from_config(config)  # type: ignore[attr-defined]
    assert isinstance(model, nn.Module)
    return model


def made_by(name: str) -> nn.Module:
    """Call what `package.module:name` means. Raises NoModel where that is nothing, or makes no model."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the folder where the command was started
    try:
        model = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise NoModel(f"{name} makes no model ({type(error).__name__}: {error}); it should be package.module:name, "
                      "of something that is called without arguments") from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise NoModel(f"{name} makes a {type(model).__name__}, and no torch.nn.Module")
    return model


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="unetgn fuse-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder of diffusers', or package.module:name")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code: 0 done, 2 where there is no model."""
    name = make_parser().parse_args(arguments).model
    try:
        for model in models_of(name):
            print(fuse(model))
    except (ValueError, OSError) as error:
        say(f"unetgn fuse-report: error: {error}")
        return 2
    return 0
