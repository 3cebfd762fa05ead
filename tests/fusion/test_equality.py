"""Fused and original models compute the same, hold the same, and go back to the same."""

import pytest
import torch
from torch import nn

import unetgn
from tests.fusion.models import CASES

EVERY_CASE = pytest.mark.parametrize("name", CASES)


@EVERY_CASE
def test_in_float64_outputs_and_gradients_agree_to_1e_10(name):
    case = CASES[name]
    model = case.model(torch.float64)
    before = case.run(model)
    assert unetgn.fuse(model).fused
    for got, expected in zip(case.run(model), before, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()


@EVERY_CASE
def test_in_float32_the_fused_model_is_no_further_from_float64_than_one_and_a_half_times_the_original(name):
    case = CASES[name]
    exact = case.run(case.model(torch.float64))
    model = case.model()
    original = case.run(model)
    unetgn.fuse(model)
    for fused, plain, reference in zip(case.run(model), original, exact, strict=True):
        assert (fused - reference).norm() <= 1.5 * (plain - reference).norm()


@EVERY_CASE
def test_the_fused_places_are_those_of_the_architecture(name):
    report = unetgn.fuse(CASES[name].model())
    assert len(report.fused) == CASES[name].places
    assert len({place.path for place in report.fused}) == len(report.fused)


@EVERY_CASE
def test_every_group_norm_of_the_model_is_in_the_report(name):
    model = CASES[name].model()
    report = unetgn.fuse(model)
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    assert norms == {place.path for place in (*report.fused, *report.left)}


@EVERY_CASE
def test_parameters_and_state_dict_stay_before_during_and_after(name):
    model = CASES[name].model()
    parameters = dict(model.named_parameters())
    modules = [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for change in (lambda _: None, unetgn.fuse, unetgn.unfuse):
        change(model)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
        assert [type(module) for module in model.modules()] == modules


@EVERY_CASE
def test_unfuse_gives_the_original_outputs_bit_for_bit_and_leaves_no_trace(name):
    case = CASES[name]
    model = case.model()
    attributes = [set(vars(module)) for module in model.modules()]
    before = case.run(model)
    unetgn.fuse(model)
    unetgn.unfuse(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(got, expected) for got, expected in zip(case.run(model), before, strict=True))


@EVERY_CASE
def test_fusing_twice_changes_nothing(name):
    case = CASES[name]
    model = case.model()
    report = unetgn.fuse(model)
    once = case.run(model)
    assert unetgn.fuse(model) == report
    assert all(torch.equal(got, expected) for got, expected in zip(case.run(model), once, strict=True))
