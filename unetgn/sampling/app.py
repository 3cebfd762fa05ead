"""Draw with a trained U-Net, and watch a run train, in the browser: python -m sampling.app --checkpoint RUN

The page is for this machine alone, unless --host says otherwise, and asks nobody else for anything. The newest
checkpoint draws; a run that has none yet can be watched. One drawing is made at a time; others wait for it. Nothing is
written to the run.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from unetgn.pipelines.schedulers import EDM_SCHEDULERS, SCHEDULERS, class_like, set_to_steps
from unetgn.programs.last_words import last_words, say
from unetgn.sampling.folder import SamplingError
from unetgn.sampling.options import add_network_options
from unetgn.sampling.page.artist import Artist
from unetgn.sampling.page.asked import Choices
from unetgn.sampling.page.watching import Watcher
from unetgn.sampling.trained import check_parts
from unetgn.training.checkpoint import CHECKPOINTS, CONFIG, list_checkpoints, places
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config
from unetgn.training.data.report import read_class_names
from unetgn.training.data.text import context_dims
from unetgn.training.errors import CheckpointError, ConfigError
from unetgn.training.objective import make_scheduler

LOOPBACK = "127.0.0.1"
TRIED = 10  # steps that a scheduler which fits can be set to


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_network_options(parser, batch_size=16)
    parser.add_argument(
        "--host", default=LOOPBACK, help=f"address to serve (default: {LOOPBACK}, which this machine alone reaches)"
    )
    parser.add_argument("--port", type=int, help="port to serve (default: the first free one from 7860 on)")
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options of sampling/app.py."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.port is not None and not 1 <= parsed.port < 2**16:
        parser.error(f"argument --port: {parsed.port} is none; ports are 1 to {2**16 - 1}")
    return parsed


def find_run(path: Path) -> tuple[Path, Path]:
    """Find the folder and the configuration of the run that a path means: itself, or where the checkpoint lies.

    Raises CheckpointError where there is no run.
    """
    homes = [place.parent.parent for place in places(path) if place.parent.name == CHECKPOINTS]
    run = homes[0] if homes else path.parent if path.name == CHECKPOINTS else path
    files = [path / CONFIG, run / CONFIG, *(found / CONFIG for found in list_checkpoints(run / CHECKPOINTS)[::-1])]
    for file in files:
        if file.is_file():
            return run, file
    raise CheckpointError(
        f"{path} holds no run (there is no {CONFIG}); give a run's folder or one of its checkpoints/step-… folders"
    )


def fitting(training_scheduler: Any) -> list[str]:
    """Name the schedulers that fit what a network was trained with."""
    names = []
    logging.disable(logging.WARNING)  # diffusers' say what they change in a configuration
    for name in (*SCHEDULERS, *EDM_SCHEDULERS):
        with suppress(ValueError):
            scheduler_class, extra = class_like(name, training_scheduler)
            set_to_steps(scheduler_class.from_config(training_scheduler.config, **extra), TRIED)
            names.append(name)
    logging.disable(logging.NOTSET)
    return names


def choices_of(run: Path, config: RunConfig) -> Choices:
    """Say what there is to choose, as the run's configuration has it: there may be no checkpoint yet."""
    count = config.model.num_classes or 0
    names = read_class_names(run) or []
    return Choices(
        title=run.resolve().name,
        classes=names if len(names) == count else [str(number) for number in range(count)],
        any_class=config.objective.label_dropout > 0 or config.train.initial_weights is not None,
        reads_text=bool(context_dims(config.model)),
        schedulers=fitting(make_scheduler(config.objective)),
    )


def keep_to_this_machine(host: str, folder: Path) -> None:
    """Tell Gradio, before its import, to report to nobody, keep its files in `folder`, and ask no proxy for us."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "shown")
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", LOOPBACK, host)))


def check_address(host: str, port: int | None) -> None:
    """Raise OSError, with what would do, where an address cannot be served."""
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise OSError(f"{where} cannot be served ({error.strerror}): give another --port or --host") from error


def serve(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the page until Ctrl-C, with a folder for its pictures."""
    run, config_file = find_run(arguments.checkpoint)
    config = load_config(config_file)
    check_parts(
        config.data.cache,
        reads_text=bool(context_dims(config.model)),
        autoencoder=arguments.autoencoder,
        text_encoder=arguments.text_encoder,
    )
    check_address(arguments.host, arguments.port)
    from unetgn.sampling.page.layout import lay_out

    artist = Artist(
        arguments.checkpoint,
        weights=arguments.weights,
        autoencoder=arguments.autoencoder,
        text_encoder=arguments.text_encoder,
        batch_size=arguments.batch_size,
    )
    watched = (
        folder / "run"
    )  # beside Gradio's, which copies pictures by what is in them, so that browsers load new ones
    watched.mkdir()
    page = lay_out(choices_of(run, config), artist, Watcher(run, watched, steps=config.train.steps))
    try:
        _, url, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            max_file_size=0,
        )
        print(f"The page: {url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        artist.close()
        page.close(verbose=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 1 it cannot be served, 2 there is no such run, 130 Ctrl-C."""
    try:
        parsed = parse_arguments(arguments)
        with tempfile.TemporaryDirectory(prefix="unetgn-page-") as folder:
            keep_to_this_machine(parsed.host, Path(folder))
            serve(parsed, Path(folder))
    except (SamplingError, CheckpointError, ConfigError) as error:
        say(f"app.py: error: {error}")
        return 2
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        return last_words("app.py", error)
    except OSError as error:  # a port that is taken, an address that is another machine's
        say(f"app.py: {error}")
        return 1
    return 0
