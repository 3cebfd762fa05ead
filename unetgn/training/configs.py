"""Lists the configurations that come along, or prints one, to change it: unetgn configs NAME > mine.yaml"""

from __future__ import annotations

import argparse
import itertools
import re

from unetgn.programs.last_words import say
from unetgn.training.config_yaml import CONFIGS, find_config
from unetgn.training.errors import ConfigError


def about(text: str) -> str:
    """Return the first sentence of the comment that a configuration begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<!\bal)\.(?= |$)|: ", comment, maxsplit=1)[0]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(prog="unetgn configs", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the configuration to print")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code: 0 done, 2 where there is no such configuration."""
    name = make_parser().parse_args(arguments).name
    if name is None:
        files = sorted(CONFIGS.glob("*.yaml"))
        width = max(len(file.stem) for file in files)
        for file in files:
            print(f"{file.stem:{width}}  {about(file.read_text(encoding='utf-8'))}")
        return 0
    try:
        print(find_config(name).read_text(encoding="utf-8"), end="")
    except ConfigError as error:
        say(f"unetgn configs: error: {error}")
        return 2
    return 0
