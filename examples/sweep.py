"""Tries every combination of some keys, one run each, and lists them by their best figure.

    python examples/sweep.py --config digits8_ddpm train.steps=300 \\
        train.learning_rate=1e-3,2e-3,5e-3 optimizer.name=adamw,muon

A key with several values, divided by commas, is tried with each; all others hold for every run. What the key takes as a
whole is one value: lists (train.betas=0.9,0.99) and texts (train.learning_rate_rules=1:100,0.1); of these, give the key
once for each, as in model.channels=16,32 model.channels=32,64. The runs lie in --out,
by their values. Each that is done, or was interrupted, goes on where it stopped when the same line is given again. The
figure is the least held-out loss (validation.csv), or with --metric fid or kid that of evaluate.every (evaluation.csv).
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from unetgn.programs.paths import folder_to_write

try:
    from unetgn.training.config_files import known_keys
    from unetgn.training.values import as_meant, fits
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is not installed: pip install -e ".[train]"') from None

TRAIN = Path(__file__).resolve().parents[1] / "training" / "train.py"
MADE_BY = {"loss": "train.validate_every", "fid": "evaluate.every", "kid": "evaluate.every"}
LOGS = {"loss": "validation.csv", "fid": "evaluation.csv", "kid": "evaluation.csv"}


def combinations(keys: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Give every combination of the values of `key=value,value,…`, with a name of what differs."""
    values: dict[str, list[str]] = {}
    for key in keys:
        name, _, value = key.partition("=")
        values.setdefault(name, []).extend(values_in(name, value))
    for chosen in itertools.product(*values.values()):
        pairs = [(name, value, len(values[name])) for name, value in zip(values, chosen, strict=True)]
        differing = [f"{name.rpartition('.')[2]}={value}" for name, value, number in pairs if number > 1]
        yield ",".join(differing) or "run", [f"{name}={value}" for name, value, _ in pairs]


def values_in(name: str, value: str) -> list[str]:
    """Divide values at their commas, unless the key takes them as a whole."""
    key = known_keys().get(name)
    if value.startswith(("[", "{")) or (key is not None and fits(key.kind, as_meant(key.kind, value))):
        return [value]
    return value.split(",")


def least(run: Path, metric: str) -> float:
    """Read the least figure that a run logged; infinite where there is none."""
    file = run / LOGS[metric]
    if not file.is_file():
        return float("inf")
    with file.open(encoding="utf-8", newline="") as lines:
        return min((float(row[metric]) for row in csv.DictReader(lines)), default=float("inf"))


def main(config: str, keys: list[str], out: Path, metric: str = "loss") -> list[tuple[float, str]]:
    """Make the runs, one after the other, and return (figure, name) of each, the best first."""
    found = []
    for name, chosen in combinations(keys):
        run = out / name.replace(os.sep, "_")
        line = [sys.executable, str(TRAIN), "--config", config, "--output", str(run), "--resume", "auto", *chosen]
        ended = subprocess.run(line).returncode
        figure = least(run, metric)
        if ended:
            print(f"{name}: it did not come to its end; what it says is above", file=sys.stderr)
        elif figure == float("inf"):  # nor would the others
            raise SystemExit(f"{name} has no {metric} to be listed by: set {MADE_BY[metric]} (and data.held_out)")
        found.append((figure, name))
    return sorted(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument(
        "--out",
        type=folder_to_write,
        default=Path("runs/sweep"),
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument("--metric", choices=LOGS, default="loss", help="figure that they are listed by (default: loss)")
    parser.add_argument("keys", nargs="+", metavar="key=value,value,…")
    given = parser.parse_args()
    if wrong := [key for key in given.keys if "=" not in key]:
        parser.error(f"{wrong[0]} is not key=value")
    for figure, name in main(given.config, given.keys, given.out, given.metric):
        print(f"{figure:<12.6g} {name}")
