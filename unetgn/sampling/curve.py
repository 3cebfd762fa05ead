"""Draws how a figure changes over the checkpoints of a run, or over the widths of its averages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unetgn.training.files import writing
from unetgn.training.preview import import_pyplot


def draw_curve(rows: Sequence[dict[str, Any]], metric: str, file: Path, *, along: str = "step") -> None:
    """Draw a figure along the step, or along the width of averages, a line a step, with that of real images as a line.

    Raises OSError.
    """
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
