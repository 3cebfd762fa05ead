"""Puts everything that holds the operator under everything that looks at it from outside.

Each pair of a subject and a tracer works, with the untraced values and gradients, or the plain original (diffusers'
network, PyTorch's norm and SiLU) does not work there either, or it is refused by name: `REFUSED`.
"""

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.export import Dim, export
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from tests import tensors
from tests.tensors import randomized
from unetgn import GroupNormSiLU, ResBlock, UNet, fuse, group_norm_silu
from unetgn.nn import NormConfig

noise = functools.partial(tensors.noise, dtype=torch.float32)
# Samples, pixels along each axis. None is a width of the networks: tracers take equal sizes for the same size.
SIZE, OTHER_SIZE = (7, 12), (4, 18)


class Function(nn.Module):
    """Holds the parameters of a function of x, four groups, weight and bias."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, 4, self.weight, self.bias)


class Block(nn.Module):
    """Calls a residual block as networks do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.block(x, emb)


class Network(nn.Module):
    """Calls a network, with labels, and takes the tensor of what it returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, timesteps, class_labels=labels).sample


def plain_function(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias))


def plain_norm() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU())


def plain_block() -> nn.Module:
    return Block(ResnetBlock2D(in_channels=8, temb_channels=6, groups=4))


def plain_network() -> nn.Module:
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    return Network(UNet2DModel(in_channels=3, out_channels=3, num_class_embeds=5, **kinds, **sizes))


def fused(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        module = nn.ModuleDict(
            {"held": make()}
        )  # what is fused is within: torch.fx calls the class's forward of a root
        assert fuse(module).fused
        return module["held"]

    return made


def own_network() -> nn.Module:
    levels = {"channels": (8, 8), "depth": 0, "attention_levels": (), "mid": {"depth": 0}}
    return Network(UNet(**levels, norm={"num_groups": 4}, num_classes=5))


def of_norm(samples: int, pixels: int) -> tuple[Tensor, ...]:
    return (noise(samples, 8, pixels, pixels),)


def of_block(samples: int, pixels: int) -> tuple[Tensor, ...]:
    return noise(samples, 8, pixels, pixels), noise(samples, 6, seed=1)


def of_network(samples: int, pixels: int) -> tuple[Tensor, ...]:
    return noise(samples, 3, pixels, pixels), torch.arange(samples) * 100 + 5, torch.arange(samples) % 5


# Makes ours and the plain original, and the inputs.
SUBJECTS = {
    "operator": (lambda: Function(group_norm_silu), lambda: Function(plain_function), of_norm),
    "GroupNormSiLU": (lambda: GroupNormSiLU(4, 8), plain_norm, of_norm),
    "fused Sequential": (lambda: nn.Sequential(fused(plain_norm)()), plain_norm, of_norm),
    "ResBlock": (lambda: Block(ResBlock(8, emb_channels=6, norm=NormConfig(num_groups=4))), plain_block, of_block),
    "fused ResnetBlock2D": (fused(plain_block), plain_block, of_block),
    "UNet": (own_network, plain_network, of_network),
    "fused UNet2DModel": (fused(plain_network), plain_network, of_network),
}


class Subject:
    """Holds a module and its inputs, and compares what a tracer makes of them."""

    def __init__(self, make: Callable[[], nn.Module], inputs: Callable[[int, int], tuple[Tensor, ...]]) -> None:
        self.make, self.inputs = make, inputs
        self.module = randomized(make()).eval()

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}

    def compare(self, traced: Callable[..., Tensor], size: tuple[int, int] = OTHER_SIZE) -> None:
        """Compare values."""
        inputs = self.inputs(*size)
        torch.testing.assert_close(traced(*inputs), self.module(*inputs), rtol=1e-4, atol=1e-5)

    def compare_gradients(self, traced: nn.Module, size: tuple[int, int] = OTHER_SIZE) -> None:
        """Compare the gradients of the parameters too, by their names."""
        self.compare(traced, size)
        found = gradients(traced, traced(*self.inputs(*size)))
        expected = gradients(self.module, self.module(*self.inputs(*size)))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def gradients(module: nn.Module, y: Tensor) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def free(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """Leave the number of samples and of pixels open. `Dim.DYNAMIC` is an error where a size is fixed after all."""
    return tuple(dict.fromkeys([0, *range(2, tensor.ndim)], Dim.DYNAMIC) for tensor in inputs)


def exporting(subject: Subject, *, strict: bool) -> None:
    inputs = subject.inputs(*SIZE)
    program = export(subject.module, inputs, dynamic_shapes=free(inputs), strict=strict)
    subject.compare_gradients(program.module())


def compiling(subject: Subject) -> None:
    compiled = torch.compile(subject.module, backend="eager", fullgraph=True, dynamic=True)
    for size in (SIZE, OTHER_SIZE):
        subject.compare(compiled, size)
    expected = gradients(subject.module, subject.module(*subject.inputs(*SIZE)))
    found = gradients(subject.module, compiled(*subject.inputs(*SIZE)))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def symbolic_trace(subject: Subject) -> None:
    traced = torch.fx.symbolic_trace(subject.module)
    assert set(traced.state_dict()) == set(subject.module.state_dict())
    subject.compare_gradients(traced)
    subject.compare_gradients(pickle.loads(pickle.dumps(traced)))


def making_fx(subject: Subject) -> None:
    """Trace with symbolic sizes."""
    call = lambda parameters, *inputs: functional_call(subject.module, parameters, inputs)  # noqa: E731
    traced = make_fx(call, tracing_mode="symbolic")(subject.parameters, *subject.inputs(*SIZE))
    subject.compare(functools.partial(traced, subject.parameters))


def making_fx_of_gradients(subject: Subject) -> None:
    """Trace forward and backward with real tensors."""

    def loss(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return functional_call(subject.module, parameters, inputs).square().sum()

    def call(parameters: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        leaves = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
        found = torch.autograd.grad(loss(leaves, *inputs), list(leaves.values()), allow_unused=True)
        return {name: part for name, part in zip(leaves, found, strict=True) if part is not None}

    found = make_fx(call)(subject.parameters, *subject.inputs(*SIZE))(subject.parameters, *subject.inputs(*SIZE))
    for name, expected in gradients(subject.module, subject.module(*subject.inputs(*SIZE))).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)


def without_numbers(subject: Subject, mode: Any, converted: Callable[[Tensor], Tensor]) -> None:
    inputs = subject.inputs(*SIZE)
    expected = subject.module(*inputs)
    with mode:
        module = subject.make().eval()
        y = module(*map(converted, inputs))
        found = gradients(module, y)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert {name: part.shape for name, part in found.items()} == {
        name: part.shape for name, part in gradients(subject.module, expected).items()
    }


def with_fake_tensors(subject: Subject) -> None:
    mode = FakeTensorMode()
    without_numbers(subject, mode, mode.from_tensor)


def on_the_meta_device(subject: Subject) -> None:
    without_numbers(subject, torch.device("meta"), lambda tensor: tensor.to("meta"))


def gradients_of_each_sample(subject: Subject) -> None:
    """Map the gradient over samples, labels among them."""

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(subject.module, parameters, tuple(part[None] for part in sample)).square().sum()

    inputs = subject.inputs(*SIZE)
    mapped = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(subject.parameters, *inputs)
    for index in range(SIZE[0]):
        y = subject.module(*(part[index : index + 1] for part in inputs))
        for name, expected in gradients(subject.module, y).items():
            torch.testing.assert_close(mapped[name][index], expected, rtol=1e-3, atol=1e-4)


class Tagged(Tensor):
    """Carries a tag through PyTorch's functions, as MONAI's MetaTensor its affine matrix, and overrides methods."""

    tag = "none"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        tagged = next((part for part in tree_leaves((args, kwargs)) if isinstance(part, Tagged)), None)
        if isinstance(result, Tagged) and tagged is not None:
            result.tag = tagged.tag
        return result

    def new_empty(self, size: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        raise TypeError("a method of the subclass, within the operator or its backward pass")

    new_zeros = new_ones = new_empty  # type: ignore[assignment]


def train_on(subject: Subject, subclass: type[Tensor], which: slice) -> None:
    inputs = list(subject.inputs(*SIZE))
    expected = subject.module(*inputs)
    inputs[which] = [part.as_subclass(subclass) for part in inputs[which]]
    inputs[0].requires_grad_()
    if subclass is Tagged:
        inputs[0].tag = "kept"  # type: ignore[attr-defined]
    y = subject.module(*inputs)
    assert type(y) is subclass
    assert getattr(y, "tag", "kept") == "kept"
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    y.square().sum().backward()
    wanted = gradients(subject.module, expected)
    for name, parameter in subject.module.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad.as_subclass(Tensor), wanted[name], rtol=1e-3, atol=1e-4)
    assert inputs[0].grad is not None


def train_on_a_subclass(subject: Subject) -> None:
    train_on(subject, Tagged, slice(1))


def train_on_a_subclass_for_all(subject: Subject) -> None:
    train_on(subject, Tagged, slice(None))


def train_on_meta_tensors(subject: Subject) -> None:
    train_on(subject, pytest.importorskip("monai.data").MetaTensor, slice(1))


def with_parameters_of_a_subclass(subject: Subject) -> None:
    parameters = {name: part.as_subclass(Tagged).requires_grad_() for name, part in subject.parameters.items()}
    y = functional_call(subject.module, parameters, subject.inputs(*SIZE))
    expected = subject.module(*subject.inputs(*SIZE))
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    y.square().sum().backward()
    for name, gradient in gradients(subject.module, expected).items():
        torch.testing.assert_close(parameters[name].grad.as_subclass(Tensor), gradient, rtol=1e-3, atol=1e-4)


def distributed(subject: Subject, placement: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    module = distribute_module(copy.deepcopy(subject.module), mesh)
    inputs = [distribute_tensor(part, mesh, [placement]) for part in subject.inputs(*SIZE)]
    inputs[0].requires_grad_()
    y, expected = module(*inputs), subject.module(*subject.inputs(*SIZE))
    torch.testing.assert_close(y.full_tensor(), expected)
    found = gradients(module, y)
    for name, gradient in gradients(subject.module, expected).items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-3, atol=1e-4)


def with_other_parameters(subject: Subject) -> None:
    others = {name: 2 * part for name, part in subject.parameters.items()}
    other = copy.deepcopy(subject.module)
    other.load_state_dict(others, strict=False)
    inputs = subject.inputs(*SIZE)
    torch.testing.assert_close(functional_call(subject.module, others, inputs), other(*inputs))


def with_a_default_device(subject: Subject) -> None:
    with torch.device("cpu"):
        y = subject.module(*subject.inputs(*SIZE))
    torch.testing.assert_close(y, subject.module(*subject.inputs(*SIZE)))


@pytest.mark.filterwarnings("ignore")
def tracing(subject: Subject) -> None:
    with torch.no_grad():
        subject.compare(torch.jit.trace(subject.module, subject.inputs(*SIZE)), SIZE)


TRACERS: dict[str, Callable[[Subject], None]] = {
    "export": functools.partial(exporting, strict=False),
    "strict export": functools.partial(exporting, strict=True),
    "compile": compiling,
    "fx.symbolic_trace": symbolic_trace,
    "make_fx": making_fx,
    "make_fx of gradients": making_fx_of_gradients,
    "FakeTensorMode": with_fake_tensors,
    "meta": on_the_meta_device,
    "vmap(grad)": gradients_of_each_sample,
    "a subclass": train_on_a_subclass,
    "a subclass everywhere": train_on_a_subclass_for_all,
    "MetaTensor": train_on_meta_tensors,
    "parameters of a subclass": with_parameters_of_a_subclass,
    "DTensor, whole": functools.partial(distributed, placement=Replicate()),
    "DTensor, by sample": functools.partial(distributed, placement=Shard(0)),
    "functional_call": with_other_parameters,
    "a default device": with_a_default_device,
    "jit.trace": tracing,
}
REFUSED = {
    **{(name, "jit.trace"): r"torch\.jit\.trace" for name in ("operator", "GroupNormSiLU", "ResBlock", "UNet")},
    ("UNet", "fx.symbolic_trace"): r"torch\.fx\.symbolic_trace cannot follow this network",
}


@pytest.fixture
def surroundings() -> Iterator[None]:
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of deprecation
@pytest.mark.parametrize(
    ("name", "tracer"),
    [
        # The longest is of a network of whose blocks one is here too, and ours is.
        pytest.param(name, tracer, marks=pytest.mark.slow if slow == (name, tracer) else ())
        for slow in [("fused UNet2DModel", "strict export")]
        for name in SUBJECTS
        for tracer in TRACERS
    ],
)
def test_it_works_under_a_tracer_or_is_refused(name: str, tracer: str, surroundings: None, one_thread: None) -> None:
    make, make_plain, inputs = SUBJECTS[name]
    if (name, tracer) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, tracer]):
            TRACERS[tracer](Subject(make, inputs))
        return
    try:
        TRACERS[tracer](Subject(make, inputs))
    except AssertionError:  # other values than the untraced ones
        raise
    except Exception as error:  # as the plain original does, and of the same kind
        with pytest.raises(type(error)):
            TRACERS[tracer](Subject(make_plain, inputs))
