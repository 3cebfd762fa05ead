"""Turns frozen dataclasses into plain dicts and back, for JSON: strict about names and kinds of values.

Files are read by frameworks and users too, who write keys of their own into them: `split` puts these aside.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from unetgn.messages import plain, short

Config = TypeVar("Config")
HINTED, LONGEST = 30, 100  # keys that are no fields: so many get a hint, of so many characters: it takes a while


def to_plain(config: Any) -> Any:
    """Turn nested dataclasses into dicts and tuples into lists: what JSON can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_plain(item) for item in config]
    return config


def from_plain(kind: type[Config], values: Mapping[str, Any], path: str = "") -> Config:
    """Make a dataclass of `kind` from a dict; what is left out has the field's default.

    Raises ValueError where a key is no field (naming it, where it is, and the nearest field), and TypeError where a
    value is not of the field's type. `path` is the place of the dict in a larger one, for messages.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{path or kind.__name__} must be a mapping of the fields of {kind.__name__}, got {short(values)}"
        )
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        place = f"{path}.{key}" if path else key
        if key not in hints:
            advice = f"; {_near(key, hints)}" if _near(key, hints) else f"; it has {', '.join(hints)}"
            raise ValueError(f"{short(place)} is not a field of {kind.__name__}{advice}")
        arguments[key] = _convert(hints[key], value, place)
    required = [field.name for field in dataclasses.fields(kind) if _is_required(field)]  # type: ignore[arg-type]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ValueError(f"{path or kind.__name__} needs {', '.join(missing)}")
    return kind(**arguments)


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds the keys of a dict that are fields of a dataclass, and the others, both nested as they were.

    `names` has the others by their places, each with the nearest field in brackets.
    """

    known: dict[str, Any]
    others: dict[str, Any]
    names: tuple[str, ...]


def split(kind: type, values: Mapping[str, Any], path: str = "") -> Split:
    """Split a dict into what `from_plain` takes for a dataclass of `kind` and what somebody else wrote into it."""
    hints = typing.get_type_hints(kind)
    known, others = {}, {}
    names: list[str] = []
    for key, value in values.items():
        place = f"{path}.{key}" if path else key
        nested = _nested(hints[key]) if key in hints else None
        if key not in hints:
            others[key] = value
            near = _near(key, hints) if len(names) < HINTED else ""
            names.append(f"{place[:LONGEST]!r} ({near})" if near else repr(place[:LONGEST]))
        elif nested is not None and isinstance(value, Mapping):
            inner = split(nested, value, place)
            known[key] = inner.known
            others |= {key: inner.others} if inner.others else {}
            names += inner.names
        else:
            known[key] = value
    return Split(known, others, tuple(names))


def _nested(hint: Any) -> type | None:
    """Return the dataclass that a field holds, if it can hold one."""
    options = (hint, *typing.get_args(hint))
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _near(key: str, names: Iterable[str]) -> str:
    near = get_close_matches(key[:LONGEST], names, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def check_types(config: Any) -> None:
    """Raise TypeError, naming the field, where a value of a dataclass is not of its field's type.

    Nested dataclasses must be instances, whose own values are not looked at.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, Mapping):
            raise TypeError(f"{name}={short(value)} is not {_spoken(hint)}; from_dict takes nested dicts")
        _convert(hint, value, name)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, place: str) -> Any:
    """Convert `value` to the type `hint`: a plain type, a dataclass, a tuple, a Literal or a union of these."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return _convert(option, value, place)
            except TypeError:
                continue
        if any(dataclasses.is_dataclass(option) for option in options) and isinstance(value, Mapping):
            nested = next(option for option in options if dataclasses.is_dataclass(option))
            return _convert(nested, value, place)  # its own message says more than ours
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(options[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    elif origin is typing.Literal and value in options:
        return value
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_plain(hint, value, place)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError(f"{plain(place)} is an integer beyond all floats") from None
    elif (
        isinstance(hint, type)
        and not origin
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    raise TypeError(f"{plain(place)}={short(value)} is not {_spoken(hint)}")


def _spoken(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
