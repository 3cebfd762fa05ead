"""Makes averaged weights of any width of a run: python training/average.py --run RUN --width 0.08 [--step N]

RUN/averages holds the snapshots that a run with ema.power_widths wrote while it trained. What is written,
RUN/averages/width-0.08, is sampled from as a run is. The width is sigma_rel of Karras et al. 2024 (arXiv
2312.02696).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from unetgn.programs.last_words import last_words, say
from unetgn.programs.paths import check_folder, folder_to_write, user_path
from unetgn.training.checkpoint import CHECKPOINTS, Checkpoint, check_tensors, checkpoint_path, find_checkpoint, verify
from unetgn.training.data.report import DATA
from unetgn.training.errors import CheckpointError
from unetgn.training.files import writing
from unetgn.training.power_averages import AVERAGES, list_snapshots, make_average


def average(run: Path, width: float, *, step: int | None = None, out: Path | None = None) -> Path:
    """Write a checkpoint whose averaged weights have this width; return the folder to sample from.

    Raises CheckpointError where the run lacks what is needed, ValueError for a width that no average has.
    """
    out = out or run / AVERAGES / f"width-{width:g}"
    check_folder(out)
    snapshots = list_snapshots(run / AVERAGES)
    step = snapshots[-1].step if step is None else step
    made = make_average(snapshots, width, step)
    there = checkpoint_path(run / CHECKPOINTS, step)
    source = verify(there) if there.is_dir() else find_checkpoint(run)  # whose configuration it has
    weights = source.tensors("ema")
    averaged = {name: made.get(name, tensor) for name, tensor in weights.items()}
    if unknown := made.keys() - weights.keys():
        raise CheckpointError(f"the snapshots in {run / AVERAGES} are of another network: {sorted(unknown)[0]}")
    check_tensors(averaged, weights, snapshots[-1].file)
    checkpoint = Checkpoint(
        checkpoint_path(out / CHECKPOINTS, step),
        step=step,
        world_size=source.world_size,
        images=source.images,
        ema_step=step,
        scaler=None,
        window_sums=source.window_sums,
        window_steps=source.window_steps,
    )
    checkpoint.write(
        {"ema": averaged},
        config=source.config_file.read_text(encoding="utf-8"),
        unet_config=(source.path / "config.json").read_text(encoding="utf-8"),
        scheduler_config=(source.path / "scheduler_config.json").read_text(encoding="utf-8"),
        base=source.base(),
    )
    if (run / DATA).is_file():  # the names of its classes
        with writing(out / DATA) as unfinished:
            shutil.copyfile(run / DATA, unfinished)
    return out


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="average.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=user_path, required=True, help="a run's folder, with its averages")
    parser.add_argument("--width", type=float, required=True, help="sigma_rel: as long as this share of the training")
    parser.add_argument("--step", type=int, help="the step whose average is made (default: that of the last snapshot)")
    parser.add_argument("--out", type=folder_to_write, help="folder to write (default: RUN/averages/width-WIDTH)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 where the request cannot be met."""
    parsed = make_parser().parse_args(arguments)
    try:
        out = average(parsed.run, parsed.width, step=parsed.step, out=parsed.out)
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("average.py", error)
    except (CheckpointError, ValueError) as error:
        say(f"average.py: error: {error}")
        return 2
    except OSError as error:  # a folder that may not be written, a full disk
        say(f"average.py: {error}")
        return 1
    print(f"written to {out}: sample with --checkpoint {out}")
    return 0
