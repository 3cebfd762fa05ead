"""Tests the Triton kernels on a real GPU; skipped where there is none. `python3 -m pytest -m gpu tests/ops` runs
all that needs one."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm device", allow_module_level=True)

import unetgn
from benchmarks.group_norm_silu.checks import Check, checks, cluster_checks, faults
from unetgn.ops import implementation
from unetgn.ops.triton.device import clusters, device_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", list(checks()), ids=str)
def test_forward_and_backward_match_the_definition_in_float64_twice_alike(check: Check) -> None:
    assert faults(check, "triton", "cuda") == []


@pytest.mark.parametrize("check", list(cluster_checks()), ids=str)
def test_clusters_match_the_definition(check: Check) -> None:
    if device_of(torch.device("cuda")).largest_cluster == 1:
        pytest.skip("this device has no clusters")
    with clusters(True):
        assert faults(check, "triton", "cuda") == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 1280, 8, 8), (1, 320, 64, 64), (2, 96, 15, 17)], ids=str)
def test_a_captured_graph_replays_forward_and_backward_on_new_inputs(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(shape, generator=generator, device="cuda").contiguous(memory_format=memory_format)
    weight = torch.randn(shape[1], generator=generator, device="cuda").requires_grad_()
    x.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        y = unetgn.group_norm_silu(x, 32, weight)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn(shape, generator=generator, device="cuda"))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


def skip_unless_free(gigabytes: float) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free memory")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_last_sample_of_more_than_two_to_the_31_elements_is_as_if_it_were_alone(
    memory_format: torch.memory_format,
) -> None:
    skip_unless_free(24)
    x = torch.empty(33, 256, 512, 512, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    assert x.numel() > 2**31
    for sample in x:
        sample.normal_(mean=1.0)
    results = []
    for given in (x, x[-1:].clone(memory_format=memory_format)):
        y = unetgn.group_norm_silu(given.requires_grad_(), 32)
        (dx,) = torch.autograd.grad(y, given, torch.ones((), dtype=x.dtype, device="cuda").expand_as(y))
        results.append((y[-1].detach().clone(), dx[-1].clone()))
    for among_others, alone in zip(*results, strict=True):
        torch.testing.assert_close(among_others, alone, rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_group_of_more_than_two_to_the_31_elements(memory_format: torch.memory_format) -> None:
    """Half of the elements are 1 and half are -1: mean 0, variance 1, and dy = 1 has no component that changes x."""
    skip_unless_free(40)
    x = torch.empty(1, 2, 2**15, 2**15 + 2**14, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    assert x.numel() > 2**31
    x[:, 0], x[:, 1] = 1.0, -1.0
    y = unetgn.group_norm_silu(x.requires_grad_(), 1)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), dtype=x.dtype, device="cuda").expand_as(y))
    for channel, sign in enumerate((1.0, -1.0)):
        exact = torch.nn.functional.silu(torch.tensor(sign)).item()
        assert y[0, channel].min().item() == pytest.approx(exact, rel=4e-3)
        assert y[0, channel].max().item() == pytest.approx(exact, rel=4e-3)
        assert dx[0, channel].abs().max().item() < 1e-3


def test_a_device_that_is_not_the_current_one_works() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    x = torch.randn(2, 8, 4, 4, device="cuda:1", requires_grad=True)
    with implementation("triton"):
        y = unetgn.group_norm_silu(x, 2)
        y.sum().backward()
    with implementation("reference"):
        torch.testing.assert_close(y, unetgn.group_norm_silu(x.detach(), 2))


def test_a_channels_last_call_makes_no_hidden_copy() -> None:
    x = torch.randn(8, 320, 64, 64, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    unetgn.group_norm_silu(x, 32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = unetgn.group_norm_silu(x, 32)
    peak = torch.cuda.max_memory_allocated() - before
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert peak < 1.2 * x.numel() * x.element_size()
