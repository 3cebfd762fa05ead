"""Check, measure, write: `python -m benchmarks.group_norm_silu [--quick] [--clusters]`. Needs a CUDA or ROCm GPU."""

import argparse
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

NO_DEVICE = 2
WRONG_RESULTS = 1
RESULTS = Path(__file__).parents[1] / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Exit code: 0, or 1 where a result is wrong (nothing is timed then), or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three shapes in bf16 instead of all")
    parser.add_argument("--clusters", action="store_true", help="check and time clusters too (no GPU has run them yet)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON (benchmarks/results)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA or ROCm device: this benchmark measures device time, and a CPU has none.", file=sys.stderr)
        return NO_DEVICE
    problems = wrong_results(clusters_too=arguments.clusters)
    if problems:
        print(f"{len(problems)} wrong results; nothing was timed:", *problems, sep="\n", file=sys.stderr)
        return WRONG_RESULTS
    device = torch.device("cuda", torch.cuda.current_device())
    result = measured(device, quick=arguments.quick, clusters_too=arguments.clusters)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "_".join([result["device"].lower().replace(" ", "_"), *(["quick"] if arguments.quick else [])])
    path = arguments.output / f"group_norm_silu_{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {path}; `python -m benchmarks.group_norm_silu.report {path}` makes the table and the plot.")
    return 0


def wrong_results(*, clusters_too: bool) -> list[str]:
    """What the kernels get wrong on the device."""
    from benchmarks.group_norm_silu.checks import checks, cluster_checks, faults
    from unetgn.ops.triton_device import clusters

    problems = [fault for check in checks() for fault in faults(check, "triton", "cuda")]
    if clusters_too:
        with clusters(True):
            problems += [fault for check in cluster_checks() for fault in faults(check, "triton", "cuda")]
    return problems


def measured(device: torch.device, *, quick: bool, clusters_too: bool) -> dict[str, Any]:
    """The contents of the JSON file."""
    from torch._functorch import config

    from benchmarks.group_norm_silu.cases import cases
    from benchmarks.group_norm_silu.measure import host_rows, rows
    from benchmarks.group_norm_silu.timing import copy_bandwidth

    # A backward pass is repeated on one graph; a compiled one would otherwise reuse the buffers that it saved.
    config.donated_buffer = False
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {**environment(device), "copy_bandwidth": bandwidth, "host": host_rows(device), "rows": []}
    for case in cases(quick=quick):
        found = rows(case, device, bandwidth, clusters_too=clusters_too)
        result["rows"] += found
        for one in found:
            print({key: round(v, 1) if isinstance(v, float) else v for key, v in one.items()}, flush=True)
        torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    sys.exit(main())
