"""Reads the configuration of a run from YAML and from `key=value` arguments, and writes it back.

jsonargparse gives the types of the keys; what it does not say (which file, which key was meant) is said here.
"""

from __future__ import annotations

import functools
import json
import re
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from unetgn.messages import SAID, SHOWN, plain, short
from unetgn.training.config import RunConfig
from unetgn.training.config_yaml import BASE, ON_CPU, RENAMED, merged, read_keys
from unetgn.training.data.config import DataConfig
from unetgn.training.data.fitting import CHANNELS, OPEN, fit
from unetgn.training.data.images import NO_CLASSES
from unetgn.training.errors import ConfigError, DataError
from unetgn.training.hints import nearest_key
from unetgn.training.values import as_meant, fits, in_words


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read the configuration in a file, changed by `key=value` arguments. Raises ConfigError."""
    keys, overrides, left = take_open(read_checked(path), overrides or [])
    if left:
        raise ConfigError(f"{path}: {', '.join(left)} is left to the data, and here nobody looks at them: give a value")
    parser = make_parser()
    try:
        parsed = parse_text(yaml.safe_dump(keys)).clone()
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: {misfit(walk(keys)) or explain(error)}") from error
    for override in overrides:
        parsed = apply(parser, parsed, override)
    try:
        config = RunConfig(**vars(parser.instantiate(parsed)))
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
        raise ConfigError(f"{source}: {explain(error)}") from error
    # The network remembers what it was trained on, for pipelines and for sampling.
    return replace(config, model=replace(config.model, sample_size=config.data.image_size))


def read_checked(path: Path) -> dict[str, Any]:
    """Read the keys of a file, with those of the files that it builds on. Raises ConfigError for one that is none."""
    files = [(file, as_meant(RunConfig, keys)) for file, keys in read_keys(path)]
    for file, keys in files:
        for key, value in walk(keys):
            if key not in OPEN or not is_word(value, OPEN[key]):
                check_key(str(file), key, value)
    return merged(files)


def find_in_data(path: Path, overrides: list[str], before: Path | None = None) -> list[str]:
    """Find the keys that a configuration leaves to the data; return these as `key=value` arguments.

    A run that goes on has what it began with, by its own configuration, `before`: else an image that has become
    unreadable since, or is left out, would make it another run.
    """
    keys, rest, left = take_open(read_checked(path), overrides)
    if not left:
        return []
    if before is not None and before.is_file():
        began = asdict(load_config(before))
        found = {key: began[key.split(".")[0]][key.split(".")[1]] for key in left}
        if "model.num_classes" in left and found["model.num_classes"] is None:
            found |= NO_CLASSES
        return as_arguments(found)
    model = keys.get("model") or {}
    channels = next((value for key in ("out_channels", "in_channels") if (value := model.get(key))), 3)
    stand_ins = {"data.image_size": model.get("sample_size") or 64, "model.num_classes": 2}
    stand_ins |= dict.fromkeys(CHANNELS, channels)
    config = load_config(path, [*rest, *(f"{key}={stand_ins[key]}" for key in left)])
    try:
        found = fit(config.data, left, step=2 ** (len(config.model.channels) - 1))
    except (ValueError, DataError) as error:
        raise ConfigError(str(error)) from error
    return as_arguments(found)


def split(argument: str) -> tuple[str, str, str]:
    """Split a `key=value` argument into the key, "=" where there is one, and the value."""
    return argument.removeprefix("--").partition("=")


def value_of(key: str, arguments: list[str]) -> str | None:
    """Return the value that `key=value` arguments give a key; of several, the last one counts."""
    values = [value for other, equals, value in map(split, arguments) if other == key and equals]
    return values[-1] if values else None


def as_arguments(keys: Mapping[str, object]) -> list[str]:
    """Write keys as `key=value` arguments."""
    return [f"{key}={'null' if value is None else value}" for key, value in keys.items()]


def take_open(keys: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Take what leaves keys to the data out of a file's keys and of `key=value` arguments; list these keys last."""
    given = [split(text) for text in overrides]
    left = []
    for key, word in OPEN.items():
        group, name = key.split(".")
        inside = keys.get(group)
        values: list[Any] = []
        if isinstance(inside, dict) and name in inside:
            values = [inside[name]]
            if is_word(inside[name], word):
                keys = {**keys, group: {other: value for other, value in inside.items() if other != name}}
        values += [value for other, _, value in given if other == key]
        if values and is_word(values[-1], word):  # of a key, the last one counts
            left.append(key)
    return keys, [text for text, (key, _, value) in zip(overrides, given, strict=True) if OPEN.get(key) != value], left


def is_word(value: object, word: str) -> bool:
    """Return True where a value of YAML or of the command line is the word."""
    return ("null" if value is None else value) == word


def load_data_config(overrides: list[str]) -> DataConfig:
    """Read the keys data.* alone, from `data.key=value` arguments. Raises ConfigError."""
    parser = make_parser()
    parsed = parser.get_defaults()
    for override in overrides:
        key, equals, _ = split(override)
        if not equals or not key.startswith("data."):
            raise ConfigError(f"command line: {override!r} is no option, nor data.key=value, such as data.path=DIR")
        parsed = apply(parser, parsed, override)
    try:
        return DataConfig(**vars(parsed.data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"command line: {explain(error)}") from error


@functools.cache  # for a quarter of a second it reads the docstrings of all keys
def make_parser() -> jsonargparse.ArgumentParser:
    """Make a parser of the keys of RunConfig alone, one for the whole process."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    return parser


@functools.lru_cache(maxsize=64)  # a run and its checkpoints all have the same
def parse_text(text: str) -> jsonargparse.Namespace:
    """Parse plain YAML of keys that are known; to be cloned before it is changed."""
    return make_parser().parse_string(text)


def list_keys() -> str:
    """List every key with its meaning, type and default, as it is written on the command line."""
    known, listed = known_keys(), []
    for group in make_parser().format_help().split("\n\n")[2:]:
        # jsonargparse knows options, `--key VALUE`, one for a group of keys from a file, and one for help on a group.
        for entry in re.split(r"\n(?=  --)", group):
            option = re.match(r"  --(\S+) ?(\S*)", entry)
            key = option[1] if option else ""
            if option is None:
                listed.append(f"\n{entry}")
            elif key in known and not known[key].group:
                listed.append(f"  {key}={option[2]}{entry[option.end() :]}")
            elif key in known and known[key].optional:
                inside = "".join(f"\n  {name}=…" for name in known if name.startswith(f"{key}."))
                listed.append(f"  {key}=null{entry[option.end() :]}{inside}")
    return "\n".join(listed).strip()


def apply(parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace, override: str) -> jsonargparse.Namespace:
    """Change `parsed` by one `key=value` of the command line; the value is read as YAML. Raises ConfigError."""
    key, equals, value = split(override)
    if not equals and key in known_keys():
        raise ConfigError(f"command line: {override!r} has no value: write {key}=VALUE, without a space")
    if not equals:
        raise ConfigError(f"command line: {override!r} is neither an option nor key=value, such as train.steps=100")
    check_key("command line", key, value)
    meant = as_meant(known_keys()[key].kind, value)
    check_key("command line", key, meant)
    names = key.split(".")
    groups = [".".join(names[:length]) for length in range(1, len(names))]
    place = next((group for group in groups if parsed[group] is None), key)  # a group that was left out comes whole
    try:
        # Not straight into `parsed`: jsonargparse cannot change a key of an optional group that the file has set.
        line = [f"--{key}={value if meant == value else json.dumps(meant)}"]
        alone = parser.parse_args(line, defaults=place != key)  # which takes 50 times as long
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"command line, {override}: {misfit([(key, meant)]) or explain(error)}") from error
    parsed[place] = alone[place]
    return parsed


def explain(error: Exception) -> str:
    """Put into one line what jsonargparse or a dataclass says over several."""
    words = str(error).replace("Parser key ", "key ").replace("<class '", "").replace("'>", "")
    return plain(" ".join(words.split()), most=2 * SAID)


def misfit(keys: Iterable[tuple[str, Any]]) -> str | None:
    """Say which of these keys has a value of another type than its own, and what it takes; None where none has."""
    for key, value in keys:
        if not known_keys()[key].group and not fits(known_keys()[key].kind, value):
            given = value[0] if isinstance(value, list) and len(value) == 1 else value  # one that was read as a list
            return f"{key} is {short(given)}, but it takes {in_words(known_keys()[key].kind)}"
    return None


@dataclass(frozen=True)
class Key:
    """Says what a key may hold: values of the type `kind`, keys of its own (`group`), null (`optional`)."""

    kind: Any
    group: bool
    optional: bool


@functools.cache
def known_keys() -> dict[str, Key]:
    """Return every key of RunConfig, groups included, by dotted name."""
    return dict(keys_of(RunConfig))


def keys_of(config: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """List the keys of a configuration's class, and of those within it."""
    types = typing.get_type_hints(config)
    for item in fields(config):
        name, kind = prefix + item.name, types[item.name]
        inner = [part for part in (kind, *typing.get_args(kind)) if is_dataclass(part)]
        yield name, Key(kind, bool(inner), type(None) in typing.get_args(kind))
        for part in inner:
            yield from keys_of(typing.cast(type, part), f"{name}.")


def walk(keys: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List every (dotted name, value) of nested mappings, groups included."""
    for key, value in keys.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")


def check_key(source: str, key: str, value: object) -> None:
    """Raise ConfigError where there is no such key, where a group got a plain value, or where null may not be."""
    known = known_keys()
    if key in RENAMED:
        raise ConfigError(f"{source}: {key} is now called {RENAMED[key]}: write that in its place")
    if key not in known:
        near = nearest_key(key[:SHOWN], [*known, BASE, ON_CPU])
        asked = f" Did you mean {near!r}?" if near not in (None, key) else " train.py --help lists all keys"
        raise ConfigError(f"{source}: unknown key {short(key)}.{asked}")
    null = value is None or (source == "command line" and value == "null")
    if null and known[key].optional:
        return
    if known[key].group and not isinstance(value, dict):
        inside = [name for name in known if name.startswith(f"{key}.")]
        raise ConfigError(f"{source}: {key} is a group of keys ({', '.join(inside)}), but its value is {short(value)}")
    if null:
        raise ConfigError(f"{source}: {key} has no value, and cannot be null: give one, or leave the key out")


def to_yaml(config: RunConfig) -> str:
    """Write the configuration with every default; `load_config` reads it back."""
    return yaml.safe_dump(listed(asdict(config)), sort_keys=False)


def listed(value: Any) -> Any:
    """Turn tuples into lists, all through: what YAML has words for."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value
