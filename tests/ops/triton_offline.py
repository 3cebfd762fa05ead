"""Compile a launch for a GPU that is not there, and read what the compiler made of it.

The toolkit's `cuobjdump` ships inside the Triton wheel. Widths of loads and stores are read from the machine code for
NVIDIA, from the assembly text for AMD.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ops.triton_cases import NAMES, Case, call_for
from unetgn.ops.triton.backward import Gradients, Inputs, backward_launches, backward_recipe
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.forward import forward_launches, forward_recipe
from unetgn.ops.triton.launch import Launch, empty_statistics

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
    """What the compiler made of one launch."""

    kernel: str
    registers: int
    spills: int  # instructions that move registers to or from memory
    loads: dict[int, int]  # width in bits: number of global load instructions
    stores: dict[int, int]
    instructions: int
    text: dict[str, Any]  # the stages: ttgir, ptx, amdgcn


def launches_of(case: Case, target: str, *, clusters: bool = False) -> tuple[list[Launch], list[Launch]]:
    """The launches of the forward and of the backward pass, for tensors that have shapes but no storage."""
    tensors = case.shapes()
    x, dy = tensors["x"], tensors["dy"]
    assert x is not None
    assert dy is not None
    call = call_for(case, tensors, DEVICES[target])
    mean, rstd = empty_statistics(x, case.groups), empty_statistics(x, case.groups)
    operands = call.problem, call.channels_last, call.device
    recipe = forward_recipe(*operands, clusters and call.pre_bias is None, case.activation, case.eps)
    forward = forward_launches(recipe, call, x, torch.empty_like(x), mean, rstd)
    gradients = Gradients(*(None if (t := tensors[name]) is None else torch.empty_like(t) for name in NAMES))
    recipe_back = backward_recipe(*operands, case.activation, gradients.dpre_bias is not None)
    backward = backward_launches(recipe_back, call, Inputs(dy, x, mean, rstd), gradients)
    return forward, backward


def specialization(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """(signature, constants, attributes) as Triton's launcher derives them from the arguments."""
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
    """Launches with equal keys are one build."""
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


def compile_launch(launch: Launch, target: str) -> Build:
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
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
    return Build(
        kernel=name,
        registers=int(registers[1]),
        spills=sum(operation.startswith(("LDL", "STL")) for operation in operations),
        loads=dict(Counter(_width(operation) for operation in operations if operation.startswith("LDG"))),
        stores=dict(Counter(_width(operation) for operation in operations if operation.startswith("STG"))),
        instructions=len(operations),
        text=text,
    )


def _width(operation: str) -> int:
    """Bits of a machine instruction such as LDG.E.128 or LDG.E.U16.CONSTANT; 32 where it names none."""
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
        instructions=len(re.findall(r"^\t[vs]_\w+", assembly, re.MULTILINE)),
        text=text,
    )
