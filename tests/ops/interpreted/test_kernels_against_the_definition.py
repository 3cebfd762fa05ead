"""Tests every path through the kernels against the float64 definition, forward and backward."""

import itertools
import random
from typing import Any

import pytest
import torch

from tests.ops.triton_cases import TOLERANCE, Case, errors, heuristic, paths
from unetgn.ops.triton.plan_contiguous import Cluster

GROUP_CHANNELS = (1, 3, 10, 20, 30, 40, 60, 80)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXTRAS = (
    (),
    ("weight",),
    ("bias",),
    ("weight", "bias"),
    ("pre_bias",),
    ("weight", "bias", "scale", "shift"),
    ("scale", "pre_bias"),
    ("bias", "shift", "dshortcut"),
    ("weight", "bias", "pre_bias", "scale", "shift"),
    ("weight", "bias", "scale", "shift", "maps"),
    ("pre_bias", "shift", "maps", "dshortcut"),
)
PATHS = ("resident", "split", "cluster")
FEW = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2))  # samples and groups: the interpreter's time is that of programs
FEW_LARGE = ((1, 1), (1, 2), (2, 1))
SPATIAL = {
    False: ((4, 4), (5, 7), (33,), (2, 4, 4), (6, 6), (16, 24)),
    True: ((4, 4), (5, 7), (2, 4, 4), (6, 6), (3, 9)),
}


def cross_product(seed: int) -> list[tuple[Case, str]]:
    """Combine layouts, dtypes, C/G, extras and paths; what else a case has is drawn from the seed."""
    draw = random.Random(seed)
    cases = []
    product = itertools.product((False, True), DTYPES, GROUP_CHANNELS, EXTRAS, PATHS)
    for index, (channels_last, dtype, group_channels, extras, path) in enumerate(product):
        samples, groups = draw.choice(FEW_LARGE if group_channels >= 30 else FEW)
        case = Case(
            shape=(samples, groups * group_channels, *draw.choice(SPATIAL[channels_last])),
            groups=groups,
            dtype=dtype,
            channels_last=channels_last,
            extras=extras,
            parameter_dtype=draw.choice((None, None, torch.float32, torch.bfloat16))
            if dtype != torch.float64
            else None,
            activation=draw.random() < 0.8,
            seed=index,
        )
        cases.append((case, path))
    return cases


def covering_selection(cases: list[tuple[Case, str]], seed: int) -> list[tuple[Case, str]]:
    """Select few cases that have every pair of the product's values: always one that has most of those that lack.

    Of several, it is the first in an order drawn from the seed.
    """
    order = [(case, path) for case, path in cases if path in paths(case)]
    random.Random(seed).shuffle(order)
    pairs = {}
    for case, path in order:
        values = (case.channels_last, case.dtype, case.shape[1] // case.groups, case.extras, path)
        pairs[case, path] = set(itertools.combinations(enumerate(values), 2))
    lacking = set().union(*pairs.values())
    chosen = []
    while lacking:
        chosen.append(max(order, key=lambda one: len(pairs[one] & lacking)))
        lacking -= pairs[chosen[-1]]
    return chosen


PRODUCT = cross_product(seed=2024)
SELECTION = covering_selection(PRODUCT, seed=7)
FEASIBLE = [(case, path) for case, path in PRODUCT if path in paths(case)]


def name(value: Any) -> str:
    if not isinstance(value, Case):
        return str(value)
    layout = "channels_last" if value.channels_last else "contiguous"
    shape = "x".join(map(str, value.shape))
    return f"{layout}-{str(value.dtype)[6:]}-{shape}/{value.groups}-{'+'.join(value.extras) or 'plain'}"


def check(case: Case, path: str) -> None:
    found = errors(case, paths(case)[path])
    allowed = dict.fromkeys(found, TOLERANCE[case.dtype])
    for key in ("weight", "bias", "pre_bias", "scale", "shift"):  # rounded to their own dtype
        if key in found and case.parameter_dtype is not None:
            allowed[key] = max(TOLERANCE[case.dtype], TOLERANCE[case.parameter_dtype])
    assert {key: error for key, error in found.items() if error > allowed[key]} == {}


@pytest.mark.parametrize(("case", "path"), SELECTION, ids=name)
def test_results_and_gradients_match_the_definition_over_a_covering_selection(case: Case, path: str) -> None:
    check(case, path)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "path"), FEASIBLE, ids=name)
def test_results_and_gradients_match_the_definition_over_the_whole_cross_product(case: Case, path: str) -> None:
    check(case, path)


def test_the_selection_reaches_every_path_and_value() -> None:
    assert {path for _, path in SELECTION} == set(PATHS)
    assert {case.shape[1] // case.groups for case, _ in SELECTION} == set(GROUP_CHANNELS)
    assert {case.extras for case, _ in SELECTION} == set(EXTRAS)
    assert {(case.channels_last, case.dtype) for case, _ in SELECTION} == set(itertools.product((False, True), DTYPES))
    assert sum(isinstance(paths(case)[path][1], Cluster) for case, path in SELECTION) >= 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 80, 8, 8), torch.float32),
        ((1, 8, 32, 32), torch.float32),
        ((2, 32, 16, 16), torch.float32),
        ((1, 6, 43, 64), torch.float64),  # split
    ],
    ids=str,
)
def test_the_heuristics_own_plans_match_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    extras = ("weight", "bias", "pre_bias", "scale", "shift")
    case = Case(shape, 2, dtype, channels_last, extras, seed=3)
    plans = heuristic(case)
    assert [type(plan).__name__ for plan in plans] == ["Split" if dtype == torch.float64 else "Resident"] * 2
    assert max(errors(case, plans).values()) < TOLERANCE[dtype]


@pytest.mark.parametrize(("channels_last", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_clusters_as_the_heuristic_forms_them_match_the_definition(channels_last: bool, dtype: torch.dtype) -> None:
    extras = ("weight", "bias", "pre_bias", "scale", "shift")
    case = Case((1, 16, 64, 64), 2, dtype, channels_last, extras, seed=4)
    plans = heuristic(case, clusters=True)
    assert [getattr(plan, "blocks", 1) for plan in plans] == [8, 8]
    assert max(errors(case, plans).values()) < TOLERANCE[dtype]
