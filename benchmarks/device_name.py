"""Names the processor that figures were measured on, such that one model can be told from another."""

import platform
from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")  # Linux; there, `platform.processor` names the architecture alone


def device_name(device: str) -> str:
    """Return the GPU's name for "cuda", else the CPU's model with family and number, as far as the system tells."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if not CPU_FACTS.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in CPU_FACTS.read_text().split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    parts = [facts.get("model name", platform.machine())]
    parts += [f"{key.split()[-1]} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return " ".join(parts)
