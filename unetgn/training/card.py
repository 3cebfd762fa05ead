"""Adds to the README.md of a run's pipeline what its run knows: data, training, figures, a picture, the licence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import yaml

from unetgn.json_files import read_object
from unetgn.messages import plain, short
from unetgn.pipelines.card import HERE, NAME, OURS, WHERE
from unetgn.training.checkpoint import CHECKPOINTS, CONFIG, list_checkpoints, step_of
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config
from unetgn.training.data.config import EMBEDDED, DataConfig
from unetgn.training.data.report import DATA, read_class_names
from unetgn.training.data.shards import is_on_hub
from unetgn.training.errors import one_line
from unetgn.training.files import write_text, writing
from unetgn.training.run_directory import OF_FEATURES, RunDirectory

PICTURE = "samples.png"  # beside the card
BEGINNING, END = "\n## Training\n", "\n<!-- what follows is yours, and stays -->\n"  # of what is added
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
LISTED = 100  # classes whose names the card lists


def check_licence(licence: str) -> str:
    """Return a licence by its identifier. Raises ValueError for what is none."""
    if not LICENCE.fullmatch(licence):
        raise ValueError(f"{short(licence)} is no identifier of a licence, such as apache-2.0, mit, cc-by-4.0 or other")
    return licence


def finish_card(pipeline: Path, *, run: Path | None = None, licence: str | None = None) -> None:
    """Write into the card of a pipeline what its run's folder says, and the licence; one that somebody wrote stays.

    Raises ValueError where the licence cannot go into the card, or a file of the run is none; OSError.
    """
    file = pipeline / NAME
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not text.startswith(OURS):
        if licence is not None:
            raise ValueError(f"{file} is not of unetgn's making: write the line `license: {licence}` into it yourself")
        return
    head, _, body = text.removeprefix(OURS).partition("---\n")
    try:
        fields = dict(yaml.safe_load(head) or {})
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{file}: its first lines are no YAML: {one_line(error)}") from error
    if licence is not None:
        fields["license"] = check_licence(licence)
    if run is not None:
        config = load_config(run / CONFIG)
        found = list(evaluations(run, config))
        figures, ways = {name: row for name, row, _ in found}, {name: way for name, _, way in found}
        data = data_of(run, config.data)
        fields.pop("model-index", None)
        if figures:
            fields["model-index"] = index_of(figures, ways, name=run.resolve().name, data=data)
        paragraphs = [
            trained(config),
            f"Data: {data}.",
            *classes_of(run),
            *picture_of(run, pipeline),
            *listed(figures, ways),
        ]
        added = "".join(f"\n{paragraph}\n" for paragraph in paragraphs)
        body = f"{body.partition(BEGINNING)[0]}{BEGINNING}{added}{END}{body.partition(END)[2]}"
    write_text(file, f"{OURS}{yaml.safe_dump(fields, sort_keys=False)}---\n{body}")


def as_on_hub(text: str, repo: str) -> str:
    """Return a card as it is on the hub: its lines load the repository, where those in the folder load the folder.

    What somebody wrote stays.
    """
    if not text.startswith(OURS):
        return text
    ours, training, added = text.partition(BEGINNING)
    return ours.replace(WHERE, "").replace(HERE, f'"{repo}"') + training + added


def carry_over(before: Path, card: Path) -> None:
    """Have a new card keep what somebody wrote into the one before it: all of their own, or fields and what ends ours.

    Raises OSError.
    """
    if not before.is_file():
        return
    old = before.read_text(encoding="utf-8", errors="replace")
    if not old.startswith(OURS):
        shutil.copyfile(before, card)
        return
    head, _, body = old.removeprefix(OURS).partition("---\n")
    new = card.read_text(encoding="utf-8").removeprefix(OURS).partition("---\n")[2]
    write_text(card, f"{OURS}{head}---\n{new}" + (f"{END}{yours}" if (yours := body.partition(END)[2]) else ""))


def listed(figures: dict[str, dict[str, float]], ways: dict[str, str]) -> Iterator[str]:
    """Write the figures as a table, and how they were found, where there are any."""
    if figures:
        columns = list(dict.fromkeys(name for row in figures.values() for name in row if not name.endswith("_of_real")))
        rows = [" | ".join([name, *(cell(row, column) for column in columns)]) for name, row in figures.items()]
        yield "## Figures"
        yield "Of samples that the averaged weights drew; in brackets what real images reach that were held out."
        yield "\n".join([f"| samples by | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
                         *(f"| {row} |" for row in rows)])  # fmt: skip
        if said := "; ".join(f"{name}: {way}" for name, way in ways.items() if way):
            yield (
                f"fid, kid, precision and recall by {said}. Figures of other features, or of other numbers of images, "
                "do not compare."
            )


def picture_of(run: Path, pipeline: Path) -> Iterator[str]:
    """Copy the newest samples of the run beside the card, and show them, where there are any."""
    if pictures := list((run / "samples").glob("step-*.png")):
        with writing(pipeline / PICTURE) as unfinished:
            shutil.copyfile(max(pictures, key=by_length), unfinished)
        yield f"![Samples that were drawn during training]({PICTURE})"


def by_length(picture: Path) -> tuple[int, str]:
    """Return what sorts names of steps: those of seven digits come after those of six."""
    return len(picture.name), picture.name


def cell(row: dict[str, float], column: str) -> str:
    """Write a figure, with that of real images."""
    if column not in row:
        return ""
    real = row.get(f"{column}_of_real")
    return f"{row[column]:.4g}" + ("" if real is None else f" ({real:.4g})")


def trained(config: RunConfig) -> str:
    """Say how the network was trained."""
    train, objective = config.train, config.objective
    predicts = f"{objective.prediction_type} ({objective.schedule} noise schedule)"
    aim = "EDM's objective" if objective.edm is not None else f"the network predicts {predicts}"
    return (
        f"{train.steps:,} steps of {train.batch_size * train.gradient_accumulation} images in each process, peak "
        f"learning rate {train.learning_rate:g}; {aim}. The weights are their moving average (decay "
        f"{config.ema.decay:g})."
    )


def data_of(run: Path, data: DataConfig) -> str:
    """Name the data that a run was trained on, without saying where they lay on its machine."""
    if data.path is None:
        name = EMBEDDED[data.name][2]
    elif data.name == "stream" and is_on_hub(data.path):
        name = data.path
    else:
        name = last if (last := Path(data.path).name) not in ("", "..") else "a folder"
    images = read_object(run / DATA).get("images") if (run / DATA).is_file() else None
    counted = f"{images:,} images of " if isinstance(images, int) else ""
    return f"{name} ({data.name}), {counted}{data.size[1]}×{data.size[0]} pixels"


def classes_of(run: Path) -> Iterator[str]:
    """List the classes of a run by their numbers, where they have names that are not these."""
    names = read_class_names(run) or []
    if names != [str(number) for number in range(len(names))]:
        named = ", ".join(f"{number} {plain(name)}" for number, name in enumerate(names[:LISTED]))
        yield f"Classes: {named}" + (f" and {len(names) - LISTED} more." if len(names) > LISTED else ".")


def evaluations(run: Path, config: RunConfig) -> Iterator[tuple[str, dict[str, float], str]]:
    """Find the figures of the run's last step, by the settings of their samples, each with how they were found.

    Raw weights are not those here.
    """
    saved = list_checkpoints(run / CHECKPOINTS)
    step = step_of(saved[-1]) if saved else None
    for file in sorted((run / "evaluation").glob("step-*/*/evaluation.json")):
        figures = read_object(file)
        if figures.get("step") == step and not file.parent.name.startswith("raw"):
            numbers = {name: value for name, value in figures.items()
                       if isinstance(value, int | float) and is_figure(str(value))}  # fmt: skip
            numbers.pop("step", None)
            yield file.parent.name, numbers, way_of(figures)
    for row in RunDirectory(run).rows("evaluation.csv"):
        if row["step"] == str(step):
            figures = {name: float(row[name]) for name in row if name != "step" and is_figure(row[name])}
            own = config.data.name if config.data.name in EMBEDDED else "inception"  # as it is where none is asked for
            asked = config.evaluate.extractor or own
            way = {"extractor": {"name": asked}, "samples": config.evaluate.count, "reference": {"part": "held_out"}}
            yield "evaluate.*, while it trained", figures, way_of(way)


def way_of(found: dict[str, Any]) -> str:
    """Say what made the features of figures, and of how many images; "" where none were made."""
    extractor, reference = found.get("extractor"), found.get("reference")
    if not isinstance(extractor, dict) or not isinstance(reference, dict) or "name" not in extractor:
        return ""
    samples, images, part = found.get("samples"), reference.get("images"), str(reference.get("part", ""))
    real = " ".join(word for word in (str(images or ""), "real images", f"({plain(part)})" if part else "") if word)
    return f"features of {plain(PurePath(str(extractor['name'])).name)}, {samples} samples against {real}"


def named(metric: str, way: str) -> dict[str, str]:
    """Name a metric that features were made for with them; others need none."""
    return {"name": f"{metric} ({way})"} if way and metric.split("_")[0] in OF_FEATURES else {}


def is_figure(text: str) -> bool:
    """Return True where a text of a log is a finite number."""
    try:
        return isfinite(float(text))
    except ValueError:
        return False


def index_of(
    figures: dict[str, dict[str, float]], ways: dict[str, str], *, name: str, data: str
) -> list[dict[str, Any]]:
    """Write the figures of most samples as the hub's field model-index has them."""
    which = max(figures, key=lambda name: figures[name].get("samples", 0))
    metrics = [
        {"type": metric, **named(metric, ways[which]), "value": value}
        for metric, value in figures[which].items()
        if metric != "samples" and not metric.endswith("_of_real")
    ]
    task, dataset = {"type": "unconditional-image-generation"}, {"name": data, "type": "images"}
    return [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
