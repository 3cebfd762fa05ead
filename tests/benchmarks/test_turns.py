"""Competitors that take turns: their rounds, and what is made of them."""

from collections.abc import Callable

import pytest

from benchmarks.turns import quartiles, summary, take_turns, timed


def counting(name: str, log: list[str]) -> Callable[[], float]:
    def call() -> float:
        log.append(name)
        return float(len(log))

    return call


def test_each_round_runs_all_and_the_first_is_not_counted():
    log: list[str] = []
    times = take_turns({name: counting(name, log) for name in "ab"}, seconds=0, at_least=2)
    assert log == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_without_a_warm_up_every_round_counts():
    log: list[str] = []
    assert take_turns({"a": counting("a", log)}, seconds=0, at_least=2, warm_up=False) == {"a": [1.0, 2.0]}


def test_rounds_go_on_for_as_many_seconds_as_were_asked_for():
    assert len(take_turns({"a": timed(lambda: None)}, seconds=0.02, at_least=1)["a"]) > 1


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="at_least is 0"):
        take_turns({}, seconds=0, at_least=0)


def test_what_slows_a_whole_round_leaves_the_ratio():
    """The third round takes ten times as long; the ratio of medians would not see 0.5 in every round."""
    figures = summary({"a": [1.0, 4.0, 40.0], "b": [2.0, 8.0, 80.0]}, "b")
    assert figures["a"] == {"seconds": 4.0, "rounds": 3, "ratio": 0.5, "ratio_quartiles": [0.5, 0.5]}
    assert figures["b"]["ratio"] == 1


def test_the_quartiles_of_one_round_are_that_round():
    assert quartiles([0.25]) == [0.25, 0.25]
    assert quartiles([1.0, 2.0, 3.0]) == [1.0, 3.0]


def test_waiting_for_a_device_is_within_the_time():
    order: list[str] = []
    timed(lambda: order.append("call"), lambda: order.append("wait"))()
    assert order == ["wait", "call", "wait"]
