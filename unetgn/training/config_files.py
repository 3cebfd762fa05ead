"""Reads the configuration of a run from YAML and from `key=value` arguments, and writes it back.

jsonargparse gives the types of the keys; what it does not say (which file, which key was meant) is said here.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import typing
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from unetgn.json_files import LIMIT, check_depth
from unetgn.training.checkpoint import CONFIG
from unetgn.training.config import RunConfig
from unetgn.training.data.config import DataConfig
from unetgn.training.errors import SAID, SHOWN, ConfigError, short
from unetgn.training.files import user_path
from unetgn.training.hints import nearest_key
from unetgn.training.manifest import MANIFEST
from unetgn.training.run_directory import STATUS
from unetgn.training.values import as_meant

PACKAGE = Path(__file__).resolve().parents[1]
# Of an installed package, or of a clone.
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())

# Keys that had another name once. Whoever writes an old one is told the new one; runs of that time go on.
RENAMED = {"train.checkpoint_every": "checkpoint.every", "train.sample_every": "preview.every"}


class OnceLoader(yaml.SafeLoader):
    """Reads plain YAML in which a key stands once; of two values YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct the mapping. Raises ConstructorError for a repeated key, with its line."""
        if not isinstance(node, yaml.MappingNode):  # of a tag such as !!set
            raise yaml.constructor.ConstructorError(None, None, "keys and values are needed", node.start_mark)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def find_config(name: str) -> Path:
    """Find the file that `name` means: a path, also from the repository's root, or the name of a file in configs/.

    Raises ConfigError where there is none.
    """
    for candidate in (user_path(name), CONFIGS.parent / name, CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise ConfigError(f"--config {name}: no such file, nor is it in configs/.{nearest(name, known)} There: {known}")


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read the configuration in a file, changed by `key=value` arguments. Raises ConfigError."""
    keys = read_yaml(path)
    if is_of_a_run(path):
        rename_old_keys(keys)
    keys = as_meant(RunConfig, keys)
    for key, value in walk(keys):
        check_key(str(path), key, value)
    parser = make_parser()
    try:
        parsed = parser.parse_string(yaml.safe_dump(keys))
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    for override in overrides or []:
        parsed = apply(parser, parsed, override)
    try:
        config = RunConfig(**vars(parser.instantiate(parsed)))
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
        raise ConfigError(f"{source}: {explain(error)}") from error
    # The network remembers what it was trained on, for pipelines and for sampling.
    return replace(config, model=replace(config.model, sample_size=config.data.image_size))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, which may be anybody's. Raises ConfigError, in one line."""
    try:
        if not path.is_file():  # reading a pipe, or zeros without end, would take for ever
            raise ValueError("it is no file")
        if path.stat().st_size > LIMIT:
            raise ValueError(f"it has {path.stat().st_size} bytes; at most {LIMIT} are read")
        keys = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
        if next(islice(values(keys), LIMIT, None), None) is not None:
            raise ValueError(f"written out, its aliases (*name) stand for more than {LIMIT} values")
        check_depth(keys, "it")
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as YAML: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # the second of dates that are none, and of huge numbers
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: holds no keys; it should look like configs/digits8_ddpm.yaml")
    return keys


def values(tree: Any) -> Iterator[Any]:
    """List the values in nested mappings and lists, each as often as it is written out."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple, set)) else None
    if not inner:
        yield True
    else:
        for value in inner:
            yield from values(value)


def is_of_a_run(path: Path) -> bool:
    """Return True where a run wrote the file, to its folder or to a checkpoint."""
    return path.name == CONFIG and any((path.parent / beside).is_file() for beside in (STATUS, MANIFEST))


def rename_old_keys(keys: dict[str, Any]) -> bool:
    """Move the values of keys that had another name once to those of today, and return True where there were any.

    An old key beside its new one stays, to be refused.
    """
    renamed = False
    for old, new in RENAMED.items():
        (old_group, old_name), (new_group, new_name) = old.split("."), new.split(".")
        group = keys.get(old_group)
        if isinstance(group, dict) and old_name in group:
            other = keys.setdefault(new_group, {})
            if isinstance(other, dict) and new_name not in other:
                other[new_name] = group.pop(old_name)
                renamed = True
    return renamed


def load_data_config(overrides: list[str]) -> DataConfig:
    """Read the keys data.* alone, from `data.key=value` arguments. Raises ConfigError."""
    parser = make_parser()
    parsed = parser.get_defaults()
    for override in overrides:
        key = override.removeprefix("--").partition("=")[0]
        if "=" not in override or not key.startswith("data."):
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
    key, equals, value = override.removeprefix("--").partition("=")
    if not equals:
        raise ConfigError(f"command line: {override!r} is neither an option nor key=value, such as train.steps=100")
    check_key("command line", key, value)
    meant = as_meant(known_keys()[key].kind, value)
    check_key("command line", key, meant)
    try:
        # Not straight into `parsed`: jsonargparse cannot change a key of an optional group that the file has set.
        alone = parser.parse_args([f"--{key}={value if meant == value else json.dumps(meant)}"])
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"command line, {override}: {explain(error)}") from error
    names = key.split(".")
    groups = [".".join(names[:length]) for length in range(1, len(names))]
    place = next((group for group in groups if parsed[group] is None), key)  # a group that was left out comes whole
    parsed[place] = alone[place]
    return parsed


def explain(error: Exception) -> str:
    """Put into one line what jsonargparse or a dataclass says over several."""
    said = " ".join(str(error).replace("Parser key ", "key ").replace("<class '", "").replace("'>", "").split())
    return said if len(said) <= 2 * SAID else f"{said[: 2 * SAID]}…"


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
        near = nearest_key(key[:SHOWN], list(known))
        asked = f" Did you mean {near!r}?" if near else " train.py --help lists all keys"
        raise ConfigError(f"{source}: unknown key {short(key)}.{asked}")
    null = value is None or (source == "command line" and value == "null")
    if null and known[key].optional:
        return
    if known[key].group and not isinstance(value, dict):
        inside = [name for name in known if name.startswith(f"{key}.")]
        raise ConfigError(f"{source}: {key} is a group of keys ({', '.join(inside)}), but its value is {short(value)}")
    if null:
        raise ConfigError(f"{source}: {key} has no value, and cannot be null: give one, or leave the key out")


def nearest(name: str, known: list[str]) -> str:
    """Ask ' Did you mean …?', or nothing where nothing is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def to_yaml(config: RunConfig) -> str:
    """Write the configuration with every default; `load_config` reads it back."""
    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)


def plain(value: Any) -> Any:
    """Turn tuples into lists, all through: what YAML has words for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
