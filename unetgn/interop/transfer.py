"""Fills a U-Net of ours from a foreign state dict: every key is accounted for, or nothing is loaded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unetgn.messages import plain, short
from unetgn.unet import UNet

LISTED = 12  # keys of each kind that an error message spells out


@dataclass(frozen=True)
class Source:
    """Says where one of our tensors comes from: a foreign key, and what is done to its tensor."""

    key: str
    transform: Callable[[Tensor], Tensor] | None = None

    def read(self, tensor: Tensor) -> Tensor:
        return tensor if self.transform is None else self.transform(tensor)


@dataclass(frozen=True)
class Names:
    """Holds a family's names for a U-Net: `sources` has one for each of our keys.

    `constants` are foreign keys whose values follow from the configuration: filter taps. `own` are our keys of that
    kind, with their values.
    """

    sources: Mapping[str, Source]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)


def fill(unet: UNet, names: Names, state_dict: Mapping[str, Tensor], *, copy: bool) -> UNet:
    """Fill `unet` (on the meta device) with the tensors of a foreign state dict, and set evaluation mode.

    All tensors get the widest dtype among them. With `copy` nothing is shared with the state dict.
    Raises ValueError, listing the keys, where keys are missing, left over, of another shape or no floating-point
    numbers, or constants differ.
    """
    for is_so, what, advice in weight_faults(state_dict):
        if is_so:
            raise ValueError(f"the checkpoint {what}: {advice}")
    expected = unet.state_dict()
    _check_keys(names, expected, state_dict)
    _check_numbers(state_dict)
    _check_constants(names, state_dict)
    dtype = _widest_dtype(state_dict)
    loaded, misshapen = {}, []
    for ours, like in expected.items():
        if ours in names.own:
            tensor = names.own[ours].to(next(iter(state_dict.values())).device)
        else:
            source = names.sources[ours]
            try:
                tensor = source.read(state_dict[source.key])
            except RuntimeError:  # the transformation could not reshape it
                tensor = state_dict[source.key]
            if tensor.shape != like.shape:
                given = tuple(state_dict[source.key].shape)
                misshapen.append(f"{source.key} {given}, which as {ours} should give {tuple(like.shape)}")
                continue
            tensor = tensor.clone(memory_format=torch.contiguous_format) if copy or source.transform else tensor
        loaded[ours] = tensor.to(dtype)
    if misshapen:
        raise ValueError(f"{len(misshapen)} keys have another shape than the configuration says: {_some(misshapen)}")
    unet.load_state_dict(loaded, assign=True)
    return unet.eval()


def weight_faults(tensors: Mapping[str, Tensor]) -> Iterator[tuple[bool, str, str]]:
    """Yield whether tensors cannot be copied as they are, what they then are, and what to do first.

    All of them on the meta device stand for names and shapes.
    """
    classes = {type(tensor).__name__ for tensor in tensors.values() if type(tensor) not in (Tensor, nn.Parameter)}
    before = "convert the weights as they were before they were quantized, sharded or wrapped"
    yield bool(classes), f"has weights of the class {', '.join(sorted(classes))}", before
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    meta = [key for key, tensor in tensors.items() if tensor.is_meta]
    partly = len(devices) > 1 and bool(meta)
    yield partly, f"has {_some(meta)} on the meta device", "load all of its weights first, without offloading"
    yield (
        len(devices) > 1,
        f"has weights on {', '.join(devices)}",
        "move all of them to one device first, with .to(device)",
    )
    small = {str(t.dtype) for t in tensors.values() if t.is_floating_point() and t.itemsize == 1}
    yield (
        bool(small),
        f"has weights in {', '.join(sorted(small))}",
        "turn them into a wider dtype, with .to(torch.bfloat16)",
    )


def _check_keys(names: Names, expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    unnamed = set(expected) - set(names.sources) - set(names.own)
    assert not unnamed, f"the family's table has no name for {sorted(unnamed)}"
    wanted = {source.key for ours, source in names.sources.items() if ours in expected} | set(names.constants)
    missing = [key for key in sorted(wanted) if key not in state_dict]
    unexpected = sorted(set(state_dict) - wanted)
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind}: {_some(keys)}"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ValueError(f"the checkpoint's keys are not those of its configuration; {'; '.join(parts)}")


def _check_constants(names: Names, state_dict: Mapping[str, Tensor]) -> None:
    for key, value in names.constants.items():
        given = state_dict[key]
        if given.shape != value.shape:
            said = f"has shape {tuple(given.shape)}, but the configuration's filter taps make it {tuple(value.shape)}"
            raise ValueError(f"{key} {said}")
        if not (given.is_meta or torch.allclose(given.cpu().float(), value, atol=1e-3)):
            raise ValueError(f"{key} is {given.tolist()}, but the configuration's filter taps make it {value.tolist()}")


def _check_numbers(state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError where tensors hold whole or complex numbers: no family of networks has any."""
    others = [f"{key} ({tensor.dtype})" for key, tensor in state_dict.items() if not tensor.is_floating_point()]
    if others:
        raise ValueError(
            f"the checkpoint has {len(others)} weights of a dtype that weights do not have: {_some(others)}; convert "
            "them as they were before they were quantized or damaged"
        )


def _widest_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _some(items: list[str]) -> str:
    rest = len(items) - LISTED
    return ", ".join(plain(item, most=300) for item in items[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def check_heads(family: str, option: str, value: int, widths: Iterable[int]) -> None:
    """Raise ValueError where a number of heads, or their width, does not divide a width at which there is attention.

    Several originals then take attention that is narrower than its layer, without a word.
    """
    for width in widths:
        if value < 1 or width % value:
            raise ValueError(
                f"{family}: {option}={value} does not divide {width} channels; attention that is narrower than its "
                "layer is not supported"
            )


def check_lengths(family: str, options: Any, names: Iterable[str], *, like: str) -> None:
    """Raise ValueError where an option with an entry for each level has another number of entries than `like` has."""
    levels = len(getattr(options, like))
    for name in names:
        given = getattr(options, name)
        if isinstance(given, tuple) and len(given) != levels:
            raise ValueError(
                f"{family}: {name}={list(given)} has {len(given)} entries, but {like} names {levels} levels, which "
                "need one each"
            )


def refuse(family: str, options: Any, reason: str, **supported: tuple[Any, ...]) -> None:
    """Raise ValueError where an option of the original constructor has a value that is not among the supported ones."""
    for name, values in supported.items():
        given = getattr(options, name)
        if given not in values:
            choices = " or ".join(repr(value) for value in values)
            raise ValueError(f"{family}: {name}={short(given)} is not supported ({reason}); only {choices} is")
