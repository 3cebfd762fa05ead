"""Measures how fast images are drawn: `python -m benchmarks.sample`.

- 50 DDIM steps with `UNetPipeline` against diffusers' `DDIMPipeline`, the same weights and schedule, one image at a
  time and 64: images a second, taking turns.
- 1,000 images from sampling/sample.py, the whole program, against a program that draws as many with `DDIMPipeline`, in
  batches of 64 too, and saves them: seconds from start to end, of digits of 8×8 pixels.

The weights are random: they change no time.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.utils.logging import disable_progress_bar

from benchmarks.fresh import call, run
from benchmarks.record import add_out, head, out_path, write
from benchmarks.turns import summary, take_turns, timed
from unetgn import UNet
from unetgn.interop import to_diffusers
from unetgn.pipelines import UNetPipeline

ROOT = Path(__file__).resolve().parents[1]
BASE = "DDIMPipeline"
STEPS = 50
BATCH = 64
NETWORK: dict[str, Any] = {"sample_size": 32, "channels": (32, 64, 64), "depth": 1, "attention_levels": (2,)}
DIGITS = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [32, 64], depth: 1, attention_levels: [1],
        norm: {num_groups: 8}}
train: {steps: 1, batch_size: 8, warmup_steps: 0, trackers: []}
preview: {every: 0}
"""
PACKAGES = ("diffusers",)


def pipelines(unet: UNet) -> dict[str, Any]:
    """Build both pipelines around one network; ours takes it as it is, diffusers' as to_diffusers makes it."""
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": True}
    found: dict[str, Any] = {
        BASE: DDIMPipeline(to_diffusers(unet), DDIMScheduler(**schedule)),
        "ours": UNetPipeline(unet, DDIMScheduler(**schedule)),
    }
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


def draw(pipeline: Any, batch: int, steps: int) -> Callable[[], object]:
    """Return the call that draws a batch as pictures."""
    if isinstance(pipeline, DDIMPipeline):
        return lambda: pipeline(batch_size=batch, num_inference_steps=steps).images
    return lambda: pipeline(seeds=range(batch), num_inference_steps=steps).images


def compare(unet: UNet, batch: int, steps: int, *, rounds: int) -> dict[str, Any]:
    """Let the two pipelines take turns with one batch size, and return a row."""
    calls = {name: timed(draw(pipeline, batch, steps)) for name, pipeline in pipelines(unet).items()}
    figures = summary(take_turns(calls, seconds=0, at_least=rounds), BASE)
    row: dict[str, Any] = {"what": "pipeline", "batch": batch, "steps": steps, "size": unet.unet_config.sample_size}
    row |= {key: figures["ours"][key] for key in ("ratio", "ratio_quartiles", "rounds")}
    row["images_per_second"] = {name: round(batch / of["seconds"], 3) for name, of in figures.items()}
    return row


def draw_with_diffusers(folder: str, out: str, images: int, steps: int) -> dict[str, Any]:
    """Draw images with DDIMPipeline and save them, in a process of its own."""
    disable_progress_bar()
    pipeline = DDIMPipeline(UNet2DModel.from_pretrained(folder), DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, images, BATCH):
        drawn = pipeline(batch_size=min(BATCH, images - first), num_inference_steps=steps).images
        for number, image in enumerate(drawn, start=first):
            image.save(Path(out) / f"{number:06}.png")
    return {}


def make_run(folder: Path, threads: int) -> None:
    """Train a network of digits for one step; its pipeline holds diffusers' network."""
    (folder / "digits.yaml").write_text(DIGITS)
    script = str(ROOT / "training" / "train.py")
    run([script, "--config", str(folder / "digits.yaml"), "--output", str(folder / "run")], threads=threads)


def compare_programs(folder: Path, images: int, steps: int, *, rounds: int, threads: int) -> dict[str, Any]:
    """Let the two programs draw in turns, and return a row."""
    make_run(folder, threads)
    places = (Path(tempfile.mkdtemp(dir=folder)) for _ in count())  # a folder for each, so that none is gone on with

    def ours() -> None:
        script = str(ROOT / "sampling" / "sample.py")
        options = ["--scheduler", "ddim", "--steps", str(steps), "--batch-size", str(BATCH)]
        out = str(next(places) / "images")
        run([script, "--checkpoint", str(folder / "run"), "--seeds", f"0-{images - 1}", *options, "--out", out],
            threads=threads)  # fmt: skip

    def theirs() -> None:
        arguments = {
            "folder": str(folder / "run" / "pipeline" / "unet"),
            "out": str(next(places)),
            "images": images,
            "steps": steps,
        }
        call("benchmarks.sample", "draw_with_diffusers", arguments, threads=threads)

    calls = {BASE: timed(theirs), "ours": timed(ours)}
    figures = summary(take_turns(calls, seconds=0, at_least=rounds, warm_up=False), BASE)
    row: dict[str, Any] = {"what": "program", "images": images, "batch": BATCH, "steps": steps, "size": 8}
    row |= {key: figures["ours"][key] for key in ("ratio", "ratio_quartiles", "rounds")}
    row["images_per_second"] = {name: round(images / of["seconds"], 3) for name, of in figures.items()}
    return row


def main(given: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="at batch 1 ten times as many")
    parser.add_argument("--images", type=int, default=1000, help="of the script")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a round: to see that all of it works")
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "sample")
    options, steps, rounds, images, batches = NETWORK, STEPS, arguments.rounds, arguments.images, (1, BATCH)
    if arguments.quick:
        options, steps, rounds, images = {"sample_size": 8, "channels": (32,), "depth": 1}, 10, 1, 2
        batches = (1, 2)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    result = {**head("sample", packages=PACKAGES), "rows": []}
    unet = UNet(**options).eval()
    for batch in batches:
        some = rounds * (10 if batch == 1 and not arguments.quick else 1)
        result["rows"].append(compare(unet, batch, steps, rounds=some))
    with tempfile.TemporaryDirectory() as made:
        result["rows"].append(
            compare_programs(Path(made), images, steps, rounds=min(rounds, 3), threads=arguments.threads)
        )
    for row in result["rows"]:
        print(f"{row['what']:9} batch {row['batch']:3}: {row['images_per_second']} images/s, time of ours / theirs "
              f"{row['ratio']} {row['ratio_quartiles']}", flush=True)  # fmt: skip
    write(out, result)


if __name__ == "__main__":
    main()
