"""Makes learning-rate schedules by their names in diffusers: functions of the step alone, which need no saving.

The rise of the warm-up is ours: it reaches the peak with its last step and has no step of rate 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import torch
from diffusers.optimization import get_scheduler

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
                   "piecewise_constant"]  # fmt: skip

# train.learning_rate_KEY, by the one schedule that reads it.
OWN_KEYS = {"cycles": "cosine_with_restarts", "power": "polynomial", "rules": "piecewise_constant"}
LAST_RATE = 1e-7  # of polynomial, in diffusers


@functools.cache
def share_of_peak(
    schedule: Schedule,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    cycles: int | None = None,
    power: float | None = None,
    rules: str | None = None,
) -> Callable[[int], float]:
    """Make the function from a step, 0 .. steps - 1, to its share of the peak learning rate.

    After the warm-up it is the function of diffusers.optimization.get_scheduler. Raises ValueError where the keys do
    not fit the schedule, with all that is wrong.
    """
    check_schedule(schedule, peak=peak, warmup_steps=warmup_steps, cycles=cycles, power=power, rules=rules)
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)  # the schedules of diffusers come with an optimizer
    after = get_scheduler(
        schedule,
        stand_in,
        step_rules=rules,
        num_warmup_steps=warmup_steps,
        num_training_steps=steps,
        num_cycles=cycles or 1,
        power=power or 1.0,
    ).lr_lambdas[0]

    def share(step: int) -> float:
        return (step + 1) / warmup_steps if step < warmup_steps else float(after(step))

    return share


def check_schedule(
    schedule: Schedule, *, peak: float, warmup_steps: int, cycles: int | None, power: float | None, rules: str | None
) -> None:
    """Raise ValueError where keys do not fit the schedule, naming all of them."""
    given = {"cycles": cycles, "power": power, "rules": rules}
    wrong = [
        f"train.learning_rate_{key} is {value!r}, which train.learning_rate_schedule {OWN_KEYS[key]} alone reads: "
        "leave it out, or take that"
        for key, value in given.items()
        if value is not None and OWN_KEYS[key] != schedule
    ]
    if cycles is not None and cycles < 1:
        wrong.append(f"train.learning_rate_cycles is {cycles}; it must be at least 1")
    if power is not None and power <= 0:
        wrong.append(f"train.learning_rate_power is {power}; it must be above 0")
    if schedule == "polynomial" and peak <= LAST_RATE:
        wrong.append(f"train.learning_rate is {peak}; it must be above {LAST_RATE}, where the schedule ends")
    if schedule == "constant_with_warmup" and warmup_steps == 0:
        wrong.append("train.warmup_steps is 0: set it, or take constant")
    if schedule == "piecewise_constant":
        if warmup_steps:
            wrong.append(f"train.warmup_steps is {warmup_steps}, but the rules say every rate: leave it out")
        wrong += [] if rules is not None and are_rules(rules) else [
            f"train.learning_rate_rules is {rules!r}; it must say which share of the peak holds until which step, and "
            "at last the one of all others, such as 1:1000,0.1:2000,0.01: steps rise, and shares are above 0"
        ]  # fmt: skip
    if wrong:
        raise ValueError(f"train.learning_rate_schedule is {schedule}: {'; '.join(wrong)}")


def are_rules(rules: str) -> bool:
    """Return True for SHARE:STEP,…,SHARE with rising steps and shares above 0."""
    *parts, last = rules.split(",")
    try:
        pairs = [(float(share), int(step)) for share, step in (part.split(":") for part in parts)]
        shares, ends = [float(last), *(share for share, _ in pairs)], [0, *(step for _, step in pairs)]
    except ValueError:
        return False
    rising = all(before < after for before, after in itertools.pairwise(ends))
    return rising and all(0 < share < float("inf") for share in shares)
