"""Values are read as they were meant, whichever way they are written; a key that does not exist names one."""

import types
import typing
from pathlib import Path

import pytest
import yaml

from unetgn.training.config_files import known_keys, load_config
from unetgn.training.hints import ELSEWHERE, KEY_OF, nearest_key
from unetgn.training.values import as_meant

KEYS = {name: key.kind for name, key in known_keys().items() if not key.group}


def kinds(kind: typing.Any) -> list[typing.Any]:
    """List the types of a union, or the one that it is."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [part for part in typing.get_args(kind) if part is not type(None)] if union else [kind]


def spellings(kind: typing.Any) -> list[tuple[str, object]]:
    """List ways to write values of a type, and what they mean; the more specific of several types counts."""
    found: list[tuple[str, object]] = []
    parts = kinds(kind)
    if type(None) in typing.get_args(kind):
        found += [(text, None) for text in ("none", "None", "null", "NULL", "~")]
    if bool in parts:
        found += [(text, True) for text in ("true", "True", "TRUE", "yes", "on", "1")]
        found += [(text, False) for text in ("false", "False", "no", "Off", "0")]
    if int in parts:
        found += [("1e3", 1000), ("1_000", 1000), ("1000.0", 1000), ("2E1", 20), (" 7 ", 7)]
    if float in parts:
        found += [("1e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("1_0.5", 10.5)]
    for part in parts:
        if typing.get_origin(part) is tuple:
            inner = typing.get_args(part)[0]
            if inner is int or inner is float:
                for text in ("32,64", "(32,64)", "[32,64]", "(32, 64)", "32, 64,", "(32, 6.4e1)", " [ 3.2e1,64 ] "):
                    found.append((text, [32, 64]))
                found += [("()", []), ("[]", []), ("(8,)", [8])]
            if inner is str:
                found += [("a", ["a"]), ("a,b", ["a", "b"]), ("[a, b]", ["a", "b"]), ("()", [])]
            if typing.get_origin(inner) is tuple:
                found += [("((0,),())", [[0], []]), ("[[0], []]", [[0], []]), ("(0,),(1,2)", [[0], [1, 2]])]
    return found


FOUND = {(str(kind), text): (kind, text, meant) for kind in KEYS.values() for text, meant in spellings(kind)}
CASES = [FOUND[name] for name in sorted(FOUND)]


@pytest.mark.parametrize(("kind", "text", "meant"), CASES, ids=[f"{kind}-{text}" for kind, text, _ in CASES])
def test_every_spelling_of_a_value_means_the_same(kind: object, text: str, meant: object) -> None:
    assert as_meant(kind, text) == meant
    assert type(as_meant(kind, text)) is type(meant)
    assert as_meant(kind, as_meant(kind, text)) == meant


def test_every_kind_of_key_is_tried() -> None:
    tried = {str(kind) for kind, _, _ in CASES}
    left = {str(kind) for kind in KEYS.values()} - tried
    assert all("str" in kind or "Literal" in kind for kind in left), left


@pytest.mark.parametrize(
    ("key", "text"),
    [("train.steps", "1e5"), ("train.steps", "1_000"), ("model.channels", "32,64"), ("model.channels", "(32,64)"),
     ("train.compile", "True"), ("train.processes", "None"), ("train.betas", "0.9,0.95"), ("checkpoint.every", "1e2"),
     ("train.trackers", "tensorboard"), ("model.depth", "1,2"), ("data.path", "none"), ("train.learning_rate", "1e-3")],
)  # fmt: skip
def test_a_file_and_a_command_line_are_read_alike(key: str, text: str, tmp_path: Path) -> None:
    group, _, name = key.partition(".")
    keys: dict = {"model": {"in_channels": 1, "out_channels": 1, "channels": [8, 16]}}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(keys))
    keys.setdefault(group, {})[name] = text
    (tmp_path / "with.yaml").write_text(yaml.safe_dump(keys))
    told = load_config(tmp_path / "plain.yaml", [f"{key}={text}"])
    assert load_config(tmp_path / "with.yaml") == told
    found = getattr(getattr(told, group), name)
    meant = as_meant(KEYS[key], text)
    assert found == (tuple(meant) if isinstance(meant, list) else meant)


@pytest.mark.parametrize("text", ["1.5", "many", "1e", "1,000", "[1]", "true"])
def test_what_means_no_number_stays_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("model: {in_channels: 1, out_channels: 1}\n")
    with pytest.raises(ValueError, match=r"train\.steps"):
        load_config(tmp_path / "plain.yaml", [f"train.steps={text}"])


def test_a_text_is_what_it_is() -> None:
    for text in ("1e5", "a,b", "(x)", "yes", "007"):
        assert as_meant(KEYS["data.path"], text) == text
        assert as_meant(KEYS["data.image_column"], text) == text
    assert as_meant(KEYS["train.mixed_precision"], "no") == "no"


def test_names_of_other_projects_lead_to_keys_that_there_are() -> None:
    assert set(ELSEWHERE) <= set(KEYS)
    every = [alias for aliases in ELSEWHERE.values() for alias in aliases.split()]
    assert sorted(set(every)) == sorted(every), "an alias stands for two keys"


@pytest.mark.parametrize("prefix", ["", "train.", "data.", "model.", "training."])
def test_a_name_of_another_project_is_understood_in_any_group(prefix: str) -> None:
    known, names = list(known_keys()), {key.rpartition(".")[2] for key in known_keys()}
    wrong = {alias: nearest_key(prefix + alias, known) for alias in KEY_OF if alias not in names}
    assert {alias: key for alias, key in wrong.items() if key != KEY_OF[alias]} == {}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_slip_of_the_pen_is_understood(key: str) -> None:
    group, dot, name = key.rpartition(".")
    known = list(known_keys())
    slip = f"{group}{dot}{name[:-2]}{name[-1]}{name[-2]}" if name[-1] != name[-2] else f"{key}s"
    if slip not in known and len(name) > 4:
        assert nearest_key(slip, known) == key
