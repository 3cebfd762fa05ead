"""Measures what a program waits for before it begins: `python -m benchmarks.startup`.

Seconds from the start of a Python process to its end, each in a fresh process, taking turns, medians:

- imports: nothing, torch, `unetgn.GroupNormSiLU`, `unetgn.UNet`, diffusers' `UNet2DModel`;
- the first training step of a small U-Net, ours and diffusers';
- the first image of 10 DDIM steps, `UNetPipeline` and `DDIMPipeline`.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
from functools import partial
from typing import Any

import torch

from benchmarks.fresh import run
from benchmarks.record import add_out, head, out_path, write
from benchmarks.turns import summary, take_turns, timed

OPTIONS = (
    "sample_size=32, block_out_channels=(32, 64), layers_per_block=1, "
    "down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D')"
)
OURS = "unet = unetgn.UNet(sample_size=32, channels=(32, 64), depth=1, attention_levels=(1,))"
STEP = "unet(torch.randn(4, 3, 32, 32), torch.arange(4)).sample.square().mean().backward()"
PACKAGES = ("diffusers", "peft", "transformers")  # diffusers imports the latter two where they are installed
# What each process runs, and what it is compared with.
PROGRAMS: dict[str, tuple[str, str]] = {
    "Python": ("", "Python"),
    "torch": ("import torch", "torch"),
    "unetgn.GroupNormSiLU": ("import torch, unetgn; unetgn.GroupNormSiLU", "torch"),
    "unetgn.UNet": ("import torch, unetgn; unetgn.UNet", "torch"),
    "diffusers.UNet2DModel": ("import torch; from diffusers import UNet2DModel", "torch"),
    "first step, diffusers": (
        f"import torch; from diffusers import UNet2DModel; unet = UNet2DModel({OPTIONS}); {STEP}",
        "first step, diffusers",
    ),
    "first step, ours": (f"import torch, unetgn; {OURS}; {STEP}", "first step, diffusers"),
    "first image, diffusers": (
        "from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel; "
        f"DDIMPipeline(UNet2DModel({OPTIONS}), DDIMScheduler())(num_inference_steps=10)",
        "first image, diffusers",
    ),
    "first image, ours": (
        "import unetgn; from diffusers import DDIMScheduler; from unetgn.pipelines import UNetPipeline; "
        f"{OURS}; UNetPipeline(unet.eval(), DDIMScheduler())(num_inference_steps=10)",
        "first image, diffusers",
    ),
}


def measure(names: list[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Let all programs start in turns, and return a row each: seconds, and seconds above what it is compared with."""
    calls = {name: timed(partial(run, ["-c", PROGRAMS[name][0]], threads=threads)) for name in names}
    times = take_turns(calls, seconds=0, at_least=rounds)  # the first round reads the files into memory
    rows = []
    for name in names:
        base = PROGRAMS[name][1]
        figures = summary({base: times[base], name: times[name]}, base)
        above = figures[name]["seconds"] - figures[base]["seconds"]
        rows.append({"what": name, "compared_with": base, **figures[name], "seconds_above": round(above, 4)})
    return rows


def main(given: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="and one before, which is not counted")
    parser.add_argument("--quick", action="store_true", help="two imports, once: to see that all of it works")
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "startup")
    names, rounds = (list(PROGRAMS)[:2], 1) if arguments.quick else (list(PROGRAMS), arguments.rounds)
    torch.set_num_threads(arguments.threads)
    rows = measure(names, rounds, arguments.threads)
    for row in rows:
        print(f"{row['what']:24} {row['seconds']:.3f} s, {row['seconds_above']:+.3f} s to {row['compared_with']}")
    write(out, {**head("startup", packages=PACKAGES), "rows": rows})


if __name__ == "__main__":
    main()
