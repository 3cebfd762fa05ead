"""Compiles the kernels of all units into a folder, on a machine that need not have a GPU, for one that has.

Triton's launcher is led to believe in a device of the given architecture: it looks a kernel up in the cache, compiles
it where it is not there, and runs nothing. So the names under which builds are kept are those that the same call finds
on the real device, where Triton has the same version and Python too. A folder may lie elsewhere there: `settle` mends
the paths that Triton keeps in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.gpu.source import source

KEPT = (".json", ".cubin", ".hsaco", ".so")  # of a build; the stages before it are for those who read assembly
CARDS = {"sm_80": (108, 1), "sm_90": (132, 8), "sm_100": (148, 8)}  # multiprocessors, blocks of a cluster
MADE = "unetgn_prepared.json"


def prepare(out: Path, arch: str, jobs: int, first: int | None = None) -> dict[str, int]:
    """Compile for `arch` (sm_90, gfx942) into `out` in that many processes. Return how many were compiled and found.

    `first`: the first so many calls of the list alone, which is in the order of their worth.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "prepare", "--out", str(out), "--arch", arch]
    command += [] if first is None else ["--first", str(first)]
    workers = [
        subprocess.Popen(
            [*command, "--part", f"{part}/{jobs}"], stdout=subprocess.PIPE, text=True, env=environment(out)
        )
        for part in range(1, jobs + 1)
    ]
    counts: Counter[str] = Counter()
    for worker in workers:
        output, _ = worker.communicate()
        counts.update(json.loads(output.splitlines()[-1]) if worker.returncode == 0 else {"processes that failed": 1})
    if first is None and not {"failed", "processes that failed"} & counts.keys():
        (out / MADE).write_text(json.dumps(state(arch)) + "\n")
    return dict(counts)


def state(arch: str) -> dict[str, str]:
    """Return what the names of builds depend on: the sources, Triton and, for its launchers, Python."""
    python = "{}.{}".format(*sys.version_info[:2])
    return {"arch": arch, "source": source(), "triton": version("triton"), "python": python}


def is_prepared(cache: Path, arch: str) -> bool:
    """Return True where everything has been compiled into the folder for this code, on this or another machine."""
    path = cache / MADE
    return path.exists() and json.loads(path.read_text()) == state(arch)


def environment(cache: Path) -> dict[str, str]:
    """Return the variables of a process that compiles: the folder, and no interpreter and no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **hidden, "TRITON_CACHE_DIR": str(cache.absolute())}


def compile_part(arch: str, part: tuple[int, int], first: int | None) -> dict[str, int]:
    """Compile every n-th call of the list from the k-th on, in this process."""
    import triton

    from benchmarks.gpu import paths
    from benchmarks.gpu.builds import builds
    from unetgn.ops.triton.device import Device

    target = target_of(arch)
    triton.runtime.driver.set_active(believed(target))
    counts: Counter[str] = Counter()

    def listen(*, cache_hit: bool, **_: Any) -> None:
        counts["found" if cache_hit else "compiled"] += 1

    triton.knobs.compilation.listener = listen

    def build(recipe: Any, *given: Any) -> None:
        operands = recipe.operands(*given)
        for launch in recipe.launches:
            try:
                kernel = launch.kernel.warmup(*launch.values(operands), grid=(launch.programs,), **launch.options)
                build_launcher(kernel)
            except Exception as error:
                counts["failed"] += 1
                print(f"{launch.kernel.__name__}: {type(error).__name__}: {error}"[:300], file=sys.stderr)

    multiprocessors, largest = CARDS.get(arch, (304, 1))
    nvidia = target.backend == "cuda"
    device = Device(multiprocessors, warp_size=target.warp_size, nvidia=nvidia, largest_cluster=largest)
    k, n = part
    with paths.instead_of_running(build), stand_in_for_the_driver():
        for one in islice(builds(device), k - 1, first, n):
            one.run(device)
    return dict(counts)


def target_of(arch: str) -> Any:
    """Return Triton's target: sm_90 or gfx942. Raises ValueError for another word."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_") and arch[3:].isdigit():
        return GPUTarget("cuda", int(arch[3:]), 32)
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"{arch!r} is no architecture; write sm_90 (H100, H200), sm_80, sm_100 or gfx942, for example")


def believed(target: Any) -> Any:
    """Make what Triton takes for a driver: a device of that target, on which nothing can be run."""
    import torch

    class Driver:
        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return Driver()


@contextlib.contextmanager
def stand_in_for_the_driver() -> Iterator[None]:
    """Have C code that calls NVIDIA's driver compile where there is none, against an empty library, and never load."""
    from triton.runtime import build

    build._load_module_from_path = lambda name, path: Anything()
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.c"
        empty.write_text("")
        command = ["cc", "-shared", "-o", str(Path(folder) / "libcuda.so.1"), str(empty)]
        with contextlib.suppress(OSError):  # without a compiler, launchers are built on the other machine
            subprocess.run(command, check=False, capture_output=True)
        before = os.environ.get("TRITON_LIBCUDA_PATH")
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_LIBCUDA_PATH"]
            os.environ.update({} if before is None else {"TRITON_LIBCUDA_PATH": before})


class Anything:
    """Holds the place of a module that is compiled and not loaded."""

    def __getattr__(self, name: str) -> Any:
        return None


def build_launcher(kernel: Any) -> None:
    """Compile the C code that launches a kernel: one a signature up to Triton 3.6, later one for all."""
    from triton.backends.nvidia import driver

    if kernel.metadata.target.backend == "cuda":
        with contextlib.suppress(AttributeError, OSError, RuntimeError, subprocess.CalledProcessError):
            driver.CudaUtils()
            driver.CudaLauncher(kernel.src, kernel.metadata)


def shrink(cache: Path) -> None:
    """Delete what running does not need: nine tenths of the bytes."""
    for path in cache.glob("*/*"):
        if path.is_file() and path.suffix not in KEPT and path.name != "lock":
            path.unlink()


def settle(cache: Path) -> int:
    """Have the folder's lists of files name the place where it lies now. Return how many were changed."""
    changed = 0
    for path in cache.glob("*/__grp__*.json"):
        listed = json.loads(path.read_text())
        here = {name: str(path.absolute().parent / name) for name in listed.get("child_paths", {})}
        if here != listed.get("child_paths"):
            path.write_text(json.dumps({"child_paths": here}))
            changed += 1
    return changed
