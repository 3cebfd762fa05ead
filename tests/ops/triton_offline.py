"""Compiles a launch for a GPU that is not there, and reads what the compiler made of it.

The toolkit's `cuobjdump` ships inside the Triton wheel. It reads registers and the stack at once, but takes most of a
second to disassemble. So widths of loads and stores are read from the assembly text, PTX for NVIDIA; `machine_code`
reads the machine code, and a test compares the two.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ops.triton_cases import Case, arguments_of
from unetgn.ops.arguments import DIFFERENTIABLE, Needs
from unetgn.ops.triton import backward, entry, forward
from unetgn.ops.triton.device import Device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEVICES = {
    "sm_80": Device(multiprocessors=108),
    "sm_90": Device(multiprocessors=132, largest_cluster=8),
    "sm_100": Device(multiprocessors=148, largest_cluster=8),
    "gfx942": Device(multiprocessors=304, warp_size=64, nvidia=False),
}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Build:
    """Holds what the compiler made of one launch."""

    kernel: str
    registers: int
    spills: int  # bytes of the stack, which hold spilled registers and nothing else; instructions for AMD
    loads: dict[int, int]  # width in bits: number of global load instructions
    stores: dict[int, int]
    text: dict[str, Any]  # the stages: ttgir, ptx, amdgcn


@dataclass(frozen=True)
class Launch:
    """Holds a launch that a call would make: the kernel, its grid and options, and its arguments by name."""

    kernel: Any
    programs: int
    num_warps: int
    num_ctas: int
    arguments: dict[str, Any]


def launches_of(case: Case, target: str, *, clusters: bool = False) -> tuple[list[Launch], list[Launch]]:
    """List the launches of the forward and of the backward pass, for tensors that have shapes but no storage."""
    tensors, device = case.shapes(), DEVICES[target]
    arguments, layout = arguments_of(case, tensors), case.is_channels_last
    clusters = clusters and entry.may_take_clusters(arguments)
    plan = forward.plan_forward(case.problem, layout, device, clusters)
    with recorded() as first:
        recipe = forward.recipe_of(plan, case.problem, device, case.eps, case.activation)
        _, mean, rstd = entry.follow_forward(recipe, arguments)
    needs = Needs._make(tensors[name] is not None for name in DIFFERENTIABLE)
    plan = backward.plan_backward(case.problem, layout, device, clusters)
    of_channels = entry.of_channels(arguments, needs)
    with recorded() as second:
        recipe_back = backward.recipe_of(plan, case.problem, device, case.activation, of_channels)
        entry.follow_backward(recipe_back, tensors["dy"], arguments, mean, rstd, needs, tensors["dshortcut"])
    return first, second


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note the launches of the block instead of running them."""
    found: list[Launch] = []

    def note(recipe: Any, *tensors_memory_strides: Any) -> None:
        operands = recipe.operands(*tensors_memory_strides)
        for launch in recipe.launches:
            named = dict(zip(launch.kernel.arg_names, launch.values(operands), strict=True))
            found.append(Launch(launch.kernel, launch.programs, arguments=named, **{"num_ctas": 1, **launch.options}))

    run, entry.run = entry.run, note
    try:
        yield found
    finally:
        entry.run = run


def specialization(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Return (signature, constants, attributes) as Triton's launcher derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    kernel: Any = launch.kernel
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def key(launch: Launch) -> tuple[Any, ...]:
    """Return what a build depends on: launches with equal keys are one build."""
    signature, constants, attributes = specialization(launch)
    kernel: Any = launch.kernel
    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    return (
        name,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(attributes),
        launch.num_warps,
        launch.num_ctas,
    )


_builds: dict[tuple[Any, ...], Build] = {}


def compile_launch(launch: Launch, target: str) -> Build:
    """Return the build of a launch for the target, made once in a process."""
    place = (target, *key(launch))
    if place not in _builds:
        _builds[place] = _compile(launch, target)
    return _builds[place]


def _compile(launch: Launch, target: str) -> Build:
    """Compile for the target and read registers, spills and widths."""
    signature, constants, attributes = specialization(launch)
    options = {"num_warps": launch.num_warps}
    if launch.num_ctas > 1:
        options["num_ctas"] = launch.num_ctas
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    name = key(launch)[0].removeprefix("unetgn.ops.")
    if target.startswith("gfx"):
        return _read_amd(name, compiled.asm["amdgcn"], compiled.asm)
    return _read_nvidia(name, compiled.asm["cubin"], compiled.asm)


def _read_nvidia(name: str, cubin: bytes, text: Any) -> Build:
    usage = _cuobjdump(cubin, "-res-usage")
    registers, stack = (re.search(rf"{field}:(\d+)", usage) for field in ("REG", "STACK"))
    assert registers is not None, usage
    assert stack is not None, usage
    return Build(
        name, int(registers[1]), int(stack[1]), _ptx_widths(text["ptx"], "ld"), _ptx_widths(text["ptx"], "st"), text
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _ptx_widths(ptx: str, kind: str) -> dict[int, int]:
    found = re.findall(rf"\b{kind}(?:\.volatile)?\.global(?:\.\w+(?:::\w+)*)*?(?:\.v([248]))?\.[bfsu](\d+)\b", ptx)
    return dict(Counter(int(count or 1) * int(bits) for count, bits in found))


def machine_code(build: Build) -> tuple[int, dict[int, int], dict[int, int]]:
    """Return (spill instructions, loads, stores) of a build for NVIDIA, read from its machine code, slowly."""
    code = _cuobjdump(build.text["cubin"], "-sass")
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
    loads, stores = (
        dict(Counter(_width(operation) for operation in operations if operation.startswith(kind)))
        for kind in ("LDG", "STG")
    )
    return sum(operation.startswith(("LDL", "STL")) for operation in operations), loads, stores


def _width(operation: str) -> int:
    """Return the bits of a machine instruction such as LDG.E.128 or LDG.E.U16.CONSTANT; 32 where it names none."""
    widths = [int(part.lstrip("US")) for part in operation.split(".") if re.fullmatch(r"[US]?(8|16|64|128)", part)]
    return widths[0] if widths else 32


_AMD_WIDTHS = {
    "ubyte": 8,
    "byte": 8,
    "ushort": 16,
    "short": 16,
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
}


def _read_amd(name: str, assembly: str, text: Any) -> Build:
    def widths(kind: str) -> dict[int, int]:
        found = re.findall(rf"\b(?:global|buffer)_{kind}_(\w+?)(?:_d16(?:_hi)?)?\b", assembly)
        return dict(Counter(_AMD_WIDTHS.get(width.removesuffix("_d16_hi").removesuffix("_d16"), 0) for width in found))

    def total(field: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{field}:\s+(\d+)", assembly))

    return Build(
        kernel=name,
        registers=total("vgpr_count"),
        spills=total("vgpr_spill_count") + total("sgpr_spill_count"),
        loads=widths("load"),
        stores=widths("store"),
        text=text,
    )
