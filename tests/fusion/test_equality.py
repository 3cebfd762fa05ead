"""Fused and original models compute the same, hold the same, and go back to the same."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import unetgn
from tests.fusion.models import CASES, Case

Measured = tuple[torch.Tensor, torch.Tensor]  # what Case.run returns


@dataclass
class Life:
    """Records a model as it is made, fused, fused again and unfused: what it holds, and what it computes.

    `runs` are outputs and gradients in float32, `states` what the model consists of, `reports` those of both calls of
    `fuse`; `exact` and `fused_in_float64` are outputs and gradients of the original and of the fused model in float64.
    """

    case: Case
    exact: Measured
    fused_in_float64: Measured
    norms: set[str]
    runs: list[Measured]
    states: list[dict[str, Any]]
    reports: list[unetgn.fusion.Report]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return what a model consists of: the parameters themselves, a copy of the state dict, classes, attributes."""
    return {
        "parameters": dict(model.named_parameters()),
        "state dict": {key: value.clone() for key, value in model.state_dict().items()},
        "classes": [type(module) for module in model.modules()],
        "attributes": [set(vars(module)) for module in model.modules()],
    }


# Their blocks are those of "DDPM cifar10" and "SD 1.5", at other depths.
MORE_OF_THE_SAME = ("butterflies", "SDXL")
EVERY_CASE = [pytest.param(name, marks=pytest.mark.slow if name in MORE_OF_THE_SAME else ()) for name in CASES]


@pytest.fixture(scope="module", params=EVERY_CASE)
def life(request) -> Life:
    """Lead the life of one model, once for all tests of this file."""
    case = CASES[request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    double = case.model(torch.float64)
    exact = case.run(double)
    assert unetgn.fuse(double).fused
    fused_in_float64 = case.run(double)
    model = case.model()
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    recorded = Life(case, exact, fused_in_float64, norms, [case.run(model)], [state_of(model)], [])
    for change in (unetgn.fuse, unetgn.fuse, unetgn.unfuse):
        report = change(model)
        recorded.reports += [report] if report is not None else []
        recorded.states.append(state_of(model))
        recorded.runs.append(case.run(model))
    torch.set_num_threads(threads)
    return recorded


def test_in_float64_outputs_and_gradients_agree_to_1e_10(life):
    for got, expected in zip(life.fused_in_float64, life.exact, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()


def test_in_float32_the_fused_model_is_no_further_from_float64_than_one_and_a_half_times_the_original(life):
    original, fused, _, _ = life.runs
    for got, plain, reference in zip(fused, original, life.exact, strict=True):
        assert (got - reference).norm() <= 1.5 * (plain - reference).norm()


def test_the_fused_places_are_those_of_the_architecture(life):
    fused = life.reports[0].fused
    assert len(fused) == len({place.path for place in fused}) == life.case.places


def test_every_group_norm_of_the_model_is_in_the_report(life):
    report = life.reports[0]
    assert life.norms == {place.path for place in (*report.fused, *report.left)}


def test_parameters_and_state_dict_stay_before_during_and_after(life):
    before, *later = life.states
    for state in later:
        assert list(state["state dict"]) == list(before["state dict"])
        assert all(torch.equal(value, before["state dict"][key]) for key, value in state["state dict"].items())
        assert all(parameter is before["parameters"][key] for key, parameter in state["parameters"].items())
        assert state["parameters"].keys() == before["parameters"].keys()
        assert state["classes"] == before["classes"]


def test_unfuse_gives_the_original_outputs_bit_for_bit_and_leaves_no_trace(life):
    assert life.states[3]["attributes"] == life.states[0]["attributes"] != life.states[1]["attributes"]
    assert all(torch.equal(got, expected) for got, expected in zip(life.runs[3], life.runs[0], strict=True))


def test_fusing_twice_changes_nothing(life):
    assert life.reports[1] == life.reports[0]
    assert life.states[2]["attributes"] == life.states[1]["attributes"]
    assert all(torch.equal(got, expected) for got, expected in zip(life.runs[2], life.runs[1], strict=True))
