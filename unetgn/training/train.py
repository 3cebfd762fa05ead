"""Train a diffusion U-Net: python training/train.py --config digits8_ddpm [key=value …]

Several processes, on one machine or many: accelerate launch training/train.py …. `key=value` changes one key of the
configuration: train.steps=100.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator

from unetgn.programs.last_words import flush_output, keep_output, last_words, say
from unetgn.programs.parent import stop_with_parent
from unetgn.programs.paths import user_path
from unetgn.training import push
from unetgn.training.card import finish_card
from unetgn.training.checkpoint import CONFIG, Checkpoint, list_checkpoints, put_aside
from unetgn.training.config import RunConfig, conditional_only
from unetgn.training.config_files import find_in_data, list_keys, load_config, to_yaml, value_of
from unetgn.training.config_yaml import find_config, name_of
from unetgn.training.data.report import Report
from unetgn.training.data.samples import IndexedSamples, Samples
from unetgn.training.data.text import context_dims
from unetgn.training.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Diverged,
    Failed,
    Preempted,
    RunDirectoryError,
    one_line,
    reason,
)
from unetgn.training.evaluation import Evaluator
from unetgn.training.files import delete_unfinished, write_text
from unetgn.training.loop import Loop
from unetgn.training.lora import FOLDER as ADAPTER_FOLDER
from unetgn.training.lora import merged
from unetgn.training.meeting import LEFT_ALONE, left_alone
from unetgn.training.network import load_initial_weights, make_network, outline
from unetgn.training.objective import Objective
from unetgn.training.on_cpu import for_this_device
from unetgn.training.pipeline import save_adapter, save_pipeline
from unetgn.training.power_averages import AVERAGES, put_snapshots_aside
from unetgn.training.prepare import prepare_samples, preview_conditions, report
from unetgn.training.preview import SAMPLES, STRIPS, Conditions, import_pyplot
from unetgn.training.processes import ask_main, describe, make_accelerator
from unetgn.training.resume import check_judged_alike, check_same_run, dry_run_words, find_start, flat
from unetgn.training.run_directory import RunDirectory
from unetgn.training.signals import StopSignals
from unetgn.training.soundness import check_sound
from unetgn.training.step import TrainState

logger = logging.getLogger("unetgn.training")

OWN = "my_images"  # the configuration of `train.py PICTURES`


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    keys = f"keys of the configuration, as in train.steps=100:\n\n{list_keys()}"
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, epilog=keys, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        help=f"a YAML file, or the name of one in configs/ (default, where PICTURES is given: {OWN}); of one that "
        "names another for a CPU, on_cpu=null takes it itself",
    )
    parser.add_argument(
        "--output", type=user_path, help="folder of the run (default: runs/NAME of the configuration, or of PICTURES)"
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="none (default): begin; auto: go on from the newest checkpoint of the output folder, begin where there is "
        "none; PATH: go on from this checkpoint, or from the newest of this run",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, write nothing"
    )
    parser.add_argument("--overfit", type=int, metavar="N", help="train on the first N images only, to find faults")
    parser.add_argument(
        "--push-to-hub", metavar="NAME/REPO", help="send the finished pipeline to this repository on Hugging Face's hub"
    )
    push.add_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    parser.add_argument(
        "keys",
        nargs="*",
        metavar="PICTURES|key=value",
        help="the folder of your images (data.path=PICTURES), and changes of the configuration, each of one key",
    )
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options of this script; what is left over is `key=value`."""
    parser = make_parser()
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    parsed.keys = sorted(unknown + parsed.keys, key=given.index)  # as they were given: of a key, the last one counts
    if "" in (parsed.resume, *parsed.keys):
        parser.error("an empty text is neither a folder nor key=value, nor what --resume takes")
    folders = [key for key in parsed.keys if "=" not in key and user_path(key).exists()]
    if len(folders) > 1:
        parser.error(f"{' '.join(folders[:3])}{' …' * (len(folders) > 3)}: one folder, or one zip archive, holds the "
                     "pictures")  # fmt: skip
    if parsed.config is None and not folders:
        name = next((key for key in parsed.keys if "=" not in key), None)
        parser.error("give --config NAME, or a folder of your own images: train.py PICTURES" if name is None else
                     f"{name}: there is no such folder of pictures, nor a --config NAME")  # fmt: skip
    parsed.config = OWN if parsed.config is None else parsed.config
    parsed.keys = [f"data.path={key}" if key in folders else key for key in parsed.keys]
    if parsed.overfit is not None and parsed.overfit < 1:
        parser.error(f"argument --overfit: {parsed.overfit} images is none; at least 1 is needed")
    if parsed.private and parsed.push_to_hub is None:
        parser.error("--private is for --push-to-hub NAME/REPO, which was not given")
    return parsed


def run(arguments: argparse.Namespace) -> None:
    """Go from the parsed arguments to the finished run."""
    named = find_config(arguments.config)
    output = RunDirectory(arguments.output or Path("runs") / name_of_run(named, arguments.keys))
    begun = goes_on_from(output, arguments.resume)
    path, keys, chosen = for_this_device(named, arguments.keys, begun)
    first = os.environ.get("RANK", "0") == "0"
    if chosen and first and not arguments.print_config:
        print(chosen, flush=True)  # before what may not fit it
    found = find_in_data(path, keys, begun)
    config = load_config(path, keys + found)
    if arguments.print_config:
        if first:
            print(to_yaml(config), end="")
        return
    if found and first:
        print(f"left to the data: {' '.join(found)}", flush=True)
    try:
        loop = prepare(config, output, arguments)
    except BaseException:
        output.unlock()  # a start that is refused leaves nothing behind
        raise
    if loop is not None:
        train(loop, licence=arguments.license)
        if arguments.push_to_hub is not None and loop.accelerator.is_main_process:
            push.push_after(loop.run.path, arguments.push_to_hub, private=arguments.private, licence=arguments.license)


def name_of_run(config: Path, keys: list[str]) -> str:
    """Name a run after its configuration, but one of own pictures after these."""
    name, pictures = name_of(config), value_of("data.path", keys)
    if name == OWN and pictures and user_path(pictures).exists():
        return user_path(pictures).resolve().name or name
    return name


def goes_on_from(output: RunDirectory, resume: str) -> Path | None:
    """Return the configuration of the run that is to go on; None where one begins."""
    if resume == "auto":
        return output.path / CONFIG if list_checkpoints(output.checkpoints) else None
    return None if resume == "none" else user_path(resume) / CONFIG


def prepare(config: RunConfig, output: RunDirectory, arguments: argparse.Namespace) -> Loop | None:
    """Make everything ready for the first step; for a dry run, only say what would be done."""
    accelerator = make_accelerator(config, output.path)
    signals = StopSignals(accelerator.num_processes)  # now, when all are there
    ask_main(accelerator, output.check_writable)  # before images are read, which may take long
    import_pyplot()  # what is missing is said now, not at the first preview
    if arguments.push_to_hub is not None:
        ask_main(accelerator, lambda: push.check_target(arguments.push_to_hub))
    samples, held_out = prepare_samples(config, accelerator, arguments.overfit)
    conditions = preview_conditions(config, samples)
    what = describe(config, accelerator, outline(config), samples)
    taken = report(config, samples, held_out) if accelerator.is_main_process else None
    evaluator = make_evaluator(config, held_out, conditions, accelerator)
    start = ask_main(accelerator, lambda: take_output(config, output, samples, accelerator.num_processes, arguments))
    initial = load_initial_weights(config) if start is None or config.lora is not None else None
    if accelerator.is_main_process:
        after = f", going on after step {start.step}" if start is not None and start.step else ""
        dry = dry_run_words(config, output, start) if arguments.dry_run else ""
        curves = f"\nits curves: {shlex.join(['tensorboard', '--logdir', str(output.path)])}"
        watch = curves if "tensorboard" in config.train.trackers and not arguments.dry_run else ""
        drawn = "" if arguments.dry_run else config.preview.plan(config.train.steps)
        seen = f"\nits samples, {drawn}: {output.path / SAMPLES}" if drawn else ""
        print(f"{what}\n{taken}\nwriting to {output.path}{after}{dry}{watch}{seen}", flush=True)
    if arguments.dry_run:
        return None
    objective = Objective(config.objective, config.model.num_classes, conditions.empty_text)
    network = make_network(config, initial, start)
    state = TrainState(network, objective, config.train, config.ema, accelerator, config.seed, config.optimizer)
    loop = Loop(config, state, samples, held_out, conditions, output, signals, evaluator)
    if start is not None:
        loop.restore(start)
    ask_main(accelerator, lambda: write_beginning(loop, taken))
    return loop


def make_evaluator(
    config: RunConfig, held_out: IndexedSamples | None, conditions: Conditions, accelerator: Accelerator
) -> Evaluator | None:
    """Make what judges the run as it goes, on the main process alone; None where the run is not judged."""
    if not config.evaluate.every or held_out is None:
        return None
    images, data, device, made = held_out, config.data.name, accelerator.device, list[Evaluator]()

    def make() -> None:
        made.append(Evaluator(config.evaluate, config.preview, images, conditions, data=data, device=device))

    ask_main(accelerator, make)
    return made[0] if made else None


def write_beginning(loop: Loop, taken: Report | None) -> None:
    """Write what a run begins with, and put aside what is in its way; on the main process."""
    run, step = loop.run, loop.state.step
    put_aside(run.checkpoints, step, lambda checkpoint: check_sound(checkpoint, loop.samples))
    for folder in (run.checkpoints, *(run.path / name for name in (AVERAGES, SAMPLES, STRIPS))):
        delete_unfinished(folder)
    if taken is not None:
        taken.write(run.path)
    write_text(run.path / CONFIG, to_yaml(loop.config))
    run.resume_logs(step)
    put_snapshots_aside(run.path / AVERAGES, step)
    loop.mark_best()


def take_output(
    config: RunConfig, output: RunDirectory, samples: Samples, processes: int, arguments: argparse.Namespace
) -> Checkpoint | None:
    """Lock the run's folder, and find the checkpoint to go on from (None: begin); on the main process, for all.

    A dry run locks and changes nothing.
    """
    if arguments.dry_run:
        output.check_writable()
    else:
        output.lock()  # before looking: another run may be about to save, or to delete
    found = find_start(
        output, os.path.expanduser(arguments.resume), lambda checkpoint: check_sound(checkpoint, samples)
    )
    if found is not None:
        check_same_run(config, samples, found, processes)
        check_judged_alike(config, output)
    elif isinstance(samples, IndexedSamples) and (absent := samples.images.absent):
        raise ConfigError(f"data.without names {', '.join(absent)}, which is not in data.path: remove it")
    return found


def train(loop: Loop, *, licence: str | None = None) -> None:
    """Train to the last step and write the pipeline; status.json says how far it came, and how it ended."""
    loop.write_status("running")
    try:
        with loop.signals:
            try:
                with loop.rescuing():
                    with loop.signals.noting():
                        start_trackers(loop)
                    loop.train()
                    write_pipeline(loop, licence)
            finally:
                end_training(loop)
            loop.write_status("completed")  # while a signal still asks, and does not end this
    except Preempted:
        loop.write_status("preempted")
        raise
    except Diverged as error:
        loop.write_status("diverged", error=str(error))
        raise
    except BaseException as error:
        loop.write_status("failed", error=one_line(error))
        raise
    finally:
        loop.mishaps.sum_up()


def start_trackers(loop: Loop) -> None:
    """Tell the trackers of the run and its configuration."""
    flattened = flat(loop.config).items()
    keys = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flattened}
    step, names = loop.state.step, loop.config.train.trackers
    options: dict[str, dict[str, object]] = {}
    if step:  # TensorBoard leaves out what an earlier part of the run logged from this step on
        options["tensorboard"] = {"purge_step": step + 1}
    if "wandb" in names and loop.accelerator.is_main_process:  # it goes on, and takes no row of a step that it has
        options["wandb"] = {"id": loop.run.tracker_id(new=not step), "resume": "allow"}
    others = [name for name in names if name not in ("tensorboard", "wandb")]
    if step and others and loop.accelerator.is_main_process:
        logger.warning("%s begins a new run at step %d; the earlier one keeps what it logged beyond that: cut it off "
                       "there", ", ".join(others), step + 1)  # fmt: skip
    loop.accelerator.init_trackers(loop.run.path.name, config=keys, init_kwargs=options)


def end_training(loop: Loop) -> None:
    """Have the trackers finish, and leave the process group."""
    for tracker in loop.accelerator.trackers:
        with loop.mishaps.beside(f"the tracker {tracker.name}"):
            tracker.finish()
    loop.accelerator.state.destroy_process_group()


def write_pipeline(loop: Loop, licence: str | None) -> None:
    """Write the network with its averaged weights for diffusers. Raises Preempted where a signal comes meanwhile."""
    scheduler, folder, cache = loop.state.objective.scheduler, loop.run.path / "pipeline", loop.config.data.cache
    with loop.state.averaged() as unet:  # every rank: a sharded network is gathered by all
        if not loop.accelerator.is_main_process:
            return
        adapter = loop.run.path / ADAPTER_FOLDER
        if loop.config.lora is None:
            loop.signals.unless_stopped(lambda: save_pipeline(unet, scheduler, folder, cache=cache))
        else:
            loop.signals.unless_stopped(lambda: save_adapter(unet, adapter, loop.config.train.initial_weights))
            loop.signals.unless_stopped(lambda: save_pipeline(merged(unet), scheduler, folder, cache=cache))
        if loop.signals.received:
            raise Preempted(f"stopped by a signal after the last step, while {folder} was written")
        if conditional_only(loop.config) and context_dims(loop.config.model):
            logger.warning("%s was trained with captions only: call it with guidance_scale=1, since the default of "
                           "StableDiffusionPipeline draws with the empty caption", folder)  # fmt: skip
        for made in (folder, adapter):
            with loop.mishaps.beside(f"the card of the {made.name}"):
                if made.is_dir():
                    finish_card(made, run=loop.run.path, licence=licence)
        loop.draw_loss()
        with loop.mishaps.beside("the last line"):
            places = (loop.run.path / "samples", loop.run.checkpoints, folder, adapter)
            print(f"done: {', '.join(str(path) for path in places if path.is_dir())}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 failed, 2 not started, because the request cannot be met."""
    keep_output()
    stop_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        run(parse_arguments(arguments))
    except (ConfigError, RunDirectoryError, CheckpointError, push.PushError) as error:
        say_for_all(f"train.py: error: {error}")
        return 2
    except Failed as error:
        say_failure(error)
        return 1
    except Diverged as error:
        say_for_all(f"train.py: {error}; the last checkpoint is as it was")
        return 1
    except Preempted as error:
        say_for_all(f"train.py: {error}; go on with --resume auto")
        return 1
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("train.py", error)
    except (OSError, DataError) as error:  # before the first step: a full disk, a folder that may not be written
        say(f"train.py: {error}; what was saved before is as it was")
        return 1
    except RuntimeError as error:
        if not left_alone(error):
            raise
        say(f"train.py: {LEFT_ALONE}: {reason(error)}; what was saved before is as it was")
        return 1
    finally:  # C++ may abort a process that leaves its process group to the exit
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        flush_output()
    return 0


def say_for_all(words: str) -> None:
    """Say what every process would say, once on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(words)


def say_failure(error: Failed) -> None:
    """Say what ended the run and what was saved; before it, where that is a surprise, from where it came."""
    cause = error.__cause__
    told = cause is None or isinstance(cause, (Failed, DataError, OSError, MemoryError, KeyboardInterrupt))
    if cause is not None and not told and not left_alone(cause):
        say("".join(traceback.format_exception(cause, chain=False)).rstrip())
    if not isinstance(cause, Failed) or os.environ.get("LOCAL_RANK", "0") == "0":  # else another rank says the same
        say(f"train.py: {error}")
