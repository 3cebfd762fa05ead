"""Attack the product, and print how it held: python -m tests.attacks --seconds 600 --seed 0

Each attack is named by a kind, a seed and a number, and `--kind KIND --seed SEED --number N` repeats it alone. The exit
code is 1 where something was lost, wrong or hung.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

from tests.attacks import calls, files, runs
from tests.attacks.judge import BAD, Count, Kind, judge

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*files.KINDS, *calls.KINDS, *runs.KINDS)}
IN_A_ROW = 2.0  # seconds of attacks of one kind, before the next has its turn


def attack(kinds: list[Kind], seed: int, seconds: float, counts: dict[str, Count], *, most: int | None = None) -> None:
    """Make attacks of all kinds in turn, numbered from 0, until the time is over or each kind has had `most`."""
    end = time.monotonic() + seconds
    left, said = list(kinds), Counter[str]()
    while left and time.monotonic() < end:
        kind = min(left, key=lambda kind: counts[kind.name].seconds / kind.share)
        count = counts[kind.name]
        began, first = time.monotonic(), count.tried
        many = 1 if not kind.in_child else max(1, min(200, int(IN_A_ROW * (count.tried + 0.2) / (count.seconds + 0.1))))
        numbers = range(first, first + many if most is None else min(most, first + many))
        for number, verdict in judge(kind, seed, numbers):
            count.add(kind.name, seed, number, verdict)
            for fault in count.faults[said[kind.name] :]:
                print(f"{fault['outcome']}: {fault['said']}\n  {fault['again']}", flush=True)
            said[kind.name] = len(count.faults)
        count.seconds += time.monotonic() - began
        if most is not None and count.tried >= most:
            left.remove(kind)


def table(counts: dict[str, Count]) -> str:
    """Write the figures as a table, with the sum of all kinds."""
    names = ("tried", "survived", "refused", *BAD)
    rows = [(name, [count.tried, *count.outcomes.values()]) for name, count in counts.items() if count.tried]
    rows.append(("all", [sum(column) for column in zip(*(figures for _, figures in rows), strict=True)]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}" + "".join(f"{name:>9}" for name in names)]
    lines += [f"{name:{width}}" + "".join(f"{figure:9}" for figure in figures) for name, figures in rows]
    return "\n".join(lines)


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="tests.attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="a kind, or all whose name contains this (default: all)")
    parser.add_argument("--number", type=int, help="make this attack alone")
    parser.add_argument("--json", type=Path, help="write the figures, and what ended badly, to this file")
    asked = parser.parse_args()
    kinds = [kind for name, kind in KINDS.items() if asked.kind in name]
    kinds = [KINDS[asked.kind]] if asked.kind in KINDS else kinds
    if not kinds:
        parser.error(f"no kind contains {asked.kind!r}; there are: {', '.join(KINDS)}")
    files.prepare(kinds)
    counts = {kind.name: Count() for kind in kinds}
    if asked.number is not None:
        for kind in kinds:
            for number, verdict in judge(kind, asked.seed, [asked.number]):
                print(f"{kind.name}: {verdict.outcome}: {verdict.said}")
                counts[kind.name].add(kind.name, asked.seed, number, verdict)
    else:
        with contextlib.suppress(KeyboardInterrupt):  # what was tried until then is told
            attack(kinds, asked.seed, asked.seconds, counts)
    faults = [fault for count in counts.values() for fault in count.faults]
    print(table(counts))
    if asked.json:
        figures = {
            name: {"tried": count.tried, **count.outcomes, "seconds": round(count.seconds, 1)}
            for name, count in counts.items()
        }
        asked.json.write_text(json.dumps({"seed": asked.seed, "kinds": figures, "faults": faults}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
