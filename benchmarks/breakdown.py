"""Breaks the time of a step down: convolutions, products, attention, norms, and the rest.

Beside it stands what the machine's own matrix product could do at best: the operations that a part needs, at the rate
of a large matrix product of the same type, measured in the same run. What is beyond that is left to win there;
norms and the rest are moved by memory, and have no such figure.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# Kinds of work, by the names of events. The outermost event that has a name here decides for all within it.
PARTS = {
    "attention": r"scaled_dot_product|ScaledDotProduct|_softmax|SoftmaxBackward",
    "convolutions": r"conv(olution|[123]d)\b|ConvolutionBackward|MkldnnConvolution",
    "norms": r"group_norm|layer_norm|GroupNorm|LayerNorm|\bsilu|SiluBackward",  # with the SiLU behind them
    "products": r"::(linear|addmm|mm|bmm|matmul|baddbmm|einsum)\b|(Addmm|Mm|Bmm|Baddbmm|Linear)Backward",
}
REST = "rest"
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SDPA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def part_of(names: list[str]) -> str:
    """Return the part that an event belongs to, from the names of all that it lies within, outermost first."""
    for name in names:
        for part, pattern in PARTS.items():
            if re.search(pattern, name):
                return part
    return REST


def seconds_of_parts(step: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of one step by parts, as the profiler sees them on the thread that runs each."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds = dict.fromkeys([*PARTS, REST], 0.0)
    for event in found.events() or ():
        seconds[part_of(list(_names(event))[::-1])] += event.self_cpu_time_total / 1e6
    return seconds


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def operations_of_parts(step: Callable[[], object]) -> dict[str, int]:
    """Count the floating-point operations of one step by parts: a product and a sum are two."""
    counter = FlopCounterMode(display=False, custom_mapping={SDPA: _attention, SDPA_BACKWARD: _attention_backward})
    with counter:
        step()
    counts = dict.fromkeys(("convolutions", "products", "attention"), 0)
    for operator, count in counter.get_flop_counts()["Global"].items():
        name = str(operator)
        part = "attention" if "scaled_dot_product" in name else "convolutions" if "conv" in name else "products"
        counts[part] += count
    return counts


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Count q·kᵀ and the weights times v: 2·N·heads·Lq·Lk·(d + dv)."""
    *batch, length, width = query
    return 2 * _product(batch) * length * key[-2] * (width + value[-1])


def _attention_backward(gradient: list[int], query: list[int], key: list[int], value: list[int], *_: Any,
                        **__: Any) -> int:  # fmt: skip
    """Count five products: the weights again, and the gradients of the weights, of v, of q and of k."""
    *batch, length, width = query
    return 2 * _product(batch) * length * key[-2] * (3 * width + 2 * value[-1])


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def operations_per_second(dtype: torch.dtype, *, size: int = 1536, seconds: float = 1.0) -> float:
    """Measure the machine's own product of two square matrices, and return its best rate."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def breakdown(step: Callable[[], object], rate: float, *, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Return for each part its `seconds` in the fastest of some steps, and `at_best`, at `rate` operations a second."""
    step()
    seconds = min((seconds_of_parts(step) for _ in range(repeats)), key=lambda parts: sum(parts.values()))
    counts = operations_of_parts(step)
    return {
        part: {"seconds": round(value, 6)} | ({"at_best": round(counts[part] / rate, 6)} if part in counts else {})
        for part, value in seconds.items()
    }
