"""Puts figures of a run's checkpoints, or of the widths of its averages, side by side, and draws one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unetgn.json_files import read_object
from unetgn.sampling.drawn import EVALUATION
from unetgn.training.checkpoint import PREFIX
from unetgn.training.errors import reason
from unetgn.training.files import writing
from unetgn.training.power_averages import AVERAGES
from unetgn.training.preview import import_pyplot

BESIDE = "evaluation.json"  # the figures of a folder of samples, in it


def judged_by(row: dict[str, Any]) -> dict[str, Any]:
    """Return what rows have to agree in, so that their figures can be compared."""
    digests = {name: (row.get(name) or {}).get("sha256") for name in ("extractor", "reference")}
    return {"samples": row.get("samples"), **digests}


def beside(samples: Path) -> Path:
    """Name the file of figures beside samples."""
    return samples / BESIDE if samples.is_dir() else samples.with_suffix(".evaluation.json")


def gather(
    run: Path, name: str, rows: Sequence[dict[str, Any]], *, widths: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows with those that lie beside the samples called `name` of other checkpoints or widths, by their step.

    And, in words, which of these are left out, for they were judged otherwise or cannot be read.
    """
    homes = sorted(run.glob(f"{AVERAGES}/width-*/{EVALUATION}")) if widths else [run / EVALUATION]
    found, left_out = list(rows), []
    judged = {(row["step"], row.get("width")) for row in rows}
    for file in (file for home in homes for file in sorted(home.glob(f"{PREFIX}*/{name}/{BESIDE}"))):
        try:
            row = read_object(file)
            if ("width" in row) != widths or (key := (int(row["step"]), row.get("width"))) in judged:
                continue
            this, wanted = judged_by(row), judged_by(rows[0])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            left_out.append(f"{file} is left out, for it cannot be read: {reason(error)}")
            continue
        if other := [name for name in wanted if this[name] != wanted[name]]:
            left_out.append(f"{file} is left out, for it was judged by other {' and '.join(other)}")
            continue
        judged.add(key)
        found.append(row)
    return sorted(found, key=lambda row: row["step"]), left_out


def draw_curve(rows: Sequence[dict[str, Any]], metric: str, file: Path, *, along: str = "step") -> None:
    """Draw a figure along the step, or along the width of averages, a line a step, with that of real images as a line.

    Raises OSError.
    """
    rows = [row for row in rows if metric in row]
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    samples = f"{rows[-1]['samples']} samples"
    if along == "step":
        axes.plot([row["step"] for row in rows], [row[metric] for row in rows], "o-", label=samples)
    else:
        for step in dict.fromkeys(row["step"] for row in rows):
            points = sorted((row["width"], row[metric]) for row in rows if row["step"] == step)
            axes.plot(*zip(*points, strict=True), "o-", label=f"step {step}, {samples}")
    of_real = rows[-1].get(f"{metric}_of_real")
    if of_real is not None:
        axes.axhline(of_real, color="grey", linestyle="--", label="real images")
    axes.set(xlabel=along if along == "step" else "width of the average (sigma_rel)", ylabel=metric)
    axes.legend()
    with writing(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)
