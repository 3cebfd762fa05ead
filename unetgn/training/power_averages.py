"""Averages weights over training so that any width of average can be made afterwards.

Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C. Two averages with power functions are kept while a run
trains, and saved now and then; what these snapshots span is close to every other width. A width is sigma_rel, the
standard deviation of an average over time in units of the time that was trained for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unetgn.json_files import parse_object
from unetgn.training.checkpoint import LEFT, is_upto
from unetgn.training.data.folders import check_ordinary
from unetgn.training.errors import CheckpointError, reason
from unetgn.training.files import delete, free_name, writing
from unetgn.training.sharding import local

WIDTHS = (0.05, 0.10)  # those that the paper keeps
LEAST, MOST = 0.001, 0.28  # the widest power average, of γ = 0, has 1/√12
AVERAGES = "averages"  # where a run's folder has its snapshots
PREFIX, KEY = "step-", "power_averages"


def gamma_of(width: float) -> float:
    """Compute the power γ of the average that is so wide. Raises ValueError where none is.

    sigma_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), equation 123 of the paper: the largest root of a cubic.
    """
    if not LEAST <= width <= MOST:
        raise ValueError(f"an average of width {width} is none of a power function: give one from {LEAST} to {MOST}")
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def decay(gamma: float, step: int) -> float:
    """Compute by what the average is multiplied at step 1, 2, …, before (1 - that) of the weights is added.

    After step t the weights of step s then have the share of s - 1 < τ < s in ∫ τ^γ dτ from 0 to t.
    """
    return (1 - 1 / step) ** (gamma + 1)


class PowerAverages:
    """Keeps averages of several widths of the same parameters, float32, on their device.

    With FSDP2 they are cut as the parameters are.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, widths: Sequence[float] = WIDTHS) -> None:
        self.gammas = {width: gamma_of(width) for width in widths}
        self.step = 0
        self.averages = {width: {n: p.detach().float().clone() for n, p in parameters.items()} for width in widths}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Take in the weights after one more step."""
        self.step += 1
        now = [local(parameters[name].detach()).float() for name in parameters]
        for width, gamma in self.gammas.items():
            averages = [local(self.averages[width][name]) for name in parameters]
            torch._foreach_lerp_(averages, now, 1 - decay(gamma, self.step))

    def state(self) -> dict[str, Tensor]:
        """Return all averages by WIDTH/NAME, themselves and not copies."""
        return {f"{width}/{name}": t for width, average in self.averages.items() for name, t in average.items()}

    def save(self, folder: Path) -> Path:
        """Write a snapshot of the step into a folder of them, whole or not at all."""
        return save_snapshot(folder, self.step, {name: t.cpu().contiguous() for name, t in self.state().items()})

    def restore(self, folder: Path, step: int) -> None:
        """Go on from the snapshot of a step, exactly. Raises CheckpointError where it is none of these averages."""
        snapshot = Snapshot.read(snapshot_file(folder, step))
        if snapshot.widths != list(self.gammas):
            raise CheckpointError(f"{snapshot.file} has averages of widths {snapshot.widths}, not {list(self.gammas)}")
        for width, average in self.averages.items():
            saved = snapshot.tensors(width)
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in average.items()}:
                raise CheckpointError(f"{snapshot.file} is of another network")
            for name, tensor in saved.items():
                average[name].copy_(tensor)
        self.step = snapshot.step


def snapshot_file(folder: Path, step: int) -> Path:
    """Name the snapshot of a step in a folder of them."""
    return folder / f"{PREFIX}{step:06d}.safetensors"


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write averages, by WIDTH/NAME and on the CPU, as the snapshot of a step, whole or not at all. Raises OSError."""
    file = snapshot_file(folder, step)
    facts = {"step": step, "widths": list(dict.fromkeys(float(name.partition("/")[0]) for name in tensors))}
    try:
        with writing(file) as unfinished:
            save_file(dict(tensors), unfinished, metadata={KEY: json.dumps(facts)})
            unfinished.chmod(folder.stat().st_mode & 0o666)  # else the owner's alone, whatever the umask
    except SafetensorError as error:  # how safetensors says that the system refused to write
        raise OSError(f"{file} could not be written: {error}") from error
    return file


def snapshots_after(folder: Path, step: int) -> list[Path]:
    """List the snapshots after a step by their names, which a run that goes on from there makes anew."""
    numbered = {path: path.stem.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*.safetensors")}
    return sorted(path for path, number in numbered.items() if number.isdecimal() and int(number) > step)


def put_snapshots_aside(folder: Path, step: int) -> None:
    """Give the snapshots after a step other names, until the run has saved anew and `delete_snapshots_aside`."""
    for path in snapshots_after(folder, step):
        path.rename(free_name(path, LEFT))


def delete_snapshots_aside(folder: Path, upto: int | None = None) -> None:
    """Delete the snapshots that were put aside, of all steps or of those up to one."""
    for path in folder.glob(f"{PREFIX}*.safetensors.{LEFT}*"):
        if upto is None or is_upto(path, upto):
            delete(path)


@dataclass(frozen=True)
class Snapshot:
    """Names what a file of averages holds; its tensors are read when they are asked for."""

    file: Path
    step: int
    widths: list[float]

    @classmethod
    def read(cls, file: Path) -> Snapshot:
        """Read what a file holds. Raises CheckpointError where it is no snapshot, or damaged."""
        try:
            check_ordinary(file)
            with safe_open(file, "pt") as opened:
                facts = parse_object((opened.metadata() or {})[KEY].encode(), KEY)
                names = set(opened.keys())
            step, widths = int(facts["step"]), [float(width) for width in facts["widths"]]
            if step < 1 or not widths or not all(any(n.startswith(f"{width}/") for n in names) for width in widths):
                raise ValueError(f"it says step {step} and widths {widths}")
        except (SafetensorError, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is no snapshot of averages: {reason(error)}") from error
        return cls(file, step, widths)

    def tensors(self, width: float) -> dict[str, Tensor]:
        """Read one of the averages."""
        with safe_open(self.file, "pt") as opened:
            start = f"{width}/"
            return {n.removeprefix(start): opened.get_tensor(n) for n in opened.keys() if n.startswith(start)}  # noqa: SIM118


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Read what the snapshots in a folder are, oldest first. Raises CheckpointError where there are none."""
    found = [Snapshot.read(file) for file in folder.glob(f"{PREFIX}*.safetensors")]
    if not found:
        raise CheckpointError(f"{folder} holds no snapshots of averages ({PREFIX}*.safetensors)")
    return sorted(found, key=lambda snapshot: snapshot.step)


def coefficients(kept: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> np.ndarray:
    """Compute by what each average, (γ, step), is multiplied so that their sum is closest to the wanted one.

    Closest by the squared difference of the two densities over time, ∫ (Σ x_i p_i - p)² dt: the solution of A x = b
    with the inner products of the densities (appendix C.2 of the paper), in float64. Ours is the condition Σ x_i = 1,
    by a Lagrange multiplier: weights that stand still are their average, also where snapshots are few.
    """
    a = np.array([[inner(one, other) for other in kept] for one in kept])
    b = np.array([inner(one, wanted) for one in kept])
    scale = 1 / np.sqrt(np.diag(a))  # densities of length 1: of a better condition
    ones = scale / scale.mean()
    system = np.block([[a * scale[:, None] * scale, ones[:, None]], [ones, np.zeros(1)]])
    solution, *_ = np.linalg.lstsq(system, np.append(b * scale, 1 / scale.mean()), rcond=1e-14)
    return solution[:-1] * scale


def inner(first: tuple[float, int], second: tuple[float, int]) -> float:
    """Compute the inner product ∫ p q dt of the densities (γ + 1) τ^γ / t^(γ + 1) on 0 < τ < t of two averages."""
    (one, t1), (two, t2) = first, second
    least = min(t1, t2)
    power = (one + 1) * np.log(least / t1) + (two + 1) * np.log(least / t2)
    return float((one + 1) * (two + 1) / (one + two + 1) * np.exp(power) / least)


def make_average(snapshots: Iterable[Snapshot], width: float, step: int) -> dict[str, Tensor]:
    """Make the average of a width at a step out of the snapshots until then. Raises CheckpointError or ValueError."""
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not used or used[-1].step < step:
        raise CheckpointError(
            f"there is no snapshot of step {step}; there are those of {', '.join(str(each.step) for each in used)}"
        )
    kept = [(snapshot, own) for snapshot in used for own in snapshot.widths]
    shares = coefficients([(gamma_of(own), each.step) for each, own in kept], (gamma_of(width), step))
    total: dict[str, Tensor] = {}
    for (snapshot, own), share in zip(kept, shares, strict=True):
        for name, tensor in snapshot.tensors(own).items():
            if name in total and total[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{snapshot.file} is of another network: the shape of {name} is {[*tensor.shape]}"
                )
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + float(share) * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}
