"""Tests the operator under torch.compile, torch.export, fake tensors, counters and CUDA graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import unetgn
from unetgn.ops import dispatch, group_norm_silu_with_shortcut, implementation
from unetgn.ops.layout import is_channels_last

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@LAYOUTS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_call_without_graph_breaks_gives_the_eager_values(draw, place, dynamic, channels_last):
    name, device = place
    backend = "aot_eager" if name == "reference" else "inductor"  # the former is quick
    compiled = torch.compile(unetgn.group_norm_silu, fullgraph=True, backend=backend, dynamic=dynamic)
    for seed, shape in enumerate(((2, 6, 4, 5), (3, 6, 7, 2))):
        inputs = draw(seed, shape, channels_last=channels_last, device=device)
        with implementation(name):
            y, gradients = inputs.call(compiled, 3)
            expected, expected_gradients = inputs.call(unetgn.group_norm_silu, 3)
        for got, want in zip([y, *gradients], [expected, *expected_gradients], strict=True):
            torch.testing.assert_close(got, want)
        assert y.stride() == inputs.x.stride()
        if name != "reference":  # whose gradient is the compiler's
            assert gradients[0].stride() == inputs.x.stride()


def test_a_shortcut_is_compiled_as_the_operator_and_x(draw):
    inputs = draw(0, (2, 6, 4, 5))

    def loss(x, function):
        y, x = function(x, 3)
        return (y.square() + x.sin()).sum()

    x = inputs.x.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, group_norm_silu_with_shortcut), x)
    (expected,) = torch.autograd.grad(loss(x, lambda x, groups: (unetgn.group_norm_silu(x, groups), x)), x)
    torch.testing.assert_close(found, expected)


def test_dynamic_shapes_are_compiled_once(draw):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(unetgn.group_norm_silu, fullgraph=True, backend=counter, dynamic=True)
    for seed, shape in enumerate(((2, 6, 4, 5), (3, 6, 7, 2), (5, 6, 9, 9))):
        inputs = draw(seed, shape)
        compiled(inputs.x, 3, **inputs.keywords())
    assert counter.frame_count == 1


def test_a_compiled_module_among_others_gives_the_eager_values(draw):
    net = torch.nn.Sequential(torch.nn.Conv2d(6, 12, 3), unetgn.GroupNormSiLU(4, 12), torch.nn.Conv2d(12, 6, 3))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draw(0, (2, 6, 8, 8)).x.contiguous(memory_format=layout)
        net = net.to(memory_format=layout)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        net.zero_grad()
        net(x).square().sum().backward()
        expected = [parameter.grad for parameter in net.parameters()]
        net.zero_grad()
        compiled(x).square().sum().backward()
        for parameter, want in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)


def test_inductor_hands_over_the_layout_that_its_convolutions_have(draw, monkeypatch):
    """It runs them in channels_last whatever comes in; in another layout each call would be copied around."""
    net = torch.nn.Sequential(torch.nn.Conv2d(6, 12, 3), unetgn.GroupNormSiLU(4, 12), torch.nn.Conv2d(12, 6, 3))
    x = draw(0, (2, 6, 8, 8)).x.requires_grad_()
    y = net(x)
    expected = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
    seen = {}

    def watched(name, function):
        def call(*given):
            seen[name] = [is_channels_last(getattr(value, "x", value)) for value in given[: 1 + (name == "backward")]]
            return function(*given)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(dispatch, name, watched(name, getattr(dispatch, name)))
    with torch._inductor.config.patch(force_disable_caches=True):  # a graph on disk is found whatever the operator says
        found = torch.compile(net, fullgraph=True)(x)
        gradients = torch.autograd.grad(found.square().sum(), [x, *net.parameters()])
    for got, want in zip([found, *gradients], [y, *expected], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert found.stride() == y.stride()
    assert seen == {"forward": [True], "backward": [True, True]}  # of x; of dy and x


BEFORE = {  # what stands before the operator, on the result of a convolution of 8 channels
    "a slice": lambda h: h[:, :, 1:, ::2],
    "every second channel": lambda h: h[:, ::2],
    "transposed": lambda h: h.transpose(2, 3),
    "one spatial axis": lambda h: h.flatten(2),
    "tokens": lambda h: h.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
    "of two layouts": lambda h: torch.cat([h, torch.ones_like(h, memory_format=torch.contiguous_format)], 1),
    "expanded": lambda h: h[:, :, :1].expand(-1, -1, 3, -1),
    "one element": lambda h: h.mean((2, 3), keepdim=True),
    "no spatial axis": lambda h: h.mean((2, 3)),
    "one sample": lambda h: h[:1],
    "a volume": lambda h: h.unsqueeze(2).repeat(1, 1, 2, 1, 1),
    "flipped": lambda h: h.flip(3),
    "larger": lambda h: torch.nn.functional.interpolate(h, scale_factor=2.0),
    "unshuffled": lambda h: torch.nn.functional.pixel_unshuffle(h, 2),
}


@LAYOUTS
def test_inductor_may_hand_over_any_layout(draw, channels_last):
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1)
    inputs = draw(0, (3, 8, 6, 8), parameters="scale shift maps", channels_last=channels_last).requires_grad()
    vector = draw(1, (3, 8)).x.requires_grad_()

    def normalized(x, scale, shift, vector):
        h = convolution(x)
        found = {name: unetgn.group_norm_silu(before(h), 2) for name, before in BEFORE.items()}
        found["maps"] = unetgn.group_norm_silu(h, 2, scale=scale, shift=2 * shift)
        found["vectors"] = unetgn.group_norm_silu(h.sin(), 2, pre_bias=vector)
        return found | {"between": convolution(unetgn.group_norm_silu(h, 4))}

    def values_and_gradients(function):
        leaves = [*inputs.leaves(), vector]
        found = function(*leaves)
        loss = sum((y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum() for y in found.values())
        return found, torch.autograd.grad(loss, leaves)

    expected, expected_gradients = values_and_gradients(normalized)
    with torch._inductor.config.patch(force_disable_caches=True):
        found, gradients = values_and_gradients(torch.compile(normalized, fullgraph=True, dynamic=False))
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-4, msg=lambda why, name=name: f"{name}: {why}")
        assert found[name].stride() == want.stride(), name
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_gives_the_same_values_and_gradients(draw, strict):
    norm = unetgn.GroupNormSiLU(3, 6)
    free = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        norm, (draw(0, (2, 6, 4, 5)).x,), dynamic_shapes=({0: free, 2: free, 3: free},), strict=strict
    ).module()
    x = draw(1, (3, 6, 7, 2)).x
    y = exported(x)
    assert torch.equal(y, norm(x))
    gradients = torch.autograd.grad(y.square().sum(), list(exported.parameters()))
    expected = torch.autograd.grad(norm(x).square().sum(), list(norm.parameters()))
    assert all(map(torch.equal, gradients, expected))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "parameters", ["", "weight", "weight bias pre_bias scale shift", "weight bias pre_bias scale shift maps"]
)
def test_opcheck_passes_for_the_registered_operators(draw, parameters, dtype, channels_last):
    inputs = draw(0, (2, 6, 3, 4), dtype=dtype, parameters=parameters, channels_last=channels_last)
    arguments = inputs.arguments(3)
    torch.library.opcheck(torch.ops.unetgn.group_norm_silu.default, tuple(arguments))

    _, mean, rstd = torch.ops.unetgn.group_norm_silu(*arguments)
    present = [value is not None for value in inputs.keywords().values()]
    for needs in ([True, *present], [True, *[False] * 5], [False, *present]):
        named = {"dy": inputs.dy, "mean": mean, "rstd": rstd, "needs": needs, **arguments._asdict()}
        torch.library.opcheck(torch.ops.unetgn.group_norm_silu_backward.default, (), named)


@pytest.mark.parametrize("maps", ["", " maps"])
@pytest.mark.parametrize(
    "shape", [(4, 6), (2, 6, 1, 1), (2, 1, 3, 3), (0, 6, 2, 2), (2, 6, 5), (2, 6, 2, 3, 2)], ids=str
)
def test_fake_tensors_have_the_shapes_strides_and_dtypes_of_the_values(draw, shape, maps):
    inputs = draw(0, shape, parameters=f"weight bias pre_bias scale shift{maps}").requires_grad()
    groups = 3 if shape[1] == 6 else 1
    y = unetgn.group_norm_silu(inputs.x, groups, **inputs.keywords())
    with FakeTensorMode() as mode:
        fake = inputs.map(lambda value: mode.from_tensor(value))
        faked = unetgn.group_norm_silu(fake.x, groups, **fake.keywords())
        gradients = torch.autograd.grad(faked, fake.leaves(), fake.dy)
    assert (faked.shape, faked.dtype) == (y.shape, y.dtype)
    assert faked.is_contiguous() == y.is_contiguous()
    for gradient, leaf in zip(gradients, inputs.leaves(), strict=True):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)


def test_meta_tensors_work(draw):
    inputs = draw(0, (2, 6, 4, 4), channels_last=True)
    meta = inputs.map(lambda value: value.to("meta"))
    y, gradients = meta.call(unetgn.group_norm_silu, 3)
    assert y.is_meta
    assert y.stride() == inputs.x.stride()
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in inputs.leaves()]


def test_a_traced_graph_holds_the_registered_operator(draw):
    inputs = draw(0, (2, 6, 4, 4))
    graph = make_fx(lambda x: unetgn.group_norm_silu(x, 3))(inputs.x)
    assert torch.ops.unetgn.group_norm_silu.default in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(inputs.dy), unetgn.group_norm_silu(inputs.dy, 3))


def test_the_flop_counter_counts_what_it_counts_for_group_norm_of_pytorch(draw):
    convolution = torch.nn.Conv2d(6, 6, 3)
    x = draw(0, (2, 6, 8, 8)).x.requires_grad_()

    def count(norm):
        with FlopCounterMode(display=False) as counter:
            norm(convolution(x)).sum().backward()
        return counter.get_total_flops()

    ours = count(unetgn.GroupNormSiLU(3, 6))
    assert ours == count(torch.nn.Sequential(torch.nn.GroupNorm(3, 6), torch.nn.SiLU())) > 0


def test_values_under_a_dispatch_mode_are_those_without(draw):
    inputs = draw(1, (2, 6, 4, 4))
    expected, expected_gradients = inputs.call(unetgn.group_norm_silu, 3)
    with FlopCounterMode(display=False):
        y, gradients = inputs.call(unetgn.group_norm_silu, 3)
    assert all(map(torch.equal, [y, *gradients], [expected, *expected_gradients]))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_torch_func_transforms_give_the_eager_values(draw, transform):
    x = draw(2, (2, 6, 3, 3)).x

    def call(x):
        operator = lambda x: unetgn.group_norm_silu(x, 3)  # noqa: E731
        if transform == "grad":
            return torch.func.grad(lambda x: operator(x).square().sum())(x)
        if transform == "vmap":
            return torch.func.vmap(operator)(torch.stack([x, 2 * x]))
        return torch.func.jvp(operator, (x,), (x,))[1]

    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), call(x))


def test_a_compiler_does_not_trace_the_inside_of_the_registered_operator(draw):
    """Not even where it has compiled under forward-mode differentiation before, and sees the operator run."""
    x = draw(4, (2, 6, 3, 3)).x
    counters.clear()
    compiled = torch.compile(lambda x: unetgn.group_norm_silu(x, 3), backend="aot_eager")
    torch.func.jvp(compiled, (x,), (x,))
    torch.testing.assert_close(compiled(x), unetgn.group_norm_silu(x, 3))
    assert not [reason for reason in counters["graph_break"] if "item()" in reason]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@LAYOUTS
@pytest.mark.parametrize("name", ["aten", "triton"])
def test_a_cuda_graph_replays_forward_and_backward(draw, name, channels_last):
    inputs = draw(3, (2, 32, 16, 16), channels_last=channels_last, device="cuda").requires_grad()

    def step():
        y = unetgn.group_norm_silu(inputs.x, 8, **inputs.keywords())
        return (y, *torch.autograd.grad(y, inputs.leaves(), inputs.dy))

    with implementation(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: kernels are compiled outside of the capture
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            inputs.x.copy_(torch.randn_like(inputs.x))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_compiler_sees_one_operator_and_none_of_its_parts():
    """On a CPU, Inductor's own fusion of the parts is slower than the operator."""
    recorder = EagerAndRecordGraphs()
    torch.compile(unetgn.group_norm_silu, fullgraph=True, backend=recorder)(torch.ones(1, 2, 3), 1)
    (graph,) = recorder.graphs
    operator, getitem = (node for node in graph.graph.nodes if node.op == "call_function")
    assert operator.target == torch.ops.unetgn.group_norm_silu
    assert getitem.args == (operator, 0)


def test_exported_graphs_find_the_operators_with_the_arguments_that_they_were_saved_with():
    parameters = "Tensor? pre_bias, Tensor? scale, Tensor? shift"
    assert str(torch.ops.unetgn.group_norm_silu.default._schema) == (
        "unetgn::group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
        f"bool activation, {parameters}, str implementation) -> (Tensor y, Tensor mean, Tensor rstd)"
    )
    assert str(torch.ops.unetgn.group_norm_silu_backward.default._schema) == (
        "unetgn::group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt num_groups, "
        f"Tensor? weight, Tensor? bias, bool activation, {parameters}, bool[6] needs, str implementation, "
        "float eps=-1.) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpre_bias, Tensor dscale, Tensor dshift)"
    )


def test_a_graph_that_does_not_give_eps_backward_gets_the_same_gradients(draw, in_double):
    """Such graphs lie on the disks of those who compiled with the operator as it was before."""
    inputs = draw(3, (2, 6, 4, 5), dtype=torch.float64, parameters="weight bias")
    arguments = inputs.arguments(3)
    _, mean, rstd = torch.ops.unetgn.group_norm_silu(*arguments)
    x, num_groups, weight, bias, _, *rest, implementation = arguments
    needs = [True, True, True, False, False, False]
    given = inputs.dy, x, mean, rstd, num_groups, weight, bias, *rest, needs, implementation
    gradients = torch.ops.unetgn.group_norm_silu_backward(*given)
    _, expected = in_double(inputs, 3)
    for got, want in zip(gradients[:3], expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_draft_export_holds_the_definition():
    """PyTorch refuses operators of which an optional tensor is None there, and so ours."""
    module, x = unetgn.GroupNormSiLU(2, 8).requires_grad_(False), torch.randn(2, 8, 4, 4)
    with implementation("reference"):
        program = torch.export.draft_export(module, (x,))
    assert not any("unetgn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))
