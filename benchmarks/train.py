"""Measures training/train.py against a loop as in diffusers' unconditional example: `python -m benchmarks.train`.

The same network, images, optimizer, schedule, batch size and number of loading processes; EMA, progress bar and
TensorBoard included, as each program has them: the peer logs every step, ours a row every ten (`train.log_every`'s
default). In one process, and in two of one thread each. Whole programs are started in turns; a figure is images a
second, the median over the windows of ten steps of a run, without the first, and over runs. The peer is
`benchmarks/train_peer.py`. `--compiled` compares ours with `train.compile=true`: compiling falls into the first window,
which is left out. The images are cut out of the two photographs that scikit-learn has.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import csv
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.fresh import run
from benchmarks.record import add_out, head, out_path, write
from benchmarks.train_peer import Settings
from benchmarks.turns import summary, take_turns
from unetgn import UNet
from unetgn.interop import to_diffusers
from unetgn.training.config_files import load_config

ROOT = Path(__file__).resolve().parents[1]
BASE = "diffusers' example"
WINDOW = 10  # steps
PACKAGES = ("diffusers", "accelerate")


@dataclasses.dataclass(frozen=True)
class Work:
    """Holds what both train: sizes, and for how long."""

    steps: int = 50
    batch_size: int = 8
    channels: tuple[int, ...] = (64, 128, 128)
    size: int = 32
    pictures: int = 1024
    num_workers: int = 1


QUICK = Work(steps=2 * WINDOW, batch_size=2, channels=(32, 32), size=8, pictures=64, num_workers=0)


def cut_pictures(folder: Path, count: int, side: int) -> None:
    """Write squares out of scikit-learn's two photographs (427×640), half as large again as what is trained on."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    photographs, cut = load_sample_images().images, side * 3 // 2
    folder.mkdir()
    for number in range(count):
        pixels = photographs[number % len(photographs)]
        top, left = (int(generator.integers(0, length - cut)) for length in pixels.shape[:2])
        Image.fromarray(pixels[top : top + cut, left : left + cut]).save(folder / f"{number:05}.png")


def prepare(folder: Path, work: Work, *, compiled: bool = False) -> None:
    """Write what the programs read: images, our configuration, diffusers' of the same network, the peer's settings."""
    cut_pictures(folder / "images", work.pictures, work.size)
    attention = len(work.channels) - 1
    text = f"""
model: {{sample_size: {work.size}, channels: {list(work.channels)}, depth: 1, attention_levels: [{attention}]}}
data: {{name: folder, path: {json.dumps(str(folder / "images"))}, image_size: {work.size}, random_flip: true,
        num_workers: {work.num_workers}}}
objective: {{prediction_type: epsilon, schedule: linear}}
train: {{steps: {work.steps}, batch_size: {work.batch_size}, learning_rate: 1e-4, learning_rate_schedule: cosine,
         warmup_steps: 10, betas: [0.95, 0.999], weight_decay: 1e-6, max_gradient_norm: 1.0, log_every: {WINDOW},
         trackers: [tensorboard], compile: {json.dumps(compiled)}}}
ema: {{decay: 0.9999}}
checkpoint: {{every: {work.steps}}}
preview: {{every: 0}}
"""
    (folder / "ours.yaml").write_text(text)
    config = load_config(folder / "ours.yaml", [])
    to_diffusers(UNet.from_unet_config(config.model)).save_config(folder / "model")
    settings = Settings(
        model=str(folder / "model"),
        images=str(folder / "images"),
        size=work.size,
        steps=work.steps,
        batch_size=work.batch_size,
        num_workers=work.num_workers,
        learning_rate=config.train.learning_rate,
        warmup_steps=config.train.warmup_steps,
        betas=config.train.betas,
        weight_decay=config.train.weight_decay,
        ema_decay=config.ema.decay,
        window=WINDOW,
        logs=str(folder / "logs"),
        out=str(folder / "rates.json"),
    )
    (folder / "peer.json").write_text(json.dumps(dataclasses.asdict(settings)))


def start(arguments: list[str], processes: int, threads: int) -> None:
    """Run a Python program in so many processes to its end. Raises Failed where it fails."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    run([*(launcher if processes > 1 else []), *arguments], threads=threads)


def ours(folder: Path, processes: int, threads: int) -> list[float]:
    """Run training/train.py, and return the images a second of its windows."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    script = str(ROOT / "training" / "train.py")
    start([script, "--config", str(folder / "ours.yaml"), "--output", str(output)], processes, threads)
    with (output / "metrics.csv").open() as file:
        return [float(row["images_per_second"]) for row in csv.DictReader(file)]


def theirs(folder: Path, processes: int, threads: int) -> list[float]:
    """Run the peer, and return the images a second of its windows."""
    start(["-m", "benchmarks.train_peer", str(folder / "peer.json")], processes, threads)
    rates: list[float] = json.loads((folder / "rates.json").read_text())
    return rates


def measure(folder: Path, processes: int, threads: int, blocks: int) -> dict[str, Any]:
    """Let the two programs take turns, and return a row; seconds are those of one image."""
    seen: dict[str, list[list[float]]] = {BASE: [], "ours": []}

    def block_of(name: str, program: Callable[[Path, int, int], list[float]]) -> Callable[[], float]:
        def block() -> float:
            rates = program(folder, processes, threads)[1:]  # the loader's start falls into the first
            seen[name].append([round(rate, 3) for rate in rates])
            return 1 / statistics.median(rates)

        return block

    programs = {BASE: block_of(BASE, theirs), "ours": block_of("ours", ours)}
    figures = summary(take_turns(programs, seconds=0, at_least=blocks, warm_up=False), BASE)
    row: dict[str, Any] = {"processes": processes, "threads_each": threads, "windows": seen}
    row |= {"ratio": figures["ours"]["ratio"], "ratio_quartiles": figures["ours"]["ratio_quartiles"]}
    row["images_per_second"] = {name: round(1 / of["seconds"], 3) for name, of in figures.items()}
    return row


def main(given: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--blocks", type=int, default=3, help="runs of each program")
    parser.add_argument("--compiled", action="store_true", help="ours with train.compile=true, which needs g++")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a run: to see that all of it works")
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "train_compiled" if arguments.compiled else "train")
    work, blocks = (QUICK, 1) if arguments.quick else (Work(), arguments.blocks)
    torch.set_num_threads(arguments.threads)
    result = {**head("train", packages=PACKAGES), **dataclasses.asdict(work), "rows": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder, work, compiled=arguments.compiled)
        for processes in arguments.processes:
            row = measure(folder, processes, max(1, arguments.threads // processes), blocks)
            result["rows"].append(row)
            print(f"{processes} processes: {row['images_per_second']} images/s, time of ours / theirs {row['ratio']} "
                  f"{row['ratio_quartiles']}", flush=True)  # fmt: skip
    write(out, result)


if __name__ == "__main__":
    main()
