"""Make images with a trained U-Net: python sampling/sample.py --checkpoint RUN --seeds 0-63 --out DIR

Image n depends on seed n alone, up to the rounding that batch size and device bring: not on the other images or the
number of processes. What was stopped goes on where it was when the same line is started again.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.inputs import check_palette
from unetgn.pipelines.planning import Settings
from unetgn.pipelines.schedulers import default_name, set_to_steps
from unetgn.pipelines.strips import draws_noise
from unetgn.programs.last_words import lacks_memory, last_words, say
from unetgn.programs.parent import stop_with_parent
from unetgn.sampling.folder import (
    NO_MEMORY,
    PER_SHARD,
    REQUEST,
    Request,
    SamplingError,
    Subject,
    check_places,
    check_request,
    check_space,
    claim,
    file_of,
    missing,
    shard_name,
    write_summary,
)
from unetgn.sampling.options import (
    as_options,
    choose_subjects,
    make_parser,
    parse_arguments,
    parse_classes,
    parse_numbers,
)
from unetgn.sampling.progress import Progress
from unetgn.sampling.strips import write_interpolation, write_strip
from unetgn.sampling.trained import Trained, load_trained, open_autoencoder, open_pipeline, open_text_encoder
from unetgn.training.checkpoint import find_checkpoint
from unetgn.training.data.autoencoder import digest
from unetgn.training.data.pictures import normalize, open_picture
from unetgn.training.errors import CheckpointError, ConfigError, RunDirectoryError, reason
from unetgn.training.files import write_png
from unetgn.training.meeting import LEFT_ALONE, left_alone, start_processes
from unetgn.training.processes import ask_main
from unetgn.training.run_directory import RunDirectory

__all__ = ["main", "make_parser", "parse_classes", "parse_numbers"]


class Drawing:
    """Draws what a request asks for, any number of its images at a time."""

    def __init__(self, pipeline: UNetPipeline, request: Request, image: Image.Image | None, mask: Image.Image | None):
        self.pipeline, self.request, self.image, self.mask = pipeline, request, image, mask

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of what the network makes."""
        height, width = self.size
        return self.pipeline.facts().channels, height, width

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of what the network makes."""
        size = self.request.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def pixels(self) -> tuple[int, int]:
        """Return (H, W) of the images."""
        return self.size[0] * self.pipeline.vae_scale_factor, self.size[1] * self.pipeline.vae_scale_factor

    @property
    def channels(self) -> int:
        """Return the channels of the images."""
        vae = self.pipeline.vae
        return self.shape[0] if vae is None else int(vae.config.out_channels)

    def check(self, subjects: dict[int, Subject]) -> None:
        """Raise SamplingError where anything does not fit the network, before a folder is made or changed."""
        try:
            set_to_steps(self.pipeline.scheduler, self.request.steps)
        except ValueError as error:
            raise SamplingError(f"--scheduler and --steps: {error}") from error
        seed, subject = next(iter(subjects.items()))
        try:
            self.pipeline.plan([seed], self.settings([subject]))
        except ValueError as error:
            raise SamplingError(as_options(str(error))) from error

    def settings(self, subjects: Sequence[Subject]) -> Settings:
        """Say for the pipeline how images of subjects are drawn."""
        request = self.request
        labels = [subject.label for subject in subjects if subject.label is not None]
        low_high = request.guidance_interval
        return Settings(
            class_labels=labels or None,
            prompt=None if subjects[0].prompt is None else [subject.prompt or "" for subject in subjects],
            negative_prompt=request.negative_prompt,
            guidance_scale=request.guidance_scale,
            guidance_interval=None if low_high is None else (low_high[0], low_high[1]),
            guidance_rescale=request.guidance_rescale or 0.0,
            num_inference_steps=request.steps,
            image=self.image,
            strength=request.strength,
            mask_image=self.mask,
            height=self.pixels[0],
            width=self.pixels[1],
        )

    def __call__(self, seeds: Sequence[int], subjects: Sequence[Subject], **more: Any) -> list[Image.Image]:
        """Draw the images of seeds with their subjects; `more` goes to the pipeline."""
        return self.pipeline(seeds, **vars(self.settings(subjects)) | more).images


def make_images(
    drawing: Drawing, subjects: dict[int, Subject], out: Path, accelerator: Accelerator, *, batch: int
) -> None:
    """Write the images that are missing, each rank its share.

    A batch is made of the same seeds whichever of them are missing, so that what is made after a stop is what would
    have been made before, bit for bit.
    """
    seeds, ranks = list(subjects), accelerator.num_processes
    size = min(batch, -(-len(seeds) // ranks))
    batches = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    left_out = ask_main(accelerator, lambda: missing(out, seeds))
    wanted = [part for part in batches if not left_out.isdisjoint(part)]
    mine = wanted[accelerator.process_index :: ranks]
    with Progress(out, len(left_out), accelerator) as progress:
        for part in mine:
            pictures = drawing(part, [subjects[seed] for seed in part])
            for seed, picture in zip(part, pictures, strict=True):
                if seed in left_out:
                    write_png(file_of(out, seed), picture)
                    progress.add(1)
        accelerator.wait_for_everyone()


def read_picture(file: Path | None, option: str) -> tuple[Image.Image | None, str | None]:
    """Open a picture that an option names, with the sha256 of its file; None for None. Raises SamplingError."""
    if file is None:
        return None, None
    try:
        contents = file.read_bytes()
        picture = open_picture(contents)
        if option == "--mask":
            check_palette(picture, "it")  # before it is made colours of
        return normalize(picture)[0], hashlib.sha256(contents).hexdigest()
    except Exception as error:  # of a damaged picture Pillow raises anything
        raise SamplingError(f"{option} {file} cannot be read as a picture: {error}") from error


def prepare(
    arguments: argparse.Namespace, trained: Trained, subjects: dict[int, Subject], accelerator: Accelerator
) -> Drawing:
    """Make of the arguments what draws the subjects. Raises SamplingError where they do not fit the network."""
    read = [*arguments.prompts, arguments.negative_prompt or ""] if arguments.prompts else None
    trained.check_guidance(arguments.guidance_scale, "--guidance-scale", prompts=read)
    given = arguments.image_size or trained.unet.config.sample_size
    size = list(given) if isinstance(given, (list, tuple)) else given
    if isinstance(size, list) and size[0] == size[-1]:
        size = size[0]
    if size is None:
        raise SamplingError("this network has no model.sample_size: give --image-size")
    autoencoder = open_autoencoder(trained, arguments.autoencoder)
    text_encoder = open_text_encoder(trained, arguments.text_encoder, arguments.prompts, arguments.negative_prompt)
    image, image_digest = read_picture(arguments.image, "--image")
    mask, mask_digest = read_picture(arguments.mask, "--mask")
    interval = arguments.guidance_interval
    scheduler = arguments.scheduler or default_name(trained.scheduler, "ddpm")
    request = Request(
        trained.digest,
        scheduler,
        arguments.steps if arguments.steps is not None else 250 if scheduler == "ddpm" else 50,
        arguments.guidance_scale,
        size,
        autoencoder=None if autoencoder is None else digest(autoencoder.model),
        text_encoder=None if text_encoder is None else digest(text_encoder.model),
        guidance_interval=interval,
        guidance_rescale=arguments.guidance_rescale or None,
        image=image_digest,
        mask=mask_digest,
        strength=arguments.strength,
        precision=None if arguments.precision == "fp32" else arguments.precision,
        negative_prompt=arguments.negative_prompt,
    )
    pipeline = open_pipeline(trained, autoencoder, text_encoder)
    try:
        pipeline.use_scheduler(scheduler)
    except ValueError as error:
        raise SamplingError(f"--scheduler: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    drawing = Drawing(pipeline, request, image, mask)
    drawing.check(subjects)
    if arguments.interpolate is not None and draws_noise(set_to_steps(pipeline.scheduler, request.steps)):
        raise SamplingError(
            f"--interpolate leads from the noise of one seed to that of another, and {scheduler} draws more noise "
            f"between its steps, which would hide it: give --scheduler {default_name(trained.scheduler, 'ddim')}"
        )
    pipeline.to(accelerator.device)  # before the precision, of which diffusers says that a CPU has it not
    trained.unet.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.precision])
    return drawing


def open_drawing(arguments: argparse.Namespace, accelerator: Accelerator) -> tuple[Drawing, dict[int, Subject]]:
    """Make what draws, and what it is to draw, of the parsed arguments. Draws nothing, and changes no folder.

    Raises SamplingError, CheckpointError or ConfigError where they do not fit the checkpoint or each other.
    """
    checkpoint = ask_main(accelerator, lambda: find_checkpoint(arguments.checkpoint))  # verified once, for all
    trained = load_trained(checkpoint, arguments.weights)
    subjects = choose_subjects(
        arguments.seeds,
        arguments.class_labels,
        arguments.prompts,
        trained.unet.config.num_classes,
        names=trained.class_names,
    )
    return prepare(arguments, trained, subjects, accelerator), subjects


def names_of_files(arguments: argparse.Namespace) -> list[str]:
    """Name the files that are written beside the images, in their folder."""
    shards = range(-(-len(arguments.seeds) // PER_SHARD) if arguments.webdataset else 0)
    shown = [name for name, asked in (("denoise", arguments.strip), ("interpolation", arguments.interpolate)) if asked]
    return [
        REQUEST,
        "samples.csv",
        "grid.png",
        *(["samples.npz"] if arguments.npz else []),
        *map(shard_name, shards),
        *(f"{name}.{ending}" for name in shown for ending in ("png", arguments.animation)),
    ]


def check_is_no_runs(out: Path) -> None:
    """Raise SamplingError for the folder of a run, and for those that a run writes: nobody would tell what is whose."""
    there = out.resolve()
    run = next((path for path in (there, *there.parents) if RunDirectory(path).holds_a_run()), None)
    if run is not None and RunDirectory(run).owns(there):
        raise SamplingError(f"{out} is what a run writes; give a folder beside it, such as --out {run / 'drawn'}")


def run(arguments: argparse.Namespace) -> None:
    """Go from the parsed arguments to the folder of images."""
    accelerator, out = start_processes(), arguments.out
    drawing, subjects = open_drawing(arguments, accelerator)
    folder = RunDirectory(out)

    def take() -> None:
        check_is_no_runs(out)
        folder.check_writable()
        check_places(out, subjects, names_of_files(arguments))
        more = {name: getattr(arguments, name) for name in ("npz", "webdataset")}
        check_space(out, subjects, drawing.shape, drawing.pipeline.vae_scale_factor, **more)
        check_request(out, drawing.request, subjects)  # before a lock is there
        folder.lock()  # until the end of the process
        claim(out, drawing.request, subjects)

    ask_main(accelerator, take)
    make_images(drawing, subjects, out, accelerator, batch=arguments.batch_size)
    if accelerator.is_main_process:
        if arguments.strip:
            write_strip(drawing, subjects, out, ending=arguments.animation)
        if arguments.interpolate is not None:
            write_interpolation(
                drawing, subjects, out, arguments.interpolate, batch=arguments.batch_size, ending=arguments.animation
            )
        shown = write_summary(out, subjects, npz=arguments.npz, webdataset=arguments.webdataset)
        print(f"{len(subjects)} images in {out}; {out / 'grid.png'} shows {shown}")


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 the request cannot be met, 130 Ctrl-C."""
    stop_with_parent()
    try:
        run(parse_arguments(arguments, __doc__))
    except (SamplingError, CheckpointError, ConfigError, RunDirectoryError, ValueError) as error:
        say(f"sample.py: error: {error}")
        return 2
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("sample.py", error)
    except OSError as error:  # a folder that may not be written, a full disk
        say(f"sample.py: {error}; the images that were made stay")
        return 1
    except (MemoryError, RuntimeError) as error:
        if left_alone(error):
            say(f"sample.py: {LEFT_ALONE}: {reason(error)}; the images that were made stay")
            return 1
        if not lacks_memory(error):
            raise
        say(f"sample.py: error: {NO_MEMORY}; the images that were made stay")
        return 1
    finally:  # C++ may abort a process that leaves its process group to the exit
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0
