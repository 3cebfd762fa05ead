"""Tests numerical edges, sizes and layouts at the limits, and the operator's public door, under the interpreter."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import unetgn
from benchmarks.group_norm_silu.checks import Check, faults
from tests.ops.triton_cases import (
    TOLERANCE,
    Case,
    arguments_of,
    definition,
    errors,
    paths,
    relative_error,
    run_backward,
    run_forward,
)
from unetgn.ops import implementation
from unetgn.ops.arguments import DIFFERENTIABLE
from unetgn.ops.triton import forward
from unetgn.ops.triton import plan_channels_last as channels_last
from unetgn.ops.triton.device import INTERPRETER

ALL = ("weight", "bias", "pre_bias", "scale", "shift")
LAYOUTS_AND_PATHS = [(layout, path) for layout in (False, True) for path in ("resident", "split", "cluster")]
every_path = pytest.mark.parametrize(("channels_last", "path"), LAYOUTS_AND_PATHS)


def public(case: Case, tensors: dict[str, Tensor | None]) -> Tensor:
    """Call the public function on the tensors of a case."""
    named = {name: tensors[name] for name in DIFFERENTIABLE}
    activation = "silu" if case.activation else None
    return unetgn.group_norm_silu(num_groups=case.groups, eps=case.eps, activation=activation, **named)


@every_path
def test_a_mean_of_a_thousand_deviations_costs_float32_less_than_2e_4(channels_last: bool, path: str) -> None:
    case = Case((1, 8, 16, 16), 2, torch.float32, channels_last, ALL, mean=1000.0, seed=11)
    assert max(errors(case, paths(case)[path]).values()) < 2e-4


@every_path
@pytest.mark.parametrize("place", [0, -1])
def test_one_element_far_off_costs_the_others_no_accuracy(channels_last: bool, path: str, place: int) -> None:
    """Strips of channels_last sum about a mean that the first element has a part in."""
    case = Case((1, 4, 16, 16), 2, torch.float32, channels_last, seed=25)
    tensors = case.tensors()
    assert tensors["x"] is not None
    tensors["x"][:, :, place, place] += 1e5
    y, mean, rstd = run_forward(paths(case)[path][0], case, tensors)
    grouped = tensors["x"].double().reshape(1, 2, -1)
    exact = (grouped.var(2, correction=0) + case.eps).rsqrt()
    assert ((rstd.double() - exact) / exact).abs().max() < 1e-5
    assert ((mean.double() - grouped.mean(2)) * exact).abs().max() < 1e-6
    assert relative_error(y, definition(case, tensors)[0]) < 1e-5


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 64, 32, 32)])
@pytest.mark.parametrize("off", [50.0, 1e5])
def test_one_element_far_off_costs_a_long_strip_no_accuracy(shape: tuple[int, ...], off: float) -> None:
    """As plans have strips, of hundreds of rows and more."""
    case = Case(shape, 2, torch.float32, True, seed=26)
    tensors = case.tensors()
    assert tensors["x"] is not None
    tensors["x"][:, :, 0, 0] += off
    plan = channels_last.split(case.problem, INTERPRETER)
    _, mean, rstd = run_forward(replace(plan, rows=512, apply_rows=512), case, tensors)
    grouped = tensors["x"].double().reshape(1, 2, -1)
    exact = (grouped.var(2, correction=0) + case.eps).rsqrt()
    assert ((rstd.double() - exact) / exact).abs().max() < 1e-5
    assert ((mean.double() - grouped.mean(2)) * exact).abs().max() < 1e-5


@every_path
def test_two_runs_give_identical_bits(channels_last: bool, path: str) -> None:
    case = Case((2, 12, 6, 6), 2, torch.float32, channels_last, ALL, seed=12)
    first, second = paths(case)[path]
    tensors = case.tensors()
    runs = []
    for _ in range(2):
        y, mean, rstd = run_forward(first, case, tensors)
        runs.append([y, mean, rstd, *run_backward(second, case, tensors, mean, rstd).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_path
def test_a_value_that_is_not_finite_stays_in_its_sample_and_group(channels_last: bool, path: str) -> None:
    case = Case((2, 8, 6, 6), 2, torch.float32, channels_last, seed=13)
    first, second = paths(case)[path]
    clean, poisoned = case.tensors(), case.tensors()
    assert poisoned["x"] is not None
    poisoned["x"][0, 6, 1, 2] = math.inf  # sample 0, group 1
    poisoned["x"][1, 2, 3, 4] = math.nan  # sample 1, group 0
    results = []
    for tensors in (clean, poisoned):
        y, mean, rstd = run_forward(first, case, tensors)
        results.append((y, run_backward(second, case, tensors, mean, rstd)["x"]))
    for before, after in zip(*results, strict=True):
        for group in ((0, slice(4, 8)), (1, slice(0, 4))):
            assert torch.isnan(after[group]).all()
            after[group] = before[group]
        assert torch.equal(before, after)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_constant_group_gives_the_bias(channels_last: bool, path: str, dtype: torch.dtype) -> None:
    """Samples of one constant each; sums of the last three are not exact."""
    constants = [0.0, -3.0, 1000.0, 0.1, 1000 / 3, min(1e6 / 3, torch.finfo(dtype).max)]
    case = Case((6, 3, 5, 16), 1, dtype, channels_last, ("bias",), activation=False)
    tensors = case.tensors()
    x, bias = tensors["x"], tensors["bias"]
    assert x is not None
    assert bias is not None
    x.copy_(torch.tensor(constants).view(6, 1, 1, 1).expand(x.shape))
    y, _, rstd = run_forward(paths(case)[path][0], case, tensors)
    torch.testing.assert_close(y, bias.view(1, 3, 1, 1).expand_as(y), rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd, torch.full_like(rstd, case.eps**-0.5))


@every_path
def test_squares_that_overflow_float16_do_not_overflow_the_statistics(channels_last: bool, path: str) -> None:
    case = Case((1, 8, 4, 16), 2, torch.float16, channels_last, seed=14)
    tensors = case.tensors()
    assert tensors["x"] is not None
    tensors["x"] *= 10000.0
    y, _, _ = run_forward(paths(case)[path][0], case, tensors)
    assert relative_error(y, definition(case, tensors)[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 1), (2, 8, 1, 1), (2, 4, 1, 1, 1)], ids=str)
def test_one_spatial_element_works(shape: tuple[int, ...]) -> None:
    case = Case(shape, 2, torch.float32, False, ALL, eps=1e-2, seed=15)
    for plans in paths(case).values():
        assert max(errors(case, plans).values()) < 4 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 6, 5, 4), 6), ((2, 6, 5, 4), 1), ((1, 1, 7, 3), 1), ((2, 3, 9), 3)], ids=str
)
def test_instance_and_layer_normalization_are_the_ends_of_the_range(shape: tuple[int, ...], groups: int) -> None:
    case = Case(shape, groups, torch.float64, False, ALL, seed=16)
    for plans in paths(case).values():
        assert max(errors(case, plans).values()) < TOLERANCE[torch.float64]


def test_more_chunks_than_a_program_merges_take_a_merge_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are far lower here than on a GPU: 19 chunks, of which a program merges eight at a time."""
    monkeypatch.setattr(forward, "MANY_CHUNKS", 16)
    monkeypatch.setattr(forward, "MERGED_ELEMENTS", 8)
    case = Case((1, 2, 19, 64), 1, torch.float32, False, mean=100.0, seed=17)
    plan, backward = paths(case)["split"]
    many = replace(plan, tile=128, apply_tile=1024)  # type: ignore[type-var]
    recipe = forward.recipe_of(many, case.problem, INTERPRETER, case.eps, case.activation)
    assert len(recipe.launches) == 3
    assert max(errors(case, (many, backward)).values()) < 2e-4 / 10


def test_a_masked_segment_longer_than_the_longest_is_several() -> None:
    case = Case((1, 2, 2049), 1, torch.float32, False, ALL, seed=18)
    assert max(errors(case, paths(case)["resident"]).values()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("wanted", "path"),
    [(wanted, "resident") for wanted in DIFFERENTIABLE]
    # Of two that are summed alike, one: a group that is split is long.
    + [
        pytest.param(wanted, "split", marks=pytest.mark.slow if wanted in ("bias", "shift") else ())
        for wanted in DIFFERENTIABLE
    ],
)
def test_each_gradient_is_right_where_no_other_is_needed(wanted: str, path: str) -> None:
    shape = (1, 4, 4, 4) if path == "resident" else (1, 2, 128, 88)  # too long a group for one block
    case = Case(shape, 2 if path == "resident" else 1, torch.float32, False, ALL, seed=19)
    tensors = case.tensors()
    exact = definition(case, tensors)[1][wanted]
    leaf = tensors[wanted]
    assert leaf is not None
    leaf.requires_grad_()
    with implementation("triton"):
        y = public(case, tensors)
        (found,) = torch.autograd.grad(y, leaf, tensors["dy"])
    assert relative_error(found, exact, floor=1e-2) < 20 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_gradient_has_the_dtype_of_its_parameter(dtype: torch.dtype) -> None:
    case = Case((1, 4, 4, 4), 2, dtype, False, ALL, parameter_dtype=torch.float32, seed=20)
    tensors = case.tensors()
    for first, second in paths(case).values():
        _, mean, rstd = run_forward(first, case, tensors)
        assert mean.dtype == rstd.dtype == torch.float32
        found = run_backward(second, case, tensors, mean, rstd)
        assert [gradient.dtype for gradient in found.values()] == [dtype] + [torch.float32] * 5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_public_function_takes_the_kernels_and_keeps_the_layout(memory_format: torch.memory_format) -> None:
    case = Case((2, 8, 6, 5), 4, torch.float64, False, ALL, seed=21)
    tensors = {key: None if t is None else t.clone() for key, t in case.tensors().items()}
    exact, gradients = definition(case, tensors)
    leaves = {key: t.requires_grad_() for key, t in tensors.items() if t is not None and key != "dy"}
    x = leaves["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
    small = {key: leaves[key] for key in ("pre_bias", "scale", "shift")}
    with implementation("triton"):
        y = unetgn.group_norm_silu(x, 4, leaves["weight"], leaves["bias"], **small)
        y.backward(tensors["dy"])
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert relative_error(y.detach(), exact) < 1e-12
    assert relative_error(x.grad, gradients["x"]) < 1e-12
    for key in ("weight", "bias", "scale", "shift"):
        assert leaves[key].grad is not None
        assert relative_error(leaves[key].grad, gradients[key]) < 1e-12


def test_the_public_function_takes_a_gradient_with_stride_zero_and_small_tensors_that_are_transposed() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(22)).requires_grad_()
    scale = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2).t()
    results = {}
    for chosen in ("triton", "reference"):
        x.grad = None
        with implementation(chosen):
            unetgn.group_norm_silu(x, 3, scale=scale).sum().backward()
        results[chosen] = x.grad
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_passes_for_the_registered_operators_on_the_kernels(channels_last: bool) -> None:
    case = Case((2, 6, 3, 4), 3, torch.float32, channels_last, ALL, seed=24)
    tensors = case.tensors()
    arguments = arguments_of(case, tensors)
    what = (
        "test_schema",
        "test_faketensor",
    )  # the rest does not depend on the implementation: tests/ops/test_compile.py
    torch.library.opcheck(torch.ops.unetgn.group_norm_silu.default, tuple(arguments), test_utils=what)
    _, mean, rstd = torch.ops.unetgn.group_norm_silu(*arguments)
    for needs in ([True] * 6, [True, *[False] * 5]):
        named = {"dy": tensors["dy"], "mean": mean, "rstd": rstd, "needs": needs, **arguments._asdict()}
        torch.library.opcheck(torch.ops.unetgn.group_norm_silu_backward.default, (), named, test_utils=what)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_benchmarks_checks_of_correctness_pass(channels_last: bool) -> None:
    check = Check((2, 12, 5, 4), 3, torch.bfloat16, channels_last, ALL)
    assert faults(check, "triton", "cpu") == []


def test_the_reference_values_of_this_folder_are_those_of_torch() -> None:
    case = Case((2, 8, 5, 4), 4, torch.float64, False, seed=23)
    tensors = case.tensors()
    x, weight, bias = (tensors[key] for key in ("x", "weight", "bias"))
    assert isinstance(x, Tensor)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, weight, bias))
    torch.testing.assert_close(definition(case, tensors)[0], expected, rtol=1e-12, atol=1e-12)
