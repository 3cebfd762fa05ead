"""Makes cases for the Triton kernels: inputs from a seed, the float64 definition, and errors against it."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unetgn.ops.arguments import DIFFERENTIABLE, Arguments, Needs
from unetgn.ops.triton import backward, entry, forward
from unetgn.ops.triton import plan_channels_last as channels_last
from unetgn.ops.triton import plan_contiguous as contiguous
from unetgn.ops.triton.device import INTERPRETER
from unetgn.ops.triton.forward import Plan
from unetgn.ops.triton.problem import Problem, ceil_div, power_of_two_at_least, power_of_two_divisor, problem_of

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

# Rounding of the result's own type, a few units of it: of the output's (or the gradient's) root mean square.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """Describes one call.

    `extras`: which of weight, bias, pre_bias, scale and shift are given; with "maps" the last two have x's shape; with
    "dshortcut" a gradient is added to that of x.
    """

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    extras: tuple[str, ...] = ("weight", "bias")
    parameter_dtype: torch.dtype | None = None  # of the small tensors; x's where None
    activation: bool = True
    eps: float = 1e-5
    mean: float = 0.0  # of x, whose standard deviation is 1
    seed: int = 0

    @property
    def maps(self) -> bool:
        return "maps" in self.extras

    def tensors(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Draw x, dy and the small tensors; scale and shift are the halves of one tensor, as networks make them."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n, c = self.shape[:2]
        small = self.parameter_dtype or self.dtype
        scale, shift = (0.5 * random(n, 2 * c)).to(device, small).chunk(2, dim=1)
        if self.maps:
            scale, shift = (self.layout((0.5 * random(*self.shape)).to(device, small)) for _ in range(2))
        made = {
            "x": self.layout((random(*self.shape) + self.mean).to(device, self.dtype)),
            "dy": self.layout(random(*self.shape).to(device, self.dtype)),
            "weight": (1 + 0.5 * random(c)).to(device, small),
            "bias": (0.5 * random(c)).to(device, small),
            "pre_bias": random(n, c).to(device, small),
            "scale": scale,
            "shift": shift,
            "dshortcut": self.layout(random(*self.shape).to(device, self.dtype)),
        }
        return {name: t if name in ("x", "dy", *self.extras) else None for name, t in made.items()}

    def shapes(self) -> dict[str, Tensor | None]:
        """Return the same tensors without contents, on the meta device."""
        n, c = self.shape[:2]
        small = self.parameter_dtype or self.dtype
        scale, shift = torch.empty(n, 2 * c, dtype=small, device="meta").chunk(2, dim=1)
        x = self.layout(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        weight = torch.empty(c, dtype=small, device="meta")
        made = {"x": x, "dy": x, "dshortcut": x, "weight": weight, "bias": weight, "scale": scale, "shift": shift}
        if self.maps:
            made |= dict.fromkeys(("scale", "shift"), x.to(small))
        made["pre_bias"] = torch.empty(n, c, dtype=small, device="meta")
        names = ("dy", "dshortcut", *DIFFERENTIABLE)
        return {name: made[name] if name in ("x", "dy", *self.extras) else None for name in names}

    @property
    def problem(self) -> Problem:
        return problem_of(torch.Size(self.shape), self.groups, self.dtype)

    @property
    def is_channels_last(self) -> bool:
        """Return True where the kernels read it so: not where both layouts fit."""
        return not self.layout(torch.empty(self.shape, device="meta")).is_contiguous()

    def layout(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=MEMORY_FORMATS[x.dim()]) if self.channels_last else x.contiguous()


def definition(case: Case, tensors: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute y and all gradients in float64, by autograd through the formula."""
    t = {name: v.double().requires_grad_() for name, v in tensors.items() if v is not None and name in DIFFERENTIABLE}
    spatial = (1,) * (len(case.shape) - 2)
    n, c = case.shape[:2]
    h = t["x"]
    if "pre_bias" in t:
        h = h + t["pre_bias"].view(n, c, *spatial)
    grouped = h.reshape(n, case.groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    z = (centred / (centred.square().mean(2, keepdim=True) + case.eps).sqrt()).view(case.shape)
    if "weight" in t:
        z = z * t["weight"].view(1, c, *spatial)
    if "bias" in t:
        z = z + t["bias"].view(1, c, *spatial)
    if "scale" in t:
        z = z * (1 + (t["scale"] if case.maps else t["scale"].view(n, c, *spatial)))
    if "shift" in t:
        z = z + (t["shift"] if case.maps else t["shift"].view(n, c, *spatial))
    y = z * z.sigmoid() if case.activation else z
    dy = tensors["dy"]
    assert dy is not None
    gradients = dict(zip(t, torch.autograd.grad(y, list(t.values()), dy.double()), strict=True))
    dshortcut = tensors["dshortcut"]
    if dshortcut is not None:
        gradients["x"] = gradients["x"] + dshortcut.double()
    return y.detach(), gradients


def arguments_of(case: Case, tensors: dict[str, Tensor | None]) -> Arguments:
    """Return the operator's arguments for those tensors."""
    given = {name: tensors[name] for name in DIFFERENTIABLE}
    return Arguments(num_groups=case.groups, eps=case.eps, activation=case.activation, implementation="triton", **given)


def run_forward(plan: Plan, case: Case, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and rstd by an explicit plan."""
    recipe = forward.recipe_of(plan, case.problem, INTERPRETER, case.eps, case.activation)
    return entry.follow_forward(recipe, arguments_of(case, tensors))


def run_backward(
    plan: Plan, case: Case, tensors: dict[str, Tensor | None], mean: Tensor, rstd: Tensor
) -> dict[str, Tensor]:
    """Compute all gradients by an explicit plan."""
    dy = tensors["dy"]
    assert dy is not None
    needs = Needs._make(tensors[name] is not None for name in DIFFERENTIABLE)
    arguments = arguments_of(case, tensors)
    of_channels = entry.of_channels(arguments, needs)
    recipe = backward.recipe_of(plan, case.problem, INTERPRETER, case.activation, of_channels)
    gradients = entry.follow_backward(recipe, dy, arguments, mean, rstd, needs, tensors["dshortcut"])
    return {name: g for name, g in zip(DIFFERENTIABLE, gradients, strict=True) if g is not None}


def relative_error(result: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """Return the RMS of the error over that of the exact result (or over `floor`); infinite where not all is finite."""
    if not torch.isfinite(result).all():
        return math.inf
    error = (result.double().cpu() - exact.cpu()).square().mean().sqrt().item()
    return error / max(exact.square().mean().sqrt().item(), floor, 1e-30)


def paths(case: Case) -> dict[str, tuple[Plan, Plan]]:
    """Return (forward plan, backward plan) of each path that fits the case, whatever the heuristic chooses.

    Tiles of the split path are small, so that a group has several chunks, but few (the interpreter takes a millisecond
    a program and more); the cluster path needs shapes that two blocks can share, and its backward pass is the resident
    one with maps.
    """
    problem = case.problem
    if case.is_channels_last:
        many = 1 << 20
        split = channels_last.split(problem, INTERPRETER)
        rows = quarter(problem.spatial)  # of which a turn of the loop takes a half
        tile_rows = max(1, rows // 8)
        split = replace(split, rows=rows, apply_rows=2 * rows, tile_rows=tile_rows)
        found: dict[str, tuple[Plan, Plan]] = {"split": (split, split)}
        alone = channels_last.resident_of(problem, INTERPRETER, 2048, many, 1)
        shared = channels_last.resident_of(problem, INTERPRETER, 2048, many, 2)
        if alone is not None:
            found["resident"] = (alone, alone)
        if shared is not None and alone is not None and problem.spatial % 2 == 0:
            second = channels_last.resident_of(problem, INTERPRETER, 2048, many, 2, bundled=False)
            found["cluster"] = (shared, alone)
            if second is not None and not second.masked and not case.maps:
                tiles = (2, second.tiles, second.rows, second.steps, second.vector)
                found["cluster"] = (shared, channels_last.Cluster(*tiles, num_warps=4))
        return found
    width = power_of_two_divisor(problem.spatial)
    row, exact = contiguous.backward_segment(problem)
    split_rows = contiguous.backward_split(problem, INTERPRETER, row, exact)
    tile = max(row, quarter(problem.channels * ceil_div(problem.spatial, row) * row))
    small = replace(split_rows, tile=tile, apply_tile=2 * tile, width=row)
    chunk = max(min(width, problem.vector), quarter(problem.length))
    chunks = replace(contiguous.forward_split(problem, INTERPRETER, width), tile=chunk, apply_tile=2 * chunk)
    resident = contiguous.backward_resident(problem, INTERPRETER, row, exact)
    found = {
        "split": (chunks, small),
        "resident": (contiguous.forward_resident(problem, INTERPRETER, width, 1), resident),
    }
    shared_row = contiguous.width_in_share(problem, width, 2)
    if shared_row:
        segment = contiguous.width_in_share(problem, row, 2)
        cluster = contiguous.Cluster(2, problem.length // (2 * segment), segment, num_warps=4)
        second = cluster if exact and not case.maps else resident
        found["cluster"] = (contiguous.forward_resident(problem, INTERPRETER, shared_row, 2), second)
    return found


def quarter(length: int) -> int:
    """Return a power of two near a quarter of a length."""
    return max(1, power_of_two_at_least(ceil_div(length, 4)))


def errors(case: Case, plans: tuple[Plan, Plan]) -> dict[str, float]:
    """Return the relative error of y and of every gradient, by explicit plans.

    The gradient of pre_bias is the sum of dx over space, which may cancel: it is measured against the sum's terms.
    """
    tensors = case.tensors()
    exact, gradients = definition(case, tensors)
    y, mean, rstd = run_forward(plans[0], case, tensors)
    results = run_backward(plans[1], case, tensors, mean, rstd)
    terms = gradients["x"].square().mean().sqrt().item() * math.prod(case.shape[2:]) ** 0.5
    found = {"y": relative_error(y, exact)}
    for name, exact_gradient in gradients.items():
        found[name] = relative_error(results[name], exact_gradient, terms if name == "pre_bias" else 0.0)
    return found


def heuristic(case: Case, *, clusters: bool = False) -> tuple[Plan, Plan]:
    """Return the plans that a call on an H100 would take."""
    operands = case.problem, case.is_channels_last, INTERPRETER
    return forward.plan_forward(*operands, clusters), backward.plan_backward(*operands, clusters)
