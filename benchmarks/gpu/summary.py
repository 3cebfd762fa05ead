"""Makes a table of what a folder's units have found: the end of the output, which is what is seen first."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import FAILED, Line, lines

WIDTH = 110


def summary(folder: Path) -> str:
    """Return the table of the last run's device, versions and source."""
    found = lines(folder)
    if not found:
        return f"{folder} holds no results"
    same = [one for one in found if _origin(one) == _origin(found[-1])]
    latest = list({one["unit"]: one for one in same}.values())
    parts = [_heading(found[-1]), _counts(latest), *_failures(latest), *_speed(latest), *_host(latest)]
    parts += [*_shortcuts(latest), *_launches(latest), *_networks(latest)]
    return "\n".join(parts)


def _origin(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in ("device", "torch", "triton", "source"))


def _heading(line: Line) -> str:
    names = ("device", "driver", "torch", "triton", "python", "commit", "source")
    return ", ".join(f"{name} {line[name]}" for name in names if line.get(name))


def _counts(found: Sequence[Line]) -> str:
    """Return a line for each kind of unit: how many came to which end."""
    kinds = {one["kind"]: Counter[str]() for one in found}
    for one in found:
        kinds[one["kind"]][one["status"]] += 1
    rows = (f"  {kind:18}" + "  ".join(f"{count} {status}" for status, count in c.items()) for kind, c in kinds.items())
    return "\n".join(["units:", *rows])


def _failures(found: Sequence[Line]) -> list[str]:
    """Return a line for each unit that was wrong or failed, and one for each reason to leave units out."""
    bad = [one for one in found if one["status"] in ("wrong", *FAILED)]
    rows = [f"  {one['status']:6} {one['unit']}: {_words(one)}"[:WIDTH] for one in bad]
    left = Counter(
        (one["kind"], one["status"], one["reason"]) for one in found if one["status"] in ("absent", "skipped")
    )
    rows += [f"  {status:6} {count} × {kind}: {reason}"[:WIDTH] for (kind, status, reason), count in left.items()]
    return ["wrong, failed, left out:", *rows] if rows else ["nothing wrong, nothing failed, nothing left out"]


def _words(line: Line) -> str:
    faults = (line.get("data") or {}).get("faults") or []
    return line.get("reason") or "; ".join(map(str, faults))


def _rows(found: Sequence[Line]) -> list[Line]:
    """Merge the rows of all units: what eager took in one, compiled in another."""
    merged: dict[tuple[Any, ...], Line] = {}
    for one in found:
        for row in (one.get("data") or {}).get("rows", []):
            key = (*row["shape"], row["dtype"], row["layout"], row["extras"], row["pass"], row["clusters"])
            merged[key] = {**row, **merged.get(key, {})}
    return list(merged.values())


def _speed(found: Sequence[Line]) -> list[str]:
    rows = [row for row in _rows(found) if "ours_us" in row]
    if not rows:
        return []
    parts = ["µs of the device: limit, ours, eager, compiled; the share of the copy's bandwidth by the limit's bytes"]
    for row in rows:
        limit = row["bytes"] / row["copy_bandwidth"] * 1e6
        times = "".join(f"{row[f'{name}_us']:9.1f}" if f"{name}_us" in row else "        –" for name in PEERS)
        words = ("x".join(map(str, row["shape"])), row["dtype"], row["layout"], row["extras"], row["pass"])
        cluster = " cluster" if row["clusters"] else ""
        parts.append(f"  {' '.join(words) + cluster:58}{limit:8.1f}{times}{100 * limit / row['ours_us']:6.0f} %")
    plain = [row for row in rows if not row["clusters"] and row["extras"] == "none" and row["dtype"] == "bfloat16"]
    for peer in PEERS[1:]:
        ratios = [row[f"{peer}_us"] / row["ours_us"] for row in plain if f"{peer}_us" in row]
        if ratios:
            slower = sum(ratio < 1 for ratio in ratios)
            parts.append(
                f"  {peer}: {statistics.median(ratios):.2f} × ours in the median; faster in {slower} of {len(ratios)}"
            )
    return parts


PEERS = ("ours", "eager", "compiled")


def _host(found: Sequence[Line]) -> list[str]:
    some = [one for one in found if one["kind"] == "host" and "data" in one]
    parts = ["µs of the host: ours, eager"] if some else []
    for one in some:
        data = one["data"]
        figures = (f"{name} {data[f'{name}_ours_us']:.1f}, {data[f'{name}_eager_us']:.1f}" for name in HOST_CALLS)
        parts.append(f"  {one['unit']:44}" + "; ".join(figures))
    return parts


HOST_CALLS = ("inference", "recorded", "backward")


def _shortcuts(found: Sequence[Line]) -> list[str]:
    some = [one for one in found if one["kind"] == "shortcut" and "kernel_us" in one.get("data", {})]
    if not some:
        return []
    parts = ["µs of a backward pass with a shortcut's gradient: added in the kernel, added by autograd"]
    for one in some:
        parts.append(f"  {one['unit']:44}{one['data']['kernel_us']:9.1f}{one['data']['autograd_us']:9.1f}")
    ratio = statistics.median(one["data"]["kernel_us"] / one["data"]["autograd_us"] for one in some)
    verdict = "keep it" if ratio < 1 else "have unetgn.nn.norm.with_shortcut return norm(x), x"
    return [*parts, f"  in the kernel {ratio:.2f} of the time in the median: {verdict}"]


def _launches(found: Sequence[Line]) -> list[str]:
    some = [one for one in found if one["kind"] == "launch" and "data" in one]
    parts = ["µs of a plan, and of its launches alone"] if some else []
    for one in some:
        alone = ", ".join(f"{part['us']:.1f}" for part in one["data"]["launches"])
        parts.append(f"  {one['unit']:72}{one['data']['us']:8.1f}  {alone}")
    return parts


def _networks(found: Sequence[Line]) -> list[str]:
    some = [one for one in found if one["kind"].startswith("network") and "data" in one]
    parts = ["ms of a step of forward and backward; of the host alone"] if some else []
    return parts + [
        f"  {one['unit']:58}{one['data']['step_ms']:9.2f}{one['data']['host_step_ms']:9.2f}" for one in some
    ]
