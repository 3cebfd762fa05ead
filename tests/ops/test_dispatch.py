"""Tests which implementation computes the operator: by context manager, by environment variable, and by device."""

import asyncio
import os
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import unetgn
from unetgn.ops import aten, dispatch, implementation, reference

OPERATOR = torch.ops.unetgn.group_norm_silu
X = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch):
    """Note the names of the implementations that have computed something, in order."""
    seen = []

    def watched(name, function):
        def call(*arguments):
            seen.append(name)
            return function(*arguments)

        return call

    for module in (aten, reference):
        for function in ("forward", "backward"):
            name = f"{module.__name__.rpartition('.')[2]}.{function}"
            monkeypatch.setattr(module, function, watched(name, getattr(module, function)))
    return seen


def test_on_the_cpu_auto_is_aten(calls):
    unetgn.group_norm_silu(X, 3)
    assert calls == ["aten.forward"]


def test_a_device_that_is_no_gpu_of_triton_goes_through_aten():
    assert dispatch.resolve("auto", torch.empty(2, 6, device="meta")) is aten


def test_a_name_holds_inside_its_block_only(calls):
    with implementation("reference"):
        unetgn.group_norm_silu(X, 3)
        with implementation("aten"):
            unetgn.group_norm_silu(X, 3)
        unetgn.group_norm_silu(X, 3)
    unetgn.group_norm_silu(X, 3)
    assert calls == ["reference.forward", "aten.forward", "reference.forward", "aten.forward"]


def test_a_block_that_fails_restores_the_choice(calls):
    with pytest.raises(ZeroDivisionError), implementation("reference"):
        _ = 1 / 0
    unetgn.group_norm_silu(X, 3)
    assert calls == ["aten.forward"]


def test_choices_that_overlap_in_threads_do_not_meet():
    """The first one to begin is the first one to end: whoever restored what was there before would leave the other."""
    inside, ended = threading.Event(), threading.Event()
    seen = {}

    def second():
        seen["before"] = dispatch.chosen()
        with implementation("aten"):
            inside.set()
            ended.wait(60)
            seen["within"] = dispatch.chosen()
        seen["after"] = dispatch.chosen()

    thread = threading.Thread(target=second)
    with implementation("reference"):
        thread.start()
        assert inside.wait(60)
        assert dispatch.chosen() == "reference"
    assert dispatch.chosen() == "auto"
    ended.set()
    thread.join()
    assert seen == {"before": "auto", "within": "aten", "after": "auto"}
    assert dispatch.chosen() == "auto"
    compiled = torch.compile(lambda x: x + len(dispatch.chosen()), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == len("auto")  # what a compiler sees is as it was, too


def test_a_compiler_sees_the_choice_that_a_nested_block_of_another_ones_name_leaves():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + len(dispatch.chosen()), fullgraph=True, backend="eager")
    with implementation("reference"), implementation("aten"):
        with implementation("reference"):
            assert compiled(torch.zeros(())) == len("reference")
        assert compiled(torch.zeros(())) == len("aten")


def test_choices_of_tasks_that_take_turns_do_not_meet():
    async def asked(name, turns):
        with implementation(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert dispatch.chosen() == name

    async def both():
        await asyncio.gather(asked("reference", 2), asked("aten", 4))

    asyncio.run(both())
    assert dispatch.chosen() == "auto"


def test_backward_uses_the_implementation_of_its_forward(calls):
    x = X.clone().requires_grad_()
    with implementation("aten"):
        y = unetgn.group_norm_silu(x, 3)
    with implementation("reference"):
        y.sum().backward()
    assert calls == ["aten.forward", "aten.backward"]


def test_a_compiled_function_follows_the_choice():
    """It is compiled once for each; with reference the compiler sees the parts instead of the operator."""
    torch._dynamo.reset()
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(lambda x: unetgn.group_norm_silu(x, 3), fullgraph=True, backend=recorder)
    expected = unetgn.group_norm_silu(X, 3)
    for name in ("auto", "reference", "aten", "reference", "auto"):
        with implementation(name):
            torch.testing.assert_close(compiled(X), expected)
    operators = [graph.graph.find_nodes(op="call_function", target=OPERATOR) for graph in recorder.graphs]
    assert [[node.args[-1] for node in nodes] for nodes in operators] == [["auto"], [], ["aten"]]


def test_a_choice_inside_a_compiled_function_holds():
    torch._dynamo.reset()

    def both(x):
        with implementation("reference"):
            y = unetgn.group_norm_silu(x, 3)
        return unetgn.group_norm_silu(y, 3)

    recorder = EagerAndRecordGraphs()
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend=recorder)(X), both(X))
    (graph,) = recorder.graphs
    nodes = [node.target for node in graph.graph.nodes]
    assert torch.sigmoid in nodes  # the parts of the first call
    assert nodes.count(OPERATOR) == 1
    assert dispatch.chosen() == "auto"


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match=r"unknown implementation 'cuda'; choose one of auto, triton, aten, reference"):
        implementation("cuda").__enter__()


def test_triton_on_a_cpu_tensor_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with implementation("triton"), pytest.raises(RuntimeError, match=r"x is on cpu.*Choose 'auto' or 'aten'"):
        unetgn.group_norm_silu(X, 3)


def test_triton_without_triton_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with implementation("triton"), pytest.raises(RuntimeError, match="Triton is not installed"):
        unetgn.group_norm_silu(X, 3)


def in_a_process(code, **environment):
    environment = {**{k: v for k, v in os.environ.items() if k != "UNETGN_IMPLEMENTATION"}, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_variable_chooses_for_a_process():
    code = "from unetgn.ops import dispatch; print(dispatch.chosen())"
    assert in_a_process(code, UNETGN_IMPLEMENTATION="reference").stdout.strip() == "reference"


def test_a_wrong_environment_variable_is_an_error_that_names_it():
    result = in_a_process("import unetgn; unetgn.group_norm_silu", UNETGN_IMPLEMENTATION="fast")
    assert result.returncode == 1
    assert "environment variable UNETGN_IMPLEMENTATION: unknown implementation 'fast'" in result.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_under_the_interpreter_triton_computes_cpu_tensors_too():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = """
import torch, unetgn
x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
expected = unetgn.group_norm_silu(x, 3)
with unetgn.ops.implementation("triton"):
    y = unetgn.group_norm_silu(x, 3)
torch.testing.assert_close(y, expected)
for got, want in zip(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
"""
    result = in_a_process(code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


class Tagged(torch.Tensor):
    """Computes as any tensor."""


def recorded(way):
    """Let a tracer, a transform or a mode run a function of X, and return what `has_values` said within."""
    said = []

    class Asking(torch.nn.Module):
        def forward(self, x):
            said.append(dispatch.has_values(x))
            return x.sum()

    way(Asking())
    return said[0]


def with_fake_tensors(ask):
    with FakeTensorMode() as mode:
        ask(mode.from_tensor(X))


SEEN = {
    "eager": lambda ask: ask(X),
    "a parameter": lambda ask: ask(torch.nn.Parameter(X)),
    "a subclass": lambda ask: ask(X.as_subclass(Tagged)),
}
HIDDEN = {
    "export": lambda ask: torch.export.export(ask, (X,), strict=False),
    "make_fx": lambda ask: make_fx(ask)(X),
    "make_fx, symbolic": lambda ask: make_fx(ask, tracing_mode="symbolic")(X),
    "fake tensors": with_fake_tensors,
    "fake tensors outside of their mode": lambda ask: ask(FakeTensorMode().from_tensor(X)),
    "the meta device": lambda ask: ask(X.to("meta")),
    "vmap": lambda ask: torch.func.vmap(ask)(X),
    "grad": lambda ask: torch.func.grad(ask)(X),
    "jvp": lambda ask: torch.func.jvp(ask, (X,), (X,)),
    "functionalize": lambda ask: torch.func.functionalize(ask)(X),
    "jit.trace": lambda ask: torch.jit.trace(ask, X, check_trace=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [*SEEN, *HIDDEN])
def test_values_are_looked_at_where_nobody_records_or_maps_the_call(way):
    assert recorded((SEEN | HIDDEN)[way]) is (way in SEEN)


def test_a_compiler_finds_that_values_are_hidden():
    """It reads the code instead of running it, and sees the branch that is taken."""
    double = lambda x: x * 2 if dispatch.has_values(x) else x * 3  # noqa: E731
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), X * 3)
    assert torch.equal(double(X), X * 2)


@pytest.mark.parametrize("mode", [False, True], ids=["a subclass", "a mode"])
def test_a_handler_of_functions_sees_one_call_of_the_public_function(mode):
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})

    expected = unetgn.group_norm_silu(X, 3, torch.ones(6), pre_bias=torch.ones(2, 6))
    if mode:
        with Mode():
            y = unetgn.group_norm_silu(X, 3, torch.ones(6), pre_bias=torch.ones(2, 6))
        seen = [function for function in seen if function is unetgn.group_norm_silu]
    else:
        y = unetgn.group_norm_silu(X.as_subclass(Watching), 3, torch.ones(6), pre_bias=torch.ones(2, 6))
        del seen[1:]  # what `y` is asked for
        assert type(y) is Watching
    assert seen == [unetgn.group_norm_silu]
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
