"""Reads the options of guided-diffusion's UNetModel, and of CompVis' and Stability's, from names and shapes.

The decoder says how blocks are grouped into levels where the encoder does not: each level but the last ends in an
upsampling there.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Blocks = dict[int, dict[int, set[str]]]  # block -> place in it -> names of its tensors


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are the names of an openai UNetModel."""
    return all(key in state for key in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"))


def read_openai(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read all options that names and shapes say: all but the number of heads and the order of packed rows."""
    encoder, decoder = _blocks(state, "input_blocks"), _blocks(state, "output_blocks")
    stem, width = state["input_blocks.0.0.weight"], state["time_embed.0.weight"].shape[1]
    levels, kind = _levels(encoder, decoder)
    first = [f"input_blocks.{level[0]}.0" for level in levels]
    widths = [state[f"{name}.in_layers.2.weight"].shape[0] for name in first]
    attends = [[1 in encoder[index] for index in level] for level in levels]
    if any(any(level) != all(level) for level in attends):
        raise ValueError("some blocks of a level have attention, and others do not: give the options by name")
    emb = state[f"{first[0]}.emb_layers.1.weight"].shape[0]
    options: dict[str, Any] = {
        "in_channels": stem.shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "model_channels": width,
        "channel_mult": [one // width if one % width == 0 else one / width for one in widths],
        "num_res_blocks": _one([len(level) for level in levels]),
        "attention_resolutions": [2**index for index, level in enumerate(attends) if any(level)],
        "dims": stem.ndim - 2,
        "use_scale_shift_norm": emb == 2 * widths[0],
        "resblock_updown": kind == "resblock",
        "conv_resample": kind != "plain",
    }
    if "label_emb.weight" in state:
        options["num_classes"] = state["label_emb.weight"].shape[0]
    elif "label_emb.0.0.weight" in state:
        options |= {"num_classes": "sequential", "adm_in_channels": state["label_emb.0.0.weight"].shape[1]}
    if any(".transformer_blocks." in key for key in state):
        options |= _transformers(state, levels, attends)
    return options


def _blocks(state: Mapping[str, Tensor], side: str) -> Blocks:
    found: Blocks = {}
    for key in state:
        match = re.match(rf"{side}\.(\d+)\.(\d+)\.(.+)", key)
        if match:
            found.setdefault(int(match[1]), {}).setdefault(int(match[2]), set()).add(match[3])
    return found


def _levels(encoder: Blocks, decoder: Blocks) -> tuple[list[list[int]], str]:
    """List the encoder's blocks of each level, and name how levels are left."""
    last = max(encoder)
    resamples = {index for index in range(1, last + 1) if "op.weight" in encoder.get(index, {}).get(0, ())}
    kind = "conv"
    if not resamples:
        upsampling = [index for index, block in decoder.items() if _upsamples(block)]
        if upsampling:
            kind = "resblock"
            ends = [-1, *sorted(upsampling), max(decoder)]
            counts = [end - begin - 1 for begin, end in itertools.pairwise(ends)][::-1]
            at = 1
            for count in counts[:-1]:
                at += count
                resamples.add(at)
                at += 1
        else:
            resamples = {index for index in range(1, last) if index not in encoder}
            kind = "plain" if resamples else "conv"
    levels: list[list[int]] = [[]]
    for index in range(1, last + 1):
        if index in resamples:
            levels.append([])
        else:
            levels[-1].append(index)
    if any(
        not level or any("in_layers.2.weight" not in encoder[index].get(0, ()) for index in level) for level in levels
    ):
        raise ValueError("its blocks are not those of a UNetModel: give the options by name")
    return levels, kind


def _upsamples(block: dict[int, set[str]]) -> bool:
    """Say whether a block of the decoder ends in a residual block that upsamples."""
    return any(place > 0 and "in_layers.2.weight" in names for place, names in block.items())


def _transformers(state: Mapping[str, Tensor], levels: list[list[int]], attends: list[list[bool]]) -> dict[str, Any]:
    middle = _depth(state, "middle_block.1")
    depths = [_depth(state, f"input_blocks.{level[0]}.1") if any(on) else 0 for level, on in zip(levels, attends)]  # noqa: B905
    read = [depth for depth in depths if depth]
    rest = middle or (read[-1] if read else 1)  # of a level without attention nothing is read
    depths = [depth or rest for depth in depths]
    some = next(key for key in state if key.endswith(".transformer_blocks.0.attn2.to_k.weight"))
    context = state[some].shape[1]
    prefix = some.partition(".transformer_blocks.")[0]
    options: dict[str, Any] = {
        "use_spatial_transformer": True,
        "legacy": False,
        "context_dim": context,
        "transformer_depth": _one(depths),
        "use_linear_in_transformer": state[f"{prefix}.proj_in.weight"].ndim == 2,
    }
    crossing = [any(on) and _crosses(state, f"input_blocks.{level[0]}.1") for level, on in zip(levels, attends)]  # noqa: B905
    if any(crossing):
        options["disable_self_attentions"] = crossing
    if not middle:
        options["disable_middle_transformer"] = True
    elif middle != depths[-1]:
        options["transformer_depth_middle"] = middle
    if middle and _crosses(state, "middle_block.1"):
        options["disable_middle_self_attn"] = True
    return options


def _depth(state: Mapping[str, Tensor], place: str) -> int:
    found = {key[len(place) :].split(".")[2] for key in state if key.startswith(f"{place}.transformer_blocks.")}
    return len(found)


def _crosses(state: Mapping[str, Tensor], place: str) -> bool:
    """Say whether the first attention reads the context too: its keys are then made of another width."""
    block = f"{place}.transformer_blocks.0"
    return state[f"{block}.attn1.to_k.weight"].shape[1] != state[f"{block}.attn1.to_q.weight"].shape[1]


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
