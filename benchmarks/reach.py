"""Counts which of people's U-Nets load: `python -m benchmarks.reach configs.json`.

The file is a list of {"name", "class", "config"}: constructor options of diffusers' U-Nets as they were found. Each
model is built at its full size without memory, and converted: every key has its place, or it is refused. One that loads
is then run beside diffusers' own, as it is or as a small copy of the same kind, with random weights in float64; where
they differ, it is wrong. Prints a table in Markdown and the reasons of refusals, and writes
`benchmarks/results/reach.json`; `--readme` and `--guide` print, from that file, the tables that README and the guide
have. Exit code 1 where one is wrong.
"""

from __future__ import annotations

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import importlib.metadata
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from benchmarks.reach_small import MOST, inputs, small_copy
from benchmarks.result_file import result_file
from unetgn import UNet
from unetgn.programs.paths import user_path
from unetgn.training.files import write_json

RESULTS = Path(__file__).parent / "results" / "reach.json"
EXACT, ROUNDED = 1e-10, 1e-4  # where sinusoids are exact in float32, as diffusers has them, and where they are not
POOLED_IN_FLOAT32 = 1e-6  # the weights by which diffusers pools a text
FAMILIES = (  # the first whose words are in the class's name, a type of block or an option's value
    ("NCSN++", ("Skip",)),
    ("x2 upscaler", ("KDown", "KCross", "KUp")),
    ("GLIGEN", ("gated",)),
    ("video", ("UNet3D", "UNetMotion", "SpatioTemporal", "I2VGen")),
    ("Stable Cascade", ("StableCascade",)),
    ("one-dimensional", ("UNet1D",)),
    ("Kandinsky, Karlo, DeepFloyd IF", ("Simple",)),
)


@dataclass(frozen=True)
class Row:
    """Holds what became of one configuration; `compared` says of what size the two ran, `error` how far apart."""

    name: str
    family: str
    verdict: Literal["loads", "refused", "wrong"]
    reason: str = ""
    compared: str = ""
    error: float | None = None


def family(class_name: str, config: dict[str, Any]) -> str:
    """Name the family that a configuration belongs to, by its class and its blocks."""
    types = [*config.get("down_block_types", ()), *config.get("up_block_types", ()), config.get("mid_block_type")]
    words = f"{class_name} {' '.join(map(str, types))} {config.get('attention_type')}"
    for name, parts in FAMILIES:
        if any(part in words for part in parts):
            return name
    if class_name == "UNet2DModel":
        return "DDPM, ADM, LDM: UNet2DModel"
    if class_name != "UNet2DConditionModel":
        return "other classes"
    return "Stable Diffusion XL" if config.get("addition_embed_type") == "text_time" else "Stable Diffusion, LDM, audio"


def judge(name: str, class_name: str, config: dict[str, Any]) -> Row:
    """Convert one model, and run it beside diffusers' own."""
    kind = family(class_name, config)
    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        return Row(name, kind, "refused", f"diffusers has no class {class_name}")
    try:
        with torch.device("meta"):
            model = model_class.from_config(config)
    except Exception as refusal:  # whatever a constructor may raise
        return Row(name, kind, "refused", f"diffusers cannot build it either: {_line(refusal)}")
    try:
        UNet.from_diffusers(model)
    except (ValueError, TypeError) as refusal:
        return Row(name, kind, "refused", _line(refusal))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = parameters <= MOST
    options = {key: value for key, value in model.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    small = model_class.from_config(options if whole else small_copy(options)).eval()
    try:
        with torch.no_grad():
            small(**_given(small, origin=True))
    except RuntimeError:  # one context for levels that read several
        return Row(name, kind, "loads", "", "by names and shapes: diffusers cannot run it")
    error, limit = compare(small)
    verdict: Literal["loads", "wrong"] = "loads" if error <= limit else "wrong"
    return Row(name, kind, verdict, "", "as it is" if whole else "a small copy", error)


def compare(model: Any) -> tuple[float, float]:
    """Return how far our network is from a model of diffusers, relatively, and how far it may be."""
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter)
            parameter.copy_(drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * drawn)
    labels_in_float32 = type(model) is diffusers.UNet2DModel and model.config.class_embed_type == "timestep"
    model = model if labels_in_float32 else model.double()
    ours = UNet.from_diffusers(model)
    exact, rounded = (_difference(model, ours, origin=origin) for origin in (True, False))
    limit = POOLED_IN_FLOAT32 if model.config.get("addition_embed_type") == "text" else EXACT
    limit = 2e-5 if labels_in_float32 else limit
    return (exact, limit) if rounded <= ROUNDED else (rounded, ROUNDED)


def _difference(model: Any, ours: UNet, *, origin: bool) -> float:
    given = _given(model, origin=origin)
    taken = dict(given)
    if ours.unet_config.context_dims is None:
        taken.pop("encoder_hidden_states", None)
    with torch.no_grad():
        expected, actual = model(**given).sample, ours(**taken).sample
    return float((actual - expected).abs().max() / expected.abs().max())


def _given(model: Any, *, origin: bool) -> dict[str, Any]:
    return {name: _as(value, model.dtype) for name, value in inputs(model, origin=origin).items()}


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _as(item, dtype) for name, item in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def table(rows: Iterable[Row]) -> str:
    """Write the guide's table: a line for each family, and a sum."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.family, Counter())[row.verdict] += 1
    verdicts = ("loads", "refused", "wrong")
    lines = ["| family | loads | refused | wrong |", "|---|---|---|---|"]
    for name, count in sorted(counts.items(), key=lambda item: (-item[1]["loads"], item[0])):
        lines.append(f"| {name} | {' | '.join(str(count[verdict]) for verdict in verdicts)} |")
    total = sum(counts.values(), Counter[str]())
    return "\n".join([*lines, f"| **all** | {' | '.join(f'**{total[verdict]}**' for verdict in verdicts)} |"])


def readme_table(rows: Iterable[Row]) -> str:
    """Write README's table: the families of which any load, the others in one line, and the sum."""
    rows = list(rows)
    loading = {row.family for row in rows if row.verdict != "refused"}
    others = ", ".join(dict.fromkeys(row.family for row in rows if row.family not in loading))
    return table(row if row.family in loading else replace(row, family=others) for row in rows)


def refusals(rows: Iterable[Row]) -> str:
    """Write the reasons of refusals, the most frequent first."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict == "refused":
            reasons.setdefault(row.reason, []).append(row.name)
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    return "\n".join(f"{len(names)} refused: {reason} (first: {names[0]})" for reason, names in ordered)


def recorded() -> list[Row]:
    """Read the rows of the last run."""
    return [Row(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]]


def main(arguments: list[str] | None = None) -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="?", type=user_path, help="the file of configurations")
    parser.add_argument("--output", type=user_path, help="JSON file; by default under benchmarks/results")
    parser.add_argument("--readme", action="store_true", help="print README's table from the recorded results")
    parser.add_argument("--guide", action="store_true", help="print the guide's table from the recorded results")
    options = parser.parse_args(arguments)
    if options.readme or options.guide:
        print((readme_table if options.readme else table)(recorded()))
        return 0
    if options.configs is None:
        parser.error("give the file of configurations")
    out = result_file(parser, options.output, RESULTS.name, option="--output")
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    entries = json.loads(options.configs.read_text(encoding="utf-8"))
    rows = [judge(entry["name"], entry["class"], entry["config"]) for entry in entries]
    print(table(rows), refusals(rows), sep="\n\n")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    write_json(out, {"versions": versions, "rows": [asdict(row) for row in rows]})
    wrong = [row for row in rows if row.verdict == "wrong"]
    for row in wrong:
        print(f"wrong: {row.name} is {row.error:.1e} off", file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
