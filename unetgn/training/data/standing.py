"""Reads and writes what a checkpoint knows of the samples: where each reader stood, or which images there were."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from unetgn.training.data.images import DIGITS, count_parts
from unetgn.training.data.mixing import Standing

SAMPLES = "samples.json"  # in a checkpoint
LIMIT = 2**22  # bytes: of each reader a number for each shard, of images 2^16 digests

RankState = dict[str, Any]


def to_json(standings: list[Standing]) -> RankState:
    """Return what is written of a rank whose loader has these readers."""
    return {"readers": [{**asdict(standing), "finished": list(standing.finished)} for standing in standings]}


def standings_of(state: RankState) -> list[Standing]:
    """Return the readers of a rank, by what was written and checked."""
    return [Standing(**{**reader, "finished": tuple(reader["finished"])}) for reader in state.get("readers", [])]


def check_states(keys: dict[str, Any]) -> list[RankState]:
    """Return the states of all ranks that a file holds. Raises ValueError where they are no such states."""
    ranks = keys.get("ranks")
    known = isinstance(ranks, list) and ranks and all(is_state(state) or is_older(state) for state in ranks)
    if keys.keys() != {"ranks"} or not isinstance(ranks, list) or not known:
        raise ValueError("it is not as it was written")
    return [{**state, "parts": ""} if is_older(state) else state for state in ranks]


def is_state(state: object) -> bool:
    """Return True for the state of a rank: {}, {"readers": …} or {"images": …, "parts": …}."""
    if state == {}:
        return True
    if isinstance(state, dict) and state.keys() == {"readers"}:
        return isinstance(state["readers"], list) and bool(state["readers"]) and all(map(is_standing, state["readers"]))
    if isinstance(state, dict) and state.keys() == {"images", "parts"}:
        count, parts = state["images"], state["parts"]
        return is_count(count) and isinstance(parts, str) and len(parts) == DIGITS * count_parts(count)
    return False


def is_older(state: object) -> bool:
    """Return True for a state of images as it was written before: with a list of digests, of many images each."""
    parts = state.get("parts") if isinstance(state, dict) and state.keys() == {"images", "parts"} else None
    return isinstance(parts, list) and len(parts) == 256 and all(isinstance(part, str) for part in parts)


def is_standing(value: object) -> bool:
    """Return True for the keys of a Standing."""
    if not isinstance(value, dict) or value.keys() != {"begun", "number", "taken", "finished"}:
        return False
    finished = value["finished"]
    return isinstance(finished, list) and all(
        map(is_count, [value["begun"], value["number"], value["taken"], *finished])
    )


def is_count(value: object) -> bool:
    """Return True for an integer from 0 to what a float counts exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
