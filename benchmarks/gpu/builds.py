"""Lists the kernels that the units will run, as calls and plans: what is compiled beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu import checks, launches, networks, paths, rest
from benchmarks.group_norm_silu.cases import DTYPES, EXTRAS, LAYOUTS, NUM_GROUPS, PASSES, Case
from benchmarks.group_norm_silu.checks import Check, cluster_checks
from benchmarks.group_norm_silu.checks import checks as odd_checks
from unetgn.ops.arguments import DIFFERENTIABLE, Arguments, Needs
from unetgn.ops.layout import CHANNELS_LAST
from unetgn.ops.triton import backward, entry, forward
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.forward import Plan
from unetgn.ops.triton.problem import problem_of


@dataclass(frozen=True)
class Build:
    """Describes a forward and a backward pass whose kernels are needed.

    Their plans are the heuristic's where none are given.
    """

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    channels_last: bool
    extras: tuple[str, ...]
    activation: bool = True
    shortcut: bool = False  # its gradient is added to that of x
    clusters: bool = False
    forward: Plan | None = None
    backward: Plan | None = None

    def by(self, forward: Plan | None = None, backward: Plan | None = None) -> Build:
        """Return the same passes by other plans."""
        return replace(self, forward=forward, backward=backward)

    def arguments(self) -> Arguments:
        """Make the arguments on the CPU, without contents; scale and shift are maps, or halves of one tensor."""
        n, c = self.shape[:2]
        x = torch.empty(self.shape, dtype=self.dtype)
        if self.channels_last:
            x = torch.empty_like(x, memory_format=CHANNELS_LAST[x.dim()])
        halves = torch.empty(n, 2 * c, dtype=self.dtype).chunk(2, dim=1)
        scale, shift = (x, x) if "maps" in self.extras else halves
        rows = torch.empty(n, c, dtype=self.dtype)
        made = {"x": x, "weight": rows[0], "bias": rows[0], "pre_bias": rows, "scale": scale, "shift": shift}
        given = {name: made[name] if name in ("x", *self.extras) else None for name in DIFFERENTIABLE}
        return Arguments(num_groups=self.groups, eps=1e-5, activation=self.activation, implementation="triton", **given)  # type: ignore[arg-type]

    def run(self, device: Device) -> None:
        """Go through the launches of both passes, on that device; see `paths.instead_of_running`."""
        given = self.arguments()
        sizes = problem_of(given.x.shape, self.groups, self.dtype)
        layout = not given.x.is_contiguous()
        clusters = self.clusters and entry.may_take_clusters(given)
        plan = self.forward or forward.plan_forward(sizes, layout, device, clusters)
        recipe = forward.recipe_of(plan, sizes, device, given.eps, self.activation)
        y, mean, rstd = entry.follow_forward(recipe, given)
        needs = Needs._make(isinstance(getattr(given, name), Tensor) for name in DIFFERENTIABLE)
        plan = self.backward or backward.plan_backward(sizes, layout, device, clusters)
        of_channels = entry.of_channels(given, needs)
        recipe_back = backward.recipe_of(plan, sizes, device, self.activation, of_channels)
        entry.follow_backward(recipe_back, y, given, mean, rstd, needs, torch.empty_like(y) if self.shortcut else None)


def builds(device: Device) -> Iterator[Build]:
    """List what the units need, in their order; some of it is needed by several."""
    for case in checks.plain_cases(False):
        yield of_case(case)
    for case in checks.in_both_layouts(checks.PATH_SHAPES):
        yield from _paths(case, device)
    for case in checks.in_both_layouts(checks.PATH_SHAPES):
        yield replace(of_case(case), shortcut=True)
    yield from _launches(device)
    for name, sizes in networks.NORMS.items():
        for batch in networks.BATCHES[name]:
            for side, channels in sizes.items():
                for one in channels:
                    yield from _network(batch, side, one, attention=one in networks.ATTENTION[name].get(side, ()))
    for check in odd_checks():
        yield of_check(check)
    yield from _clusters(device)
    for case in rest.other_cases(False):
        yield of_case(case)


def of_case(case: Case) -> Build:
    """Return the kernels of a case of the benchmark, by the heuristic."""
    extras = ("weight", "bias", *EXTRAS[case.extras])
    return Build(case.shape, NUM_GROUPS, DTYPES[case.dtype], case.layout == "channels_last", extras)


def of_check(check: Check) -> Build:
    """Return the kernels of a check of odd sizes."""
    return Build(check.shape, check.groups, check.dtype, check.channels_last, check.extras)


def _paths(case: Case, device: Device) -> Iterator[Build]:
    for dtype in DTYPES:
        for extras in EXTRAS:
            one = replace(case, dtype=dtype, extras=extras)
            forwards, backwards = paths.forward_plans(one, device), paths.backward_plans(one, device)
            for path in ("resident", "split"):
                if path in forwards or path in backwards:
                    yield of_case(one).by(forwards.get(path), backwards.get(path))


def _launches(device: Device) -> Iterator[Build]:
    for case in checks.in_both_layouts(launches.SHAPES):
        for which in PASSES:
            for name, plan in launches.possible(case, which, device).items():
                if not name.startswith("cluster"):
                    yield of_case(case).by(**{which: plan})
    for shape, layout, which, change in launches.CHANGES:
        case = Case(shape, "bfloat16", layout)
        changed = launches.changed(launches.planned(case, which, device), change)
        if changed is not None:
            yield of_case(case).by(**{which: changed})


def _network(batch: int, side: int, channels: int, attention: bool = False) -> Iterator[Build]:
    for layout in LAYOUTS:
        plain = of_case(Case((batch, channels, side, side), "bfloat16", layout))
        yield plain
        yield replace(plain, shortcut=True)
        yield replace(plain, extras=(*plain.extras, "pre_bias"))
        if attention:
            yield replace(plain, activation=False)
            yield replace(plain, activation=False, shortcut=True)


def _clusters(device: Device) -> Iterator[Build]:
    for case in checks.plain_cases(False):
        yield replace(of_case(case), clusters=True)
    for case in checks.in_both_layouts(checks.CLUSTER_SHAPES):
        for one in (case, replace(case, extras="pre_bias")):
            for name, plan in paths.forward_plans(one, device).items():
                if name.startswith("cluster"):
                    yield replace(of_case(one), forward=plan)
            for name, plan in paths.backward_plans(one, device).items():
                if name.startswith("cluster"):
                    yield replace(of_case(one), backward=plan)
    for check in cluster_checks():
        yield replace(of_check(check), clusters=True)
