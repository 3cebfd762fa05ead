"""Judges samples against real images: python sampling/evaluate.py --samples PATH | --checkpoint RUN [--config NAME]

Samples are a folder, as sampling/sample.py wrote it or of any images, an NPZ with arr_0 (N, H, W, C), tar shards, or
what a checkpoint draws. Real images are those of a configuration, or a set like the samples (--real).

In pixels, averaged down to 32 where there are more: label_agreement, frechet_distance, novelty. In the features of an
extractor: fid, kid, precision, recall. What ends in _of_real is what as many real images reach that are not among those
compared with. All figures are printed, then written as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from unetgn.programs.last_words import lacks_memory, last_words, say
from unetgn.programs.paths import check_file
from unetgn.sampling.curve import BESIDE, beside, draw_curve, gather
from unetgn.sampling.drawn import EVALUATION, Drawing, draw, find_all, folder_of, look_ahead, make_averages
from unetgn.sampling.extractors import Extractor, ExtractorError, default_name, open_extractor
from unetgn.sampling.features import default_folder
from unetgn.sampling.figures import frechet_distance, label_agreement, novelty
from unetgn.sampling.folder import NO_MEMORY, SamplingError
from unetgn.sampling.judge import Judge, Part, Real
from unetgn.sampling.judge_options import DEFAULT, make_parser, parse_arguments
from unetgn.sampling.sets import EvaluationError, Pictures, check_shapes, open_samples, read_samples, shape_of
from unetgn.training.checkpoint import Checkpoint, find_checkpoint, run_of
from unetgn.training.config_files import load_config
from unetgn.training.config_yaml import find_config
from unetgn.training.data.config import open_images, split_images
from unetgn.training.errors import CheckpointError, ConfigError, RunDirectoryError, reason
from unetgn.training.files import write_json
from unetgn.training.meeting import LEFT_ALONE, left_alone, start_processes
from unetgn.training.processes import ask_main

__all__ = ["Pictures", "evaluate", "frechet_distance", "label_agreement", "make_parser", "novelty", "read_real",
           "read_samples"]  # fmt: skip


def open_real(config: str) -> Real:
    """Open the real images that a configuration names, training and held-out ones."""
    run = load_config(find_config(config))
    if run.data.name == "latents":
        raise EvaluationError(
            f"{config} trains on latents: give as --config one whose keys data.* name the real images"
        )
    try:
        images = open_images(run.data.of_one_size(), run.model.in_channels)
        usable = images.usable()
    except ValueError as error:
        raise EvaluationError(f"the real images of {config}: {error}") from error
    training, held_out = split_images(images, usable, run.data.held_out)
    if len(training) < 2:
        raise EvaluationError(f"{config} has {len(training)} training image(s); a distribution needs several")

    def read(number: int) -> np.ndarray:
        return (images.image(number) + 1) / 2

    return Real(
        Pictures(read, usable),
        Pictures(read, training),
        Pictures(read, held_out),
        lambda pictures: np.array([images.label(int(number)) for number in pictures.numbers]),
        source=config,
        data=run.data.name,
    )


def open_real_set(path: Path) -> Real:
    """Open real images that are a set as samples are; none of them are held out."""
    pictures, labels = open_samples(path)
    pictures = check_shapes(pictures, shape_of(pictures))
    return Real(
        pictures,
        pictures,
        pictures.part(slice(0)),
        lambda pictures: labels[np.asarray(pictures.numbers, dtype=int)],
        source=str(path),
    )


def read_real(config: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read real images (N, D) in [0, 1], their labels, and the numbers of training and held-out ones, all at once."""
    real = open_real(config)
    place = {int(number): place for place, number in enumerate(real.all.numbers)}
    training, held_out = ([place[int(number)] for number in part.numbers] for part in (real.training, real.held_out))
    return np.stack(list(real.all)), real.labels(real.all), np.array(training), np.array(held_out)


def choose_extractor(asked: str | None, data: str, accelerator: Accelerator) -> Extractor | None:
    """Open the extractor: the one that is asked for, that of the embedded data, or Inception where it is there.

    None where none is asked for nor there, which is said. Raises EvaluationError.
    """
    name = asked or default_name(data)
    try:
        return open_extractor(name, accelerator.device)
    except ExtractorError as error:
        if asked is not None:
            raise EvaluationError(f"--extractor: {error}") from error
        if accelerator.is_main_process:
            say(f"evaluate.py: fid, kid, precision and recall are left out: {error}")
        return None


def make_judge(
    config: str = DEFAULT,
    *,
    real: Path | None = None,
    reference: Part | None = None,
    extractor: str | None = None,
    kept: Path | None = None,
    accelerator: Accelerator | None = None,
) -> Judge:
    """Make what compares samples with the images of a configuration, or with a set `real`. Raises EvaluationError."""
    accelerator = accelerator or start_processes()
    images = open_real(config) if real is None else open_real_set(real)
    chosen = choose_extractor(extractor, images.data, accelerator)
    part: Part = reference or ("held_out" if len(images.held_out) else "all")
    return Judge(images, accelerator, part, chosen, kept or default_folder())


def evaluate(samples: Path, config: str = DEFAULT, **options: Any) -> dict[str, Any]:
    """Compute the figures of samples, with their number; `options` are those of `make_judge`."""
    return make_judge(config, **options).judge(samples)


def run(parsed: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """Go from the parsed arguments to the figures, and the file for them; None on all but the main process."""
    accelerator = start_processes()
    if (out := parsed.out or (None if parsed.samples is None else beside(parsed.samples))) is not None:
        ask_main(accelerator, lambda: check_file(out))  # before it is known what to write
    found = [] if parsed.checkpoint is None else ask_main(accelerator, lambda: find(parsed))
    checkpoints, several = [checkpoint for _, checkpoint in found], parsed.all_checkpoints or parsed.widths is not None
    drawing = Drawing(**{name: value for name in vars(Drawing()) if (value := getattr(parsed, name)) is not None})
    ahead = look_ahead(checkpoints[-1], drawing, accelerator) if checkpoints else None
    judge = make_judge(
        parsed.config or (str(checkpoints[-1].config_file) if checkpoints else DEFAULT),
        real=parsed.real,
        reference=parsed.reference,
        extractor=parsed.extractor,
        kept=parsed.cache,
        accelerator=accelerator,
    )
    if ahead is None:
        figures = judge.judge(parsed.samples)
        return (parsed.out or beside(parsed.samples), figures) if accelerator.is_main_process else None
    judge.check(ahead, parsed.metric)
    metric = parsed.metric or ("fid" if judge.extractor is not None else "frechet_distance")
    ask_main(accelerator, lambda: check_outputs(parsed, checkpoints, drawing, metric))
    rows: list[dict[str, Any]] = []
    for width, checkpoint in found:
        samples = draw(checkpoint, drawing)
        of_width = {} if width is None else {"width": width}
        rows.append({"step": checkpoint.step, **of_width, **judge.judge(samples)})
        if several and accelerator.is_main_process:
            said = "" if width is None else f", width {width:g}"
            print(f"step {checkpoint.step}{said}: {summarize(rows[-1])}", flush=True)
            write_json(beside(samples), rows[-1])
    if not accelerator.is_main_process:
        return None
    if not several:
        return parsed.out or beside(samples), rows[0]
    return draw_several(parsed, rows, drawing, metric)


def draw_several(
    parsed: argparse.Namespace, rows: list[dict[str, Any]], drawing: Drawing, metric: str
) -> tuple[Path, dict[str, Any]]:
    """Draw the curve of a metric; return its file of figures, and these.

    What other checkpoints or widths were found to be worth before stands beside them.
    """
    widths = parsed.widths is not None
    rows, left_out = gather(run_of(find_checkpoint(parsed.checkpoint)), drawing.name(), rows, widths=widths)
    for words in left_out:
        say(f"evaluate.py: {words}")
    out, curve = curve_files(parsed, drawing, metric)
    draw_curve(rows, metric, curve, along="width" if widths else "step")
    return out, {"metric": metric, "checkpoints": rows}


def curve_files(parsed: argparse.Namespace, drawing: Drawing, metric: str) -> tuple[Path, Path]:
    """Name the file of the figures of several checkpoints or widths, and that of their curve."""
    end = "-widths.json" if parsed.widths is not None else ".json"
    out = parsed.out or run_of(find_checkpoint(parsed.checkpoint)) / EVALUATION / f"{drawing.name()}{end}"
    return out, out.with_name(f"{out.stem}-{metric}.png")


def check_outputs(parsed: argparse.Namespace, checkpoints: Sequence[Checkpoint], drawing: Drawing, metric: str) -> None:
    """Raise OSError, with what would do, where the figures of what is to be drawn could not be written."""
    files = [folder_of(checkpoint, drawing) / BESIDE for checkpoint in checkpoints]
    if parsed.all_checkpoints or parsed.widths is not None:
        files += curve_files(parsed, drawing, metric)
    elif parsed.out is not None:
        files = [parsed.out]
    for file in files:
        check_file(file)


def find(parsed: argparse.Namespace) -> list[tuple[float | None, Checkpoint]]:
    """Find the checkpoint that is asked for, or all sound ones of its run, naming the others; or make its averages.

    These come with their width, the others with None.
    """
    if parsed.widths is not None:
        try:
            return [*make_averages(parsed.checkpoint, parsed.widths, every=parsed.all_checkpoints)]
        except ValueError as error:
            raise EvaluationError(f"--widths: {error}") from error
    if not parsed.all_checkpoints:
        return [(None, find_checkpoint(parsed.checkpoint))]
    found, wrong = find_all(parsed.checkpoint)
    for words in wrong:
        say(f"evaluate.py: passing over a checkpoint: {words}")
    return [(None, checkpoint) for checkpoint in found]


def numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Return the figures that are numbers."""
    return {name: figure for name, figure in figures.items() if isinstance(figure, int | float)}


def summarize(figures: dict[str, Any]) -> str:
    """Write the figures in one line, each with that of real images."""
    found = numbers(figures)
    words = [
        f"{name} {figure:.4g}" + (f" (real {found[f'{name}_of_real']:.4g})" if f"{name}_of_real" in found else "")
        for name, figure in found.items()
        if not name.endswith("_of_real") and name not in ("step", "width", "samples", "kid_std")
    ]
    return f"{found['samples']} samples: {', '.join(words)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 the request cannot be met, 130 Ctrl-C."""
    parsed = parse_arguments(arguments, __doc__)
    try:
        if (found := run(parsed)) is None:
            return 0  # the main process says it
        out, figures = found
        for name, figure in numbers(figures).items():
            print(f"{name:>23}  {figure:.4g}", flush=True)
        return write(figures, out)
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("evaluate.py", error)
    except (EvaluationError, SamplingError, CheckpointError, ConfigError, RunDirectoryError, OSError) as error:
        say(f"evaluate.py: error: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if left_alone(error):
            say(f"evaluate.py: {LEFT_ALONE}: {reason(error)}; what was drawn stays")
            return 1
        if not lacks_memory(error):
            raise
        say(f"evaluate.py: error: {NO_MEMORY}; what was drawn stays")
        return 1
    finally:  # C++ may abort a process that leaves its process group to the exit
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def write(figures: dict[str, Any], out: Path) -> int:
    """Write the figures; return the script's exit code."""
    try:
        write_json(out, figures)
    except OSError as error:  # a full disk, a folder that may not be written
        say(f"evaluate.py: {error}; the figures above are whole")
        return 1
    if "checkpoints" not in figures:
        print(summarize(figures))
    print(f"written to {out}")
    return 0
