"""How much of diffusers does `unetgn.fuse` take? `python -m benchmarks.fuse_coverage`

For every model class of the installed diffusers in which a group norm is at work: builds a small instance with random
weights, runs it, and watches which results of a group norm reach a SiLU, directly or by way of additions and products
(a *place*). Then fuses it, counts the places that `fuse` took, runs it again and compares. Prints a table in Markdown
and writes `benchmarks/results/fuse_coverage.json`. A class without a recipe in `fuse_recipes_*.py` is a row of its own.
Exit code 1 where the report of `fuse` and the run disagree, where outputs differ, or where a recipe is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unetgn.fusion
from benchmarks.fuse_instances import Recipe, build
from benchmarks.fuse_recipes_autoencoders import AUTOENCODER_RECIPES
from benchmarks.fuse_recipes_unets import CONTROLNET_RECIPES, UNET_RECIPES

UNREPORTED = "not in the report"
RECIPES = [*UNET_RECIPES, *CONTROLNET_RECIPES, *AUTOENCODER_RECIPES]
RESULTS = Path(__file__).parent / "results" / "fuse_coverage.json"
ATEN = torch.ops.aten
CARRIES = {ATEN.mul.Tensor, ATEN.add.Tensor, ATEN.cat.default, ATEN.clone.default, ATEN._unsafe_view.default}


@dataclass(frozen=True)
class Row:
    """One model: the places seen, those fused, why the others are left, and what is wrong (empty where nothing is)."""

    model: str
    variant: str
    places: int
    fused: int
    left: str
    wrong: str


class PlaceWatcher(TorchDispatchMode):
    """Notes the paths of the modules that computed a group norm whose result reached a SiLU, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, None] = {}
        self._running: list[str] = []
        self._made_by: dict[int, tuple[Tensor, str]] = {}
        self._hooks = []
        for path, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda _m, _a, path=path: self._running.append(path)))
            self._hooks.append(module.register_forward_hook(lambda _m, _a, _o: self._leave(), always_call=True))

    def _leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is ATEN.native_group_norm.default:
            self._made_by[id(result[0])] = (result[0], self._running[-1])
        elif func in CARRIES or func.is_view:
            given = args[0] if func is ATEN.cat.default else args
            sources = [self._made_by[id(t)][1] for t in given if isinstance(t, Tensor) and id(t) in self._made_by]
            for made in result if isinstance(result, (list, tuple)) else [result]:
                if sources:
                    self._made_by[id(made)] = (made, sources[0])
        elif func in (ATEN.silu.default, ATEN.silu_.default) and id(args[0]) in self._made_by:
            self.places[self._made_by[id(args[0])][1]] = None
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()


def model_classes() -> list[type[nn.Module]]:
    """Every model class that the installed diffusers defines."""
    root = Path(inspect.getfile(diffusers)).parent
    for file in sorted(root.rglob("*.py")):
        if "ModelMixin" in file.read_text(encoding="utf-8"):
            parts = file.relative_to(root).with_suffix("").parts
            importlib.import_module(".".join(["diffusers", *(part for part in parts if part != "__init__")]))
    found = {cls for cls in _subclasses(diffusers.ModelMixin) if cls.__module__.startswith("diffusers.")}
    return sorted(found, key=_path)


def has_group_norm(cls: type[nn.Module]) -> bool:
    """Whether an instance, by default, has a group norm; where none can be made, whether its file speaks of one."""
    try:
        with torch.device("meta"):
            return any(isinstance(module, nn.GroupNorm) for module in cls().modules())
    except Exception:  # whatever a constructor without its arguments may raise
        return "GroupNorm" in Path(inspect.getfile(cls)).read_text(encoding="utf-8")


def measure(recipe: Recipe, cls: type[nn.Module]) -> Row:
    """Build, watch, fuse, run again."""
    torch.manual_seed(0)
    model, inputs = build(recipe, cls).double(), _as_double(recipe.inputs())
    expected, places = _watch(recipe, model, inputs)
    report = unetgn.fuse(model)
    taken = {place: next((p for p in report.fused if _within(place, p.path)), None) for place in places}
    torch.manual_seed(1)
    with torch.no_grad():
        actual = list(_tensors(recipe.run(model, inputs)))
    reasons = Counter(_reason(place, report) for place in places if taken[place] is None)
    error = max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))
    claimed = {p.path for p in report.fused} - {p.path for p in taken.values() if p is not None}
    wrong = [f"fused without a SiLU in the run: {path}" for path in sorted(claimed)]
    wrong += [f"outputs differ by {error:.1e}"] if not error < 1e-10 else []
    wrong += [UNREPORTED] if UNREPORTED in reasons else []
    text = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    return Row(recipe.name, recipe.variant, len(places), len(places) - sum(reasons.values()), text, "; ".join(wrong))


def coverage(only: str = "") -> Iterator[Row]:
    """A row for each recipe, and for each class with a group norm that has none."""
    for cls in model_classes():
        recipes = [recipe for recipe in RECIPES if recipe.path == _path(cls)]
        if only not in _path(cls):
            continue
        for recipe in recipes:
            yield measure(recipe, cls)
        if not recipes and cls.__name__ not in BUILDING_PARTS and has_group_norm(cls):
            yield Row(cls.__name__, "", 0, 0, "", "no recipe in benchmarks/fuse_recipes_*.py")


# Model classes that run only within another model that has a recipe, or have no SiLU: no instance of their own is run.
BUILDING_PARTS = {
    "ControlNetXSAdapter": "the control half of UNetControlNetXSModel",
    "MotionAdapter": "the motion modules of UNetMotionModel",
    "Transformer2DModel": "its group norm leads into a projection",
    "DreamLiteTransformer2DModel": "its group norm leads into a projection",
    "TransformerTemporalModel": "its group norm leads into a projection",
    "AudioLDM2ProjectionModel": "no group norm; its file has AudioLDM2UNet2DConditionModel",
}


def table(rows: list[Row]) -> str:
    """The rows in Markdown, with a sum."""
    lines = ["| model | variant | GroupNorm → SiLU | fused | left, and why |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.model} | {row.variant} | {row.places} | {row.fused} | {row.left or row.wrong} |")
    lines.append(f"| **all** | | **{sum(row.places for row in rows)}** | **{sum(row.fused for row in rows)}** | |")
    return "\n".join(lines)


def _watch(recipe: Recipe, model: nn.Module, inputs: Any) -> tuple[list[Tensor], list[str]]:
    torch.manual_seed(1)
    with torch.no_grad(), PlaceWatcher(model) as watcher:
        return list(_tensors(recipe.run(model, inputs))), list(watcher.places)


def _reason(place: str, report: unetgn.fusion.Report) -> str:
    return next((left.reason for left in report.left if _within(place, left.path)), UNREPORTED)


def _within(place: str, path: str) -> bool:
    return place == path or place.startswith(path + ".")


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    subclasses: list[type[Any]] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _as_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _as_double(item) for name, item in value.items()}
    return [_as_double(item) for item in value] if isinstance(value, list) else value


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def main() -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the path of the classes to go through; writes no file")
    only = parser.parse_args().only
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    rows = list(coverage(only))
    print(table(rows))
    if not only:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
        RESULTS.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"{row.model} {row.variant}: {row.wrong}", file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
