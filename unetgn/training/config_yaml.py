"""Finds and reads files of configuration: YAML in which a key stands once, and which may build on another file.

`base: digits8_ddpm`, or the path of a file from the folder of the one that says so, takes the keys of that file; those
beside it come in their place, groups key by key. `on_cpu` is for `unetgn.training.on_cpu`, and no key of a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from unetgn.json_files import LIMIT, check_depth
from unetgn.messages import plain, said, short
from unetgn.programs.paths import user_path
from unetgn.training.checkpoint import CONFIG
from unetgn.training.errors import ConfigError
from unetgn.training.manifest import MANIFEST
from unetgn.training.run_directory import STATUS

PACKAGE = Path(__file__).resolve().parents[1]
# Of an installed package, or of a clone.
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())

BASE = "base"  # the key that names the file which a file builds on
ON_CPU = "on_cpu"  # the key that names the file which is trained in its place where there is a CPU only

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


def find_config(name: str, *, asked: str = "--config", beside: Path = Path()) -> Path:
    """Find the file that `name` means: a path, of a run's folder too, also from the repository's root, or the name of
    a file in configs/.

    A relative path is one from the folder `beside`. Raises ConfigError where there is none; `asked` says who asks.
    """
    if not name:
        raise ConfigError(f"{asked} is empty; it is a file, a run's folder, or the name of a file in configs/")
    given = beside / user_path(name)
    for candidate in (given, given / CONFIG, CONFIGS.parent / name, CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise ConfigError(
        f"{asked} {plain(name)}: no such file, nor is it in configs/.{nearest(name, known)} There: {known}"
    )


def name_of(path: Path) -> str:
    """Return what a file of configuration is called: its own name without the ending, or that of its run's folder."""
    return path.parent.name if path.name == CONFIG else path.stem


def read_keys(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Read the keys of a file and of those that it builds on, `above` those that build on it: lowest first.

    Raises ConfigError, in one line.
    """
    keys = read_yaml(path)
    if is_of_a_run(path):
        rename_old_keys(keys)
        return [(path, keys)]  # which is whole, and may be anybody's
    keys.pop(ON_CPU, None)
    if BASE not in keys:
        return [(path, keys)]
    name = keys.pop(BASE)
    if not isinstance(name, str):
        raise ConfigError(f"{path}: {BASE} is {short(name)}; it names one file, such as digits8_ddpm")
    below = find_config(name, asked=f"{path}: {BASE}", beside=path.parent)
    chain = (*above, path)
    if any(below.samefile(one) for one in chain):
        raise ConfigError(f"{path}: {BASE} {plain(name)} leads in a circle: {' -> '.join(map(str, (*chain, below)))}")
    return [*read_keys(below, chain), (path, keys)]


def merged(files: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Lay the keys of files over each other, each over those before it, groups key by key."""
    keys: dict[str, Any] = {}
    for _, above in files:
        keys = over(keys, above)
    return keys


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, all through."""
    found = dict(below)
    for key, value in above.items():
        under = below.get(key)
        found[key] = over(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return found


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
        raise ConfigError(f"{path}: cannot be read as YAML: {said(error)}") from error
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


def nearest(name: str, known: list[str]) -> str:
    """Ask ' Did you mean …?', or nothing where nothing is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
