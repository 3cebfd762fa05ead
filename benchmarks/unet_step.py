"""Measures a training step of our U-Net against diffusers' with the same weights: `python -m benchmarks.unet_step`.

Figures, for each grade of recomputation and relative to diffusers in the same run:

- bytes kept for the backward pass: what saved-tensor hooks see, each storage once, parameters not counted;
- time of forward and backward: competitors take turns, a ratio is that of one round, the figure their median. Wall
  clock, and on the CPU the time of the process too, which other processes on the machine disturb less.

Writes JSON under benchmarks/results. Use one thread and an otherwise idle machine; the load average is written too.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from benchmarks.device_name import device_name
from benchmarks.result_file import result_file
from unetgn import UNet
from unetgn.programs.paths import user_path
from unetgn.training.files import write_json

GRADES = ("none", "activations", "blocks")
SHAPES: dict[str, dict[str, Any]] = {
    "cifar10": {  # google/ddpm-cifar10-32
        "batch": 8,
        "options": {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
    },
    "butterflies128": {  # anton-l/ddpm-butterflies-128
        "batch": 1,
        "options": {
            "sample_size": 128,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        },
    },
}


def saved_bytes(model: nn.Module, x: Tensor, timesteps: Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, each storage once, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, timesteps)
    return sum(storage.nbytes() for storage in kept.values())


def step_times(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the seconds of one step: wall clock and, on the CPU, of the process."""
    _synchronize(device)
    wall, process = time.perf_counter(), time.process_time()
    step()
    _synchronize(device)
    times = {"wall": time.perf_counter() - wall}
    return times | ({"process": time.process_time() - process} if device == "cpu" else {})


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: str, device: str, dtype: torch.dtype, rounds: int, channels_last: bool) -> dict[str, Any]:
    """Measure bytes and times of diffusers' network and of ours in each grade."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    theirs = UNet2DModel(**SHAPES[shape]["options"]).to(device, dtype).train()
    ours = UNet.from_diffusers(theirs).train()
    for model in (theirs, ours):
        model.to(memory_format=layout)
    size, batch = SHAPES[shape]["options"]["sample_size"], SHAPES[shape]["batch"]
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=layout)
    timesteps = torch.arange(batch, device=device)

    def step_of(model: nn.Module, grade: str | None) -> Callable[[], None]:
        def step() -> None:
            if grade is not None:
                ours.set_checkpointing(grade)
            model(x, timesteps).sample.square().mean().backward()
            model.zero_grad()

        return step

    steps = {"diffusers": step_of(theirs, None)} | {grade: step_of(ours, grade) for grade in GRADES}
    kept = {"diffusers": saved_bytes(theirs, x, timesteps)}
    for grade in GRADES:
        ours.set_checkpointing(grade)
        kept[grade] = saved_bytes(ours, x, timesteps)
    for step in steps.values():
        step()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step_times(step, device))
    return {"kept_bytes": kept, "kept_ratio": {grade: kept[grade] / kept["diffusers"] for grade in GRADES}} | {
        f"{clock}_{what}": value for clock in times["diffusers"][0] for what, value in _summary(times, clock).items()
    }


def _summary(times: dict[str, list[dict[str, float]]], clock: str) -> dict[str, Any]:
    base = [one[clock] for one in times["diffusers"]]
    ratios = {grade: [one[clock] / b for one, b in zip(times[grade], base, strict=True)] for grade in GRADES}
    return {
        "seconds": {name: round(statistics.median(one[clock] for one in values), 5) for name, values in times.items()},
        "ratio": {grade: round(statistics.median(values), 4) for grade, values in ratios.items()},
        "ratio_quartiles": {
            grade: [round(q, 4) for q in statistics.quantiles(values, n=4)[::2]] for grade, values in ratios.items()
        },
    }


def main(given: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cifar10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=21, help="at least 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=user_path, default=None, help="JSON file; by default under benchmarks/results")
    arguments = parser.parse_args(given)
    name = device_name(arguments.device)
    out = result_file(parser, arguments.out, f"unet_step_{arguments.shape}_{name.replace(' ', '_')}.json")
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    figures = measure(arguments.shape, arguments.device, dtype, arguments.rounds, arguments.channels_last)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "command": {key: str(value) for key, value in vars(arguments).items()},
        "load_average": os.getloadavg(),
        **figures,
    }
    write_json(out, result)
    print(json.dumps({key: value for key, value in figures.items() if "ratio" in key or "seconds" in key}, indent=1))
    print(f"load average {result['load_average']}; written to {out}")


if __name__ == "__main__":
    main()
