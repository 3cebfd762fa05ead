"""A copy of a fused module runs its own layers; exporters see a function of PyTorch's kind."""

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import unetgn
from tests import tensors
from tests.fusion.models import SMALL

noise = functools.partial(tensors.noise, dtype=torch.float32)


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())


def shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def replica(module: nn.Module) -> nn.Module:
    """Copy as torch.nn.DataParallel does for each device."""
    return module._replicate_for_data_parallel()


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [shallow, replica, copy.deepcopy, pickled])
def test_a_copy_runs_its_own_layers(copied: Callable[[nn.Module], nn.Module], calls):
    model, x = pair(), noise(2, 4, 3, 3)
    unetgn.fuse(model)
    original = model(x)
    twin = copied(model)
    twin._modules["0"] = nn.GroupNorm(2, 4)
    nn.init.constant_(twin._modules["0"].weight, 5.0)
    calls.clear()
    torch.testing.assert_close(twin(x), nn.functional.silu(twin._modules["0"](x)))
    assert len(calls) == 1
    unetgn.unfuse(twin)
    assert "forward" not in vars(twin)
    calls.clear()
    assert torch.equal(model(x), original)
    assert len(calls) == 1


def test_a_copy_of_an_unfused_module_is_unfused():
    model = pair()
    unetgn.fuse(model)
    unetgn.unfuse(model)
    assert "forward" not in vars(copy.deepcopy(model))
    assert vars(copy.copy(model)).keys() == vars(pair()).keys()


@pytest.mark.parametrize("order", ["fuse first", "offload first"])
def test_a_deep_copy_below_a_hook_of_accelerate_is_independent(order, calls):
    from accelerate import cpu_offload_with_hook

    model, x = nn.ModuleList([pair()]), noise(2, 4, 3, 3)
    if order == "fuse first":
        unetgn.fuse(model)
    cpu_offload_with_hook(model[0], execution_device=torch.device("cpu"))
    unetgn.fuse(model)
    twin = copy.deepcopy(model)
    unetgn.unfuse(model)
    model[0](x)
    assert not calls
    assert len(unetgn.fuse(twin).fused) == 1


def test_a_fused_root_exports_with_the_operator_in_its_graph():
    model, x = pair().eval(), noise(2, 4, 3, 3)
    unetgn.fuse(model)
    exported = torch.export.export(model, (x,))
    assert any("group_norm_silu" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_a_fused_u_net_exports():
    model = SMALL.model().eval()
    unetgn.fuse(model)
    inputs = SMALL.inputs()
    exported = torch.export.export(model, (), kwargs=inputs)
    torch.testing.assert_close(exported.module()(**inputs).sample, model(**inputs).sample)


def test_a_trace_of_a_fused_module_holds_for_other_shapes_too():
    model = pair().eval()
    unetgn.fuse(model)
    traced = torch.jit.trace(model, noise(2, 4, 3, 3))
    x = noise(3, 4, 6, 6)
    torch.testing.assert_close(traced(x), model(x))


def test_a_model_is_unfused_before_it_is_scripted():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU())
    x = noise(2, 4, 3, 3)
    expected = model(x)
    unetgn.fuse(model)
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="variable number of arguments"):
        torch.jit.script(model)
    unetgn.unfuse(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
