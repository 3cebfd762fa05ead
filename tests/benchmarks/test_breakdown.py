"""A step's time by parts, and its operations counted by hand."""

import pytest
import torch
import torch.nn.functional as F

import unetgn
from benchmarks.breakdown import REST, breakdown, operations_of_parts, operations_per_second, part_of, seconds_of_parts

N, C, L, HEADS, WIDTH = 2, 8, 6, 2, 4


def step() -> None:
    """Make a convolution, the operator, a product and attention, and their gradients."""
    x = torch.randn(N, C, L, L, requires_grad=True)
    weight = torch.randn(C, C, 3, 3, requires_grad=True)
    y = unetgn.group_norm_silu(F.conv2d(x, weight, padding=1), 2, torch.ones(C, requires_grad=True))
    tokens = F.linear(y.flatten(2).transpose(1, 2), torch.randn(C, C, requires_grad=True))
    heads = tokens.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads).sum().backward()


def test_operations_are_those_of_the_definition():
    """A product and a sum are two; the backward pass of a product is two products, that of attention five of two."""
    counts = operations_of_parts(step)
    convolution, linear = 2 * N * L * L * C * C * 9, 2 * N * L * L * C * C
    product = 2 * N * HEADS * (L * L) ** 2 * WIDTH
    assert counts == {"convolutions": 3 * convolution, "products": 3 * linear, "attention": 2 * product + 5 * product}


def test_every_part_of_a_step_takes_time_and_the_norms_are_ours_too():
    assert all(seconds > 0 for seconds in seconds_of_parts(step).values())


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::conv2d", "aten::convolution", "aten::mkldnn_convolution"], "convolutions"),
        (["autograd::engine::evaluate_function: ConvolutionBackward0", "aten::sum"], "convolutions"),
        (["aten::scaled_dot_product_attention", "aten::bmm"], "attention"),
        (["GroupNormSiLUFunction", "aten::batch_norm", "aten::mul"], "norms"),
        (["autograd::engine::evaluate_function: GroupNormSiLUFunctionBackward", "aten::mul"], "norms"),
        (["aten::silu"], "norms"),
        (["aten::linear", "aten::addmm"], "products"),
        (["autograd::engine::evaluate_function: MmBackward0", "aten::mm"], "products"),
        (["aten::cat"], REST),
        (["autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"], REST),
    ],
)
def test_the_outermost_event_with_a_name_decides(names: list[str], part: str):
    assert part_of(names) == part


def test_a_part_has_what_the_machine_would_need_at_best():
    found = breakdown(step, rate=1e6, repeats=1)
    assert found["convolutions"]["at_best"] == pytest.approx(operations_of_parts(step)["convolutions"] / 1e6)
    assert "at_best" not in found["norms"]
    assert operations_per_second(torch.float32, size=16, seconds=0) > 0
