"""Learning rates by name are those of diffusers' schedules, and functions of the step alone."""

from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from unetgn.training.schedules import OWN_KEYS, Schedule
from unetgn.training.step import TrainConfig, learning_rate

NAMES = get_args(Schedule)
OWN = {"cycles": 3, "power": 2.0, "rules": "1:5,0.1:11,0.01"}
DIFFUSERS = {"cycles": "num_cycles", "power": "power", "rules": "step_rules"}
STEPS, WARMUP = 20, 4


def config_of(name: str, warmup: int) -> tuple[TrainConfig, dict[str, Any]]:
    own = {key: OWN[key] for key, schedule in OWN_KEYS.items() if schedule == name}
    keys: dict[str, Any] = {f"learning_rate_{key}": value for key, value in own.items()}
    config = TrainConfig(
        steps=STEPS, warmup_steps=warmup, learning_rate=0.5, learning_rate_schedule=name, **keys  # type: ignore[arg-type]
    )  # fmt: skip
    return config, {DIFFUSERS[key]: value for key, value in own.items()}


def rates_of_diffusers(name: str, warmup: int, more: dict[str, Any]) -> list[float]:
    """Return the rates that an optimizer has when the schedule is stepped with it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, **more)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_every_schedule_of_diffusers_has_its_name_here() -> None:
    assert set(NAMES) == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_the_rates_are_those_of_diffusers_after_a_rise_to_the_peak(name: str, warmup: int) -> None:
    if (name == "constant_with_warmup" and not warmup) or (name == "piecewise_constant" and warmup):
        with pytest.raises(ValueError, match=rf"learning_rate_schedule is {name}: train\.warmup_steps is {warmup}"):
            config_of(name, warmup)
        return
    config, more = config_of(name, warmup)
    rates = [learning_rate(config, step) for step in range(STEPS)]
    assert rates[:warmup] == pytest.approx([0.5 * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup:] == pytest.approx(rates_of_diffusers(name, warmup, more)[warmup:])
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", OWN)
def test_a_key_of_another_schedule_is_refused(name: str, key: str) -> None:
    warmup = WARMUP if name == "constant_with_warmup" else 0
    if OWN_KEYS[key] == name:
        return
    keys: dict[str, Any] = {f"learning_rate_{key}": OWN[key], "learning_rate_schedule": name, "warmup_steps": warmup}
    with pytest.raises(ValueError, match=rf"train\.learning_rate_{key} is .*{OWN_KEYS[key]} alone reads"):
        TrainConfig(**keys)


@pytest.mark.parametrize(
    "rules",
    [None, "", "1", "1:10", "1:10,", "a:10,1", "1:b,1", "1:10:2,1", "1:10,0.1:10,1", "1:10,0.1:5,1", "1:10,0",
     "-1:10,1", "1:0,1", "1:10,nan", "1:10,inf", "1:2.5,1"],
)  # fmt: skip
def test_rules_that_say_nothing_whole_are_refused(rules: str | None) -> None:
    if rules == "1":  # one rate for all steps is a rule
        TrainConfig(learning_rate_schedule="piecewise_constant", learning_rate_rules=rules)
        return
    with pytest.raises(ValueError, match=r"train\.learning_rate_rules is .*such as 1:1000,0\.1:2000,0\.01"):
        TrainConfig(learning_rate_schedule="piecewise_constant", learning_rate_rules=rules)


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"learning_rate_schedule": "polynomial", "learning_rate": 1e-7}, r"train\.learning_rate is 1e-07; .* 1e-07"),
     ({"learning_rate_schedule": "polynomial", "learning_rate_power": 0.0}, r"learning_rate_power is 0\.0; .* above 0"),
     ({"learning_rate_schedule": "cosine_with_restarts", "learning_rate_cycles": 0}, r"cycles is 0; .* at least 1")],
)  # fmt: skip
def test_values_out_of_range_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**keys)
