"""Damages files: flips, cuts, enlarges, nests, retypes, swaps, repeats keys, and puts something else in their place."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save

Bytes = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, draw: random.Random) -> bytes:
    """Flip a bit."""
    return with_bit(data, draw.randrange(8 * len(data))) if data else b"\x01"


def with_bit(data: bytes, bit: int) -> bytes:
    """Flip this bit."""
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def blot(data: bytes, draw: random.Random) -> bytes:
    """Put zeros, ones or noise in the place of up to 4 KiB, as a bad block of a disk does."""
    start, length = draw.randrange(len(data) + 1), draw.randrange(1, 4096)
    blotted = {"zeros": b"\0" * length, "ones": b"\xff" * length, "noise": draw.randbytes(length)}
    return data[:start] + draw.choice(list(blotted.values()))[: len(data) - start] + data[start + length :]


def enlarge(data: bytes, draw: random.Random) -> bytes:
    """Repeat a part, or add a mebibyte of blanks, zeros or brackets at any place."""
    start = draw.randrange(len(data) + 1)
    more = draw.choice((data[start : start + draw.randrange(1, 4096)], b" " * 2**20, b"\0" * 2**20, b"[" * 2**20))
    return data[:start] + more + data[start:]


BYTES: dict[str, Bytes] = {
    "flip": flip,
    "flip near the beginning": lambda data, draw: (
        with_bit(data, draw.randrange(8 * min(64, len(data) or 1))) if data else b"\x01"
    ),
    "cut": lambda data, draw: data[: draw.randrange(len(data) + 1)],
    "cut the beginning": lambda data, draw: data[draw.randrange(len(data) + 1) :],
    "blot": blot,
    "enlarge": enlarge,
    "empty": lambda data, draw: b"",
    "noise": lambda data, draw: draw.randbytes(draw.randrange(1, 4096)),
}

# What JSON's writer would not write, by what stands for it.
RAW = {
    "@1e999@": "1e999",
    "@-1e999@": "-1e999",
    "@NaN@": "NaN",
    "@digits@": "9" * 5000,
    "@deep list@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@surrogate@": '"\\ud800"',
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-300, 10**6, 10**9, 2**31, 2**53, 2**63, 2**64, 10**30,
    "", "7", "x", "null", "x" * 100_000, "a\0b", "../../../etc/passwd", "/dev/zero", "http://127.0.0.1:9/x", "é×∑",
    [], {}, [[]], [{}], [None],
    {"a": {"b": {"c": []}}}, [0] * 1000, [1, 2, 3], [10**9] * 3, [-1], ["a"], {"step": 1}, *RAW,
)  # fmt: skip


def retype(tree: Any, draw: random.Random) -> Any:
    """Put a value of any kind in the place of one, or of the whole."""
    place = draw.choice(places(tree))
    return replaced(tree, place, draw.choice(VALUES))


def nest(tree: Any, draw: random.Random) -> Any:
    """Wrap a value in a list or an object, once or a thousand times."""
    place = draw.choice(places(tree))
    value = value_at(tree, place)
    for _ in range(draw.choice((1, 2, 200))):
        value = draw.choice(([value], {"a": value}))
    return replaced(tree, place, value)


def rearrange(tree: Any, draw: random.Random) -> Any:
    """Drop a key, rename one, add one, or exchange the values of two."""
    objects = [place for place in places(tree) if isinstance(value_at(tree, place), dict) and value_at(tree, place)]
    if not objects:
        return {}
    place = draw.choice(objects)
    keys = dict(value_at(tree, place))
    one, other = draw.choice(list(keys)), draw.choice(list(keys))
    how = draw.choice(("drop", "rename", "add", "exchange"))
    if how in ("drop", "rename"):
        value = keys.pop(one)
        if how == "rename":
            keys[draw.choice((f"{one}s", one.upper(), "", "a" * 10_000, "__class__", "_class_name"))] = value
    elif how == "add":
        keys[draw.choice(("more", "__init__", "step", "_name_or_path", "dtype"))] = draw.choice(VALUES)
    else:
        keys[one], keys[other] = keys[other], keys[one]
    return replaced(tree, place, keys)


TREES = {"retype": retype, "nest": nest, "rearrange": rearrange}


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the places in a tree of lists and objects, the whole first; of long lists the first few."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:5]) if isinstance(tree, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def value_at(tree: Any, place: tuple[Any, ...]) -> Any:
    """Return the value at a place."""
    for key in place:
        tree = tree[key]
    return tree


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return the tree with another value at a place."""
    if not place:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[place[0]] = replaced(tree[place[0]], place[1:], value)
    return copied


def to_json(tree: Any) -> str:
    """Write a tree, with what JSON's own writer would not write."""
    text = json.dumps(tree, indent=1)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def damage_json(text: str, draw: random.Random) -> str:
    """Damage JSON so that it still is JSON, mostly."""
    tree = json.loads(text)
    how = draw.choice((*TREES, "repeat a key"))
    if how == "repeat a key" and isinstance(tree, dict) and tree:
        key = draw.choice(list(tree))
        return to_json(tree).replace("{", f"{{{json.dumps(key)}: {to_json(draw.choice(VALUES))}, ", 1)
    return to_json(TREES.get(how, retype)(tree, draw))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TAGS = ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary aGk=", "!!set {a, b}",
        "&a [*a]", "2001-01-01", "1:30:00", "0o17", "*nothing", "!x y", "? [a]\n: b", "|\n  text")  # fmt: skip


def damage_yaml(text: str, draw: random.Random) -> str:
    """Damage YAML so that it still is YAML, mostly."""
    how = draw.choice((*TREES, "bomb", "tag", "repeat a key"))
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    if how == "bomb":  # as keys of its own, or in the place of a value
        lines[number] = draw.choice((lines[number], f"{lines[number].partition(':')[0]}: *i"))
        return "\n".join([BOMB, *lines])
    if how == "tag":
        lines[number] = f"{lines[number].partition(':')[0]}: {draw.choice(TAGS)}"
        return "\n".join(lines)
    if how == "repeat a key":
        return "\n".join([*lines, lines[number]])
    tree = TREES[how](yaml.safe_load(text), draw)
    return to_json(tree)  # which is YAML as well


def damage_header(data: bytes, draw: random.Random) -> bytes:
    """Damage the header of a safetensors file: its length, or the JSON in it."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        wrong = draw.choice((0, 1, 7, length - 1, length + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    header = damage_json(data[8 : 8 + length].decode(), draw).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_tensors(data: bytes, draw: random.Random) -> bytes:
    """Change tensors of a safetensors file: their shapes, types, names, numbers."""
    tensors = load(data)
    if not tensors:
        return data
    name, other = draw.choice(list(tensors)), draw.choice(list(tensors))
    tensor = tensors[name]
    if tensor.is_floating_point() and tensor.numel() and draw.random() < 0.3:
        tensor.flatten()[draw.randrange(tensor.numel())] = draw.choice((float("nan"), float("inf"), -1.0, 1e38))
        return save(tensors)
    changed: dict[str, Callable[[], object]] = {
        "drop": lambda: tensors.pop(name),
        "add": lambda: tensors.update(more=torch.zeros(draw.choice((0, 1, 7)))),
        "rename": lambda: tensors.update({draw.choice(("", "../x", f"{name}.", name.upper())): tensors.pop(name)}),
        "exchange": lambda: tensors.update({name: tensors[other].clone(), other: tensor}),
        "flatten": lambda: tensors.update({name: tensor.flatten()}),
        "one more axis": lambda: tensors.update({name: tensor[None].contiguous()}),
        "a scalar": lambda: tensors.update({name: torch.zeros((), dtype=tensor.dtype)}),
        "one number": lambda: tensors.update({name: torch.zeros(1, dtype=tensor.dtype)}),
        "no number": lambda: tensors.update({name: tensor.flatten()[:0].clone()}),
        "twice as large": lambda: tensors.update({name: torch.cat([tensor.flatten()] * 2)}),
        "type": lambda: tensors.update(
            {name: tensor.to(draw.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)))}
        ),
        "nothing": tensors.clear,
    }
    draw.choice(list(changed.values()))()
    return save(tensors)


HEADERS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "checksum": (148, 156), "type": (156, 157),
           "linkname": (157, 257), "magic": (257, 265), "prefix": (345, 500), "sparse": (386, 500)}  # fmt: skip
TYPES = b"01234567xgLKSVX\0MND"


def damage_tar(data: bytes, draw: random.Random) -> bytes:
    """Change, repeat or add a header of an archive, and make its checksum right: sizes, types, names, pax records."""
    if len(data) < 2048 or data[:2] == b"\x1f\x8b":
        return flip(data, draw)
    place = 512 * draw.randrange(len(data) // 512 - 1)
    header = bytearray(data[place : place + 512])
    field = draw.choice(("size", "size", "type", "type", *HEADERS))
    start, end = HEADERS[field]
    values = {
        "size": draw.choice((b"7" * 11 + b"\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000001000\0", b"zzz",
                             b"%011o\0" % 2**30, b"%011o\0" % draw.randrange(5000), b"\xff" * 10 + b"\xfc\0")),
        "type": bytes([draw.choice(TYPES)]),
        "name": draw.choice((b"../../../a.png\0", b"a\nb.png\0", b".png\0", b"\xff" * 100, b"/dev/zero\0", b"\0")),
    }  # fmt: skip
    header[start:end] = values.get(field, draw.randbytes(end - start))[: end - start].ljust(end - start, b"\0")
    if field != "checksum":
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    how = draw.choice(("in its place", "in its place", "one more", "a thousand more"))
    if how == "in its place":
        return data[:place] + bytes(header) + data[place + 512 :]
    more = bytes(header) * (1 if how == "one more" else 1000)
    pax = draw.choice((b"", b"30 GNU.sparse.realsize=9999999\n", b"1" * draw.randrange(600), b"20 size=-99999999999\n"))
    return data[:place] + more + pax.ljust(-(-len(pax) // 512) * 512, b"\0") + data[place:]


def often(name: str, way: Bytes) -> dict[str, Bytes]:
    """List a way of damage several times, so that it is drawn as often."""
    return {name + " " * number: way for number in range(4)}


def damage_file(file: Path, draw: random.Random) -> str:
    """Damage what is in a file, as its ending allows. Returns how."""
    data = file.read_bytes()
    ways: dict[str, Bytes] = dict(BYTES)
    if file.suffix == ".json":
        ways |= dict.fromkeys(
            ("JSON", "JSON ", "JSON  ", "JSON   "), lambda data, draw: damage_json(data.decode(), draw).encode()
        )
    elif file.suffix == ".yaml":
        ways |= often("YAML", lambda data, draw: damage_yaml(data.decode(), draw).encode())
    elif file.suffix == ".safetensors":
        ways |= {
            "header": damage_header,
            "tensors": damage_tensors,
            "header ": damage_header,
            "tensors ": damage_tensors,
        }
    elif file.suffix == ".tar":
        ways |= often("header of an entry", damage_tar)
    how = draw.choice(list(ways))
    file.write_bytes(ways[how](data, draw))
    return how.strip()


def replace(file: Path, others: list[Path], draw: random.Random) -> str:
    """Put something else in the place of a file. Returns what."""
    other = draw.choice(others)
    how = draw.choice(("missing", "pipe", "folder", "link to nothing", "link to itself", "link to zeros", "swap",
                       "more", "link away"))  # fmt: skip
    if how == "swap":
        spare = file.with_name(f"{file.name}.spare")
        file.rename(spare)
        if other != file:
            shutil.copyfile(other, file)
            shutil.copyfile(spare, other)
            spare.unlink()
        return f"swap with {other.name}"
    if how == "more":
        beside = file.with_name(
            draw.choice((f".tmp-1-{file.name}", f"{file.name}.bak", "x.safetensors", "0.json", "pickle.bin"))
        )
        beside.write_bytes(draw.randbytes(100))
        return f"{beside.name} beside it"
    if how == "link away":
        away = file.parent.parent / f"{file.name}.elsewhere"
        file.rename(away)
        file.symlink_to(away)
        return how
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how != "missing":
        file.symlink_to({"link to nothing": "nowhere", "link to itself": file.name, "link to zeros": "/dev/zero"}[how])
    return how


def attack_folder(folder: Path, draw: random.Random, names: tuple[str, ...] = ("**/*",)) -> str:
    """Damage or replace one of the files below a folder that the patterns mean. Returns which, and how."""
    every = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    file = draw.choice(every)
    how = replace(file, every, draw) if draw.random() < 0.15 else damage_file(file, draw)
    return f"{file.relative_to(folder)}: {how}"
