"""Tests that warm launches go to compiled kernels directly, and only where that is what Triton would have launched.

Kernels are made up here: what is passed to Triton, and what to the launchers of the kernels that it returned, is noted.
The latter are given addresses for tensors.
"""

from typing import Any, ClassVar, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from unetgn.ops.triton import recipe  # noqa: E402  # only where Triton is installed
from unetgn.ops.triton.launch import launch_of  # noqa: E402


class Operands(NamedTuple):
    x: Any
    weight: Any
    scale: Any
    sums: Any
    folded: Any
    absent: Any
    pre_bias_stride: int
    scale_stride: int
    shift_stride: int


class Kernel:
    """Notes how it is launched; as Triton does, it returns the kernel that it compiled."""

    __name__ = "kernel"
    arg_names: ClassVar = ["x", "weight", "scale", "sums", "folded", "absent", "scale_stride", "SIZE"]

    def __init__(self) -> None:
        self.pre_run_hooks: list[Any] = []
        self.through_triton: list[Any] = []
        self.direct: list[Any] = []
        self.memory = torch.zeros(0)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*values: Any, **options: int) -> Any:
            self.through_triton.append((grid, values, options))
            compiled = object.__new__(triton.compiler.CompiledKernel)
            compiled.function, compiled.packed_metadata = len(self.through_triton), ("packed",)
            compiled._run = lambda *values: self.direct.append(values)
            return compiled

        return run


class Driver:
    def get_current_stream(self, device: int) -> int:
        return 70 + device


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(recipe, "_LAUNCHER_IS_KNOWN", True)
    return Kernel()


@pytest.fixture
def call(kernel):
    """Launch once with these tensors, as `entry` does, keeping what is compiled from call to call."""
    made, scratch = launch_of(kernel, Operands, 5, 4, SIZE=128), recipe.Scratch(4)
    parts = scratch.part((2, 3, 1)), scratch.part((2, 5)), None
    of_call = recipe.Recipe((made, made), scratch.elements, parts)

    def called(x, weight=None, scale=None):
        stride = 0 if scale is None else scale.stride(0)
        kernel.memory = torch.zeros(of_call.elements)
        recipe.run(of_call, (x, weight, scale), kernel.memory, (0, stride, 0))
        return of_call.ready

    return called


def tensors() -> dict[str, Any]:
    return {"x": torch.zeros(2, 32), "weight": torch.zeros(16), "scale": torch.zeros(2, 16)}


def test_a_warm_call_passes_the_arguments_that_triton_was_given(kernel, call):
    given = tensors()
    call(**given)
    assert [len(kernel.through_triton), len(kernel.direct)] == [2, 0]
    call(**given)
    assert [len(kernel.through_triton), len(kernel.direct)] == [2, 2]
    (programs,), values, options = kernel.through_triton[1]
    assert options == {"num_warps": 4}
    x, weight, scale, sums, folded, absent, *numbers = values
    assert (sums.shape, folded.shape, absent, numbers) == ((2, 3, 1), (2, 5), None, [16, 128])
    apart = folded.data_ptr() - sums.data_ptr()
    assert apart == 128
    stream, memory = 70 + given["x"].get_device(), kernel.memory.data_ptr()
    addresses = [*(tensor.data_ptr() for tensor in (x, weight, scale)), memory, memory + apart]
    expected = (programs, 1, 1, stream, 1, ("packed",), None, None, None, *addresses, absent, *numbers)
    assert kernel.direct[0] == expected
    assert kernel.direct[1][4] == 2  # each launch its own function


@pytest.mark.parametrize("name", ["x", "weight", "scale"])
def test_tensors_that_are_not_aligned_are_left_to_triton(kernel, call, name):
    given = tensors()
    apart = torch.zeros(given[name].numel() + 1)[1:].view(given[name].shape)
    for _ in range(2):
        call(**{**given, name: apart})
    assert [len(kernel.through_triton), len(kernel.direct)] == [4, 0]
    call(**given)  # and what they compiled is not taken for others
    assert [len(kernel.through_triton), len(kernel.direct)] == [6, 0]


CHANGES = {
    "no weight": {"weight": None},
    "no scale": {"scale": None},
    "weight in 16 bits": {"weight": torch.zeros(16, dtype=torch.bfloat16)},
    "scale in 64 bits": {"scale": torch.zeros(2, 16, dtype=torch.float64)},
    "scale of another stride": {"scale": torch.zeros(2, 40)[:, :16]},
    "scale of one row, repeated": {"scale": torch.zeros(1, 16).expand(2, 16)},
    "x in 16 bits": {"x": torch.zeros(2, 32, dtype=torch.float16)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_compiles_anew_is_another_kind(kernel, call, change):
    given = tensors()
    for arguments in (given, given | CHANGES[change]):
        call(**arguments)
    assert [len(kernel.through_triton), len(kernel.direct)] == [4, 0]
    for arguments in (given, given | CHANGES[change]):
        call(**arguments)
    assert [len(kernel.through_triton), len(kernel.direct)] == [4, 4]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run_hook"])
@pytest.mark.parametrize("chained", [True, False])
def test_hooks_see_every_launch(kernel, call, monkeypatch, hook, chained):
    """Those of profilers: Triton calls them, so the launches go through Triton while there are any."""
    given = tensors()
    call(**given)
    with monkeypatch.context() as patch:
        if hook == "pre_run_hook":
            kernel.pre_run_hooks.append(print)
        elif chained:
            chain = triton.knobs.HookChain()
            chain.add(print)
            patch.setattr(triton.knobs.runtime, hook, chain)
        else:
            patch.setattr(triton.knobs.runtime, hook, print)
        call(**given)
        assert [len(kernel.through_triton), len(kernel.direct)] == [4, 0]
    kernel.pre_run_hooks.clear()
    call(**given)
    assert [len(kernel.through_triton), len(kernel.direct)] == [4, 2]


def test_another_version_of_triton_launches_itself(kernel, call, monkeypatch):
    monkeypatch.setattr(recipe, "_LAUNCHER_IS_KNOWN", False)
    for _ in range(3):
        call(**tensors())
    assert [len(kernel.through_triton), len(kernel.direct)] == [6, 0]


def test_memory_beyond_32_bits_is_left_to_triton_on_amd(monkeypatch):
    """Its compiler counts in 32 bits within smaller storages."""
    monkeypatch.setattr(recipe, "_IS_AMD", True)
    small, strides = torch.zeros(16), (0, 0, 0)
    large = torch.empty(2**31 + 64, dtype=torch.uint8)[:64].view(torch.float32)
    assert recipe.kind_of((small, None), strides)[0] is not None
    assert recipe.kind_of((small, large), strides)[0] is None


def test_few_kinds_are_kept_of_a_recipe(kernel, call, monkeypatch):
    monkeypatch.setattr(recipe, "KINDS", 3)
    for width in range(16, 26):
        ready = call(torch.zeros(2, 32), scale=torch.zeros(2, width)[:, :16])
    assert 1 <= len(ready) <= 3
