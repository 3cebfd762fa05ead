"""Makes what the tests of the operator share: random inputs, the definition in float64, the places where it runs."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unetgn.ops.arguments import Arguments

# Where the operator is tested in this process: Triton's interpreter, chosen when Triton is imported, has one of its own
# (`test_triton_interpreter.py`), and GPUs are added where there are any.
PLACES = [pytest.param(("aten", "cpu"), id="aten"), pytest.param(("reference", "cpu"), id="reference")]
if os.environ.get("TRITON_INTERPRET") == "1":
    PLACES.append(pytest.param(("triton", "cpu"), id="triton-interpreted"))
if torch.cuda.is_available():
    PLACES.append(pytest.param(("aten", "cuda"), id="aten-cuda", marks=pytest.mark.gpu))
    PLACES.append(pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu))


@dataclass
class Inputs:
    """Holds the tensors of one call, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    pre_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    dy: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        values = (getattr(self, field.name) for field in fields(self))
        return Inputs(*(None if value is None else change(value) for value in values))

    def keywords(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in ("weight", "bias", "pre_bias", "scale", "shift")}

    def leaves(self) -> list[Tensor]:
        return [value for value in (self.x, *self.keywords().values()) if value is not None]

    def arguments(self, num_groups: int, implementation: str = "aten", *, activation: bool = True) -> Arguments:
        """Return the operator's arguments, as the registered operator takes them one by one."""
        return Arguments(
            self.x, num_groups, eps=1e-5, activation=activation, implementation=implementation, **self.keywords()
        )

    def requires_grad(self) -> "Inputs":
        for leaf in self.leaves():
            leaf.requires_grad_()
        return self

    def call(self, function: Callable[..., Tensor], num_groups: int, **options: object) -> tuple[Tensor, list[Tensor]]:
        """Return y and the gradients of all leaves, of which the inputs are left without."""
        detached = self.map(lambda value: value.detach()).requires_grad()
        y = function(detached.x, num_groups, **detached.keywords(), **options)
        return y.detach(), list(torch.autograd.grad(y, detached.leaves(), detached.dy))


def define(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Compute the operator in the words of PyTorch, for float64 inputs; its derivatives are PyTorch's."""

    def spread(values: Tensor) -> Tensor:
        return values if values.dim() > 2 else values.reshape(*values.shape, *(1,) * (x.dim() - 2))

    h = x if pre_bias is None else x + spread(pre_bias)
    grouped = h.reshape(h.shape[0], num_groups, h.shape[1] // num_groups, *h.shape[2:])
    axes = tuple(range(2, grouped.dim()))
    var, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
    z = ((grouped - mean) / torch.sqrt(var + eps)).reshape(h.shape)
    z = z if weight is None else z * spread(weight)
    z = z if bias is None else z + spread(bias)
    z = z if scale is None else z * (1 + spread(scale))
    z = z if shift is None else z + spread(shift)
    return F.silu(z) if activation else z


@pytest.fixture(autouse=True, scope="session")
def triton_patches_its_language_once() -> None:
    """Spare the interpreter a third of its time.

    For each launch it replaces the functions of `triton.language` (Triton 3.5 to 3.7), and then again, by the same
    ones, in each call of one function by another within a kernel.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from triton.runtime.interpreter import InterpretedFunction

        patching = InterpretedFunction.__call__

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            ours = not self.fn.__module__.startswith(
                "triton."
            )  # Triton's own functions use other modules of its language
            return self.rewrite()(*args, **kwargs) if ours else patching(self, *args, **kwargs)

        InterpretedFunction.__call__ = call


@pytest.fixture
def draw() -> Callable[..., Inputs]:
    """Draw random inputs: draw(seed, shape, dtype=…, channels_last=…, parameters=…, mean=…).

    Of the parameters, scale and shift are maps, of x's shape, where "maps" is named, too.
    """

    def drawn(
        seed: int,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        parameter_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        parameters: str = "weight bias pre_bias scale shift",
        mean: float = 0.0,
        device: str = "cpu",
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device, kind)

        sizes = {
            "weight": shape[1:2],
            "bias": shape[1:2],
            "pre_bias": shape[:2],
            "scale": shape if "maps" in parameters.split() else shape[:2],
            "shift": shape if "maps" in parameters.split() else shape[:2],
        }
        x, dy = normal(shape, torch.float64) + mean, normal(shape, torch.float64)
        if channels_last:
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            x, dy = (torch.empty_like(t, memory_format=layout).copy_(t) for t in (x, dy))  # also where both fit
        named = {
            name: normal(size, parameter_dtype or dtype) if name in parameters.split() else None
            for name, size in sizes.items()
        }
        return Inputs(x.to(dtype), *named.values(), dy.to(dtype))

    return drawn


@pytest.fixture
def in_double() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """Compute y and gradients of the definition in float64: in_double(inputs, num_groups, …)."""

    def computed(inputs: Inputs, num_groups: int, **options: object) -> tuple[Tensor, list[Tensor]]:
        return inputs.map(lambda value: value.double()).call(define, num_groups, **options)

    return computed


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Name an implementation and a device that it is tested on."""
    return request.param


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Return the root mean square of the difference over that of the expected values."""

    def error(actual: Tensor, expected: Tensor) -> float:
        difference = actual.detach().double() - expected.detach()
        return (difference.square().mean().sqrt() / expected.square().mean().sqrt()).item()

    return error


@pytest.fixture
def definition() -> Callable[..., Tensor]:
    """Return the definition as a function with the operator's arguments."""
    return define
