"""Times competitors in turns: each round runs them all, and a ratio is that of one round.

What slows the machine down for a while slows all that run in the same round, and so most of it leaves the ratios. The
figures are medians over rounds, with the quartiles beside them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Times = dict[str, list[float]]


def take_turns(
    calls: Mapping[str, Callable[[], float]], *, seconds: float, at_least: int, warm_up: bool = True
) -> Times:
    """Return what each call returned, round by round; with `warm_up` a first round is not counted.

    Rounds are made for so many seconds, and `at_least` so many. A call returns its own seconds (or whatever figure is
    compared), so that what belongs to it and is not measured can stand around.
    """
    if at_least < 1:
        raise ValueError(f"at_least is {at_least}; at least one round is needed")
    for call in calls.values() if warm_up else ():
        call()
    times: Times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < at_least:
        for name, call in calls.items():
            times[name].append(call())
    return times


def timed(call: Callable[[], object], synchronize: Callable[[], object] | None = None) -> Callable[[], float]:
    """Wrap a call such that it returns the seconds that it took, by the clock on the wall."""

    def run() -> float:
        if synchronize is not None:
            synchronize()
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        return time.perf_counter() - start

    return run


def summary(times: Times, base: str) -> dict[str, dict[str, Any]]:
    """Return for each name: `seconds` (the median), `rounds`, `ratio` to `base` and `ratio_quartiles`."""
    figures = {}
    for name, values in times.items():
        ratios = [own / other for own, other in zip(values, times[base], strict=True)]
        figures[name] = {
            "seconds": round(statistics.median(values), 6),
            "rounds": len(values),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_quartiles": quartiles(ratios),
        }
    return figures


def quartiles(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return the lower and the upper quartile; of a single value, that value."""
    cut = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [values[0], values[0]]
    return [round(value, digits) for value in cut]
