"""Counts how much of diffusers `unetgn.fuse` takes: `python -m benchmarks.fuse_coverage`.

For every model class of the installed diffusers in which a group norm is at work: builds a small instance with random
weights, runs it, and watches which results of a group norm reach a SiLU, directly or by way of additions and products
(a *place*). Then fuses it, runs it again, and counts the places whose norm reaches the fused operator in that run.
Prints a table in Markdown and writes `benchmarks/results/fuse_coverage.json`; `--readme` prints, from that file, the
rows that README has. A class without a recipe in `fuse_recipes_*.py` is a row of its own. Exit code 1 where the report
of `fuse` says otherwise than the runs, where outputs differ, or where a recipe is missing.
"""

from __future__ import annotations

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import importlib
import importlib.metadata
import inspect
import json
import re
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

import unetgn.fusion
from benchmarks.fuse_instances import Recipe, build
from benchmarks.fuse_recipes_autoencoders import AUTOENCODER_RECIPES
from benchmarks.fuse_recipes_unets import CONTROLNET_RECIPES, UNET_RECIPES
from benchmarks.fuse_watching import OperatorWatcher, PlaceWatcher
from benchmarks.result_file import result_file

UNREPORTED = "not in the report"
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}  # of the largest difference, relative to the largest output
RECIPES = [*UNET_RECIPES, *CONTROLNET_RECIPES, *AUTOENCODER_RECIPES]
RESULTS = Path(__file__).parent / "results" / "fuse_coverage.json"


@dataclass(frozen=True)
class Row:
    """Holds what is counted of one model; `wrong` is empty where nothing is wrong, `left` says why places are left."""

    model: str
    variant: str
    places: int
    fused: int
    left: str
    wrong: str


def model_classes(only: str = "") -> list[type[nn.Module]]:
    """Return the model classes that the installed diffusers defines, those with `only` in their path."""
    root = Path(inspect.getfile(diffusers)).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        parts = file.relative_to(root).with_suffix("").parts
        module = ".".join(["diffusers", *(part for part in parts if part != "__init__")])
        defined = re.findall(r"^class (\w+)", text, re.MULTILINE)
        if "ModelMixin" in text and any(only in f"{module}.{name}" for name in defined):
            importlib.import_module(module)
    found = {cls for cls in _subclasses(diffusers.ModelMixin) if cls.__module__.startswith("diffusers.")}
    return sorted((cls for cls in found if only in _path(cls)), key=_path)


def has_group_norm(cls: type[nn.Module]) -> bool:
    """Return True where an instance, by default, has a group norm; where none can be made, where its file names one."""
    try:
        with torch.device("meta"):
            return any(isinstance(module, nn.GroupNorm) for module in cls().modules())
    except Exception:  # whatever a constructor without its arguments may raise
        return "GroupNorm" in Path(inspect.getfile(cls)).read_text(encoding="utf-8")


def measure(recipe: Recipe, cls: type[nn.Module]) -> Row:
    """Build, watch, fuse, watch again."""
    torch.manual_seed(0)
    dtype = getattr(torch, recipe.dtype)
    model, inputs = build(recipe, cls).to(dtype), _cast(recipe.inputs(), dtype)
    with PlaceWatcher(model) as places:
        expected = _run(recipe, model, inputs)
    report = unetgn.fuse(model)
    with OperatorWatcher(model) as operator:
        actual = _run(recipe, model, inputs)
    return _row(recipe, list(places.places), list(operator.reached), report, _largest_error(actual, expected))


def _row(recipe: Recipe, places: list[str], reached: list[str], report: unetgn.fusion.Report, error: float) -> Row:
    """Count, and compare what the report says of each place with what the run of the fused model showed."""
    left = [place for place in places if not any(_within(place, path) for path in reached)]
    reasons = Counter(_reason(place, report) for place in left)
    without_silu = [p.path for p in report.fused if not p.only and not any(_within(path, p.path) for path in places)]
    wrong = [f"reported as fused, without a SiLU in the run: {path}" for path in without_silu]
    wrong += [f"reported as fused, runs as written: {place}" for place in left if _is_claimed(place, report)]
    wrong += [f"outputs differ by {error:.1e}"] if not error < TOLERANCES[recipe.dtype] else []
    wrong += [UNREPORTED] if UNREPORTED in reasons else []
    text = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    return Row(recipe.name, recipe.variant, len(places), len(places) - len(left), text, "; ".join(wrong))


def coverage(only: str = "") -> Iterator[Row]:
    """Yield a row for each recipe, and for each class with a group norm that has none."""
    for cls in model_classes(only):
        recipes = [recipe for recipe in RECIPES if recipe.path == _path(cls)]
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
    """Write the rows in Markdown, with a sum."""
    lines = ["| model | variant | GroupNorm → SiLU | fused | left, and why |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.model} | {row.variant} | {row.places} | {row.fused} | {row.left or row.wrong} |")
    lines.append(f"| **all** | | **{sum(row.places for row in rows)}** | **{sum(row.fused for row in rows)}** | |")
    return "\n".join(lines)


def readme_table(rows: list[Row]) -> str:
    """Write the rows for README: a line for each kind of model and reason, with the sum of each model's variants."""
    lines = ["| of diffusers | fused / places | left, and why |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.places:
            groups.setdefault((row.left.partition(": ")[2], _kind(row)), []).append(row)
    for (reason, kind), alike in sorted(groups.items()):
        names = {row.model: [other for other in alike if other.model == row.model] for row in alike}
        models = ", ".join(f"{name} {_fraction(variants)}" for name, variants in names.items())
        lines.append(f"| {kind}: {models} | {_fraction(alike)} | {reason} |")
    return "\n".join([*lines, f"| **all** | **{_fraction(rows)}** | |"])


def _kind(row: Row) -> str:
    kinds = {"U-Nets": UNET_RECIPES, "ControlNets": CONTROLNET_RECIPES}
    named = (kind for kind, recipes in kinds.items() if row.model in {recipe.name for recipe in recipes})
    return "upsamplers" if "Upsampler" in row.model else next(named, "autoencoders")


def _fraction(rows: list[Row]) -> str:
    return f"{sum(row.fused for row in rows)}/{sum(row.places for row in rows)}"


def recorded() -> list[Row]:
    """Read the rows of the last whole run."""
    return [Row(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]]


def _run(recipe: Recipe, model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return list(_tensors(recipe.run(model, inputs)))


def _largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


def _is_claimed(place: str, report: unetgn.fusion.Report) -> bool:
    return any(_within(place, fused.path) and not fused.only for fused in report.fused)


def _reason(place: str, report: unetgn.fusion.Report) -> str:
    reasons = [left.reason for left in report.left if _within(place, left.path)]
    reasons += [fused.only or "reported as fused" for fused in report.fused if _within(place, fused.path)]
    return reasons[0] if reasons else UNREPORTED


def _within(place: str, path: str) -> bool:
    return place == path or place.startswith(path + ".")


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    subclasses: list[type[Any]] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return [_cast(item, dtype) for item in value] if isinstance(value, list) else value


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def main(given: list[str] | None = None) -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the path of the classes to go through; writes no file")
    parser.add_argument("--readme", action="store_true", help="print README's rows from the recorded results")
    arguments = parser.parse_args(given)
    only = arguments.only
    if arguments.readme:
        print(readme_table(recorded()))
        return 0
    out = None if only else result_file(parser, None, RESULTS.name)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    rows = list(coverage(only))
    print(table(rows))
    if out is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
        out.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"{row.model} {row.variant}: {row.wrong}", file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
