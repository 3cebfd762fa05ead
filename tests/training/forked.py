"""Starts scripts in processes that are forked from one in which everything is imported already.

Such a process is a real one: it has an id, can be killed, and shares nothing with others but files and sockets. It is
there in a tenth of a second, where `python training/train.py` spends six on imports. It lacks two properties of a fresh
process, the imports themselves and a hash seed of its own: tests of those start the launcher here, which starts others.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import accelerate.commands.launch
import docstring_parser  # noqa: F401 (this and sklearn.datasets are imported in the course of every run)
import matplotlib.figure
import numpy as np
import sklearn.datasets  # noqa: F401
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

import unetgn.sampling.sample
import unetgn.training.train  # noqa: F401
from tests.training.launched import ROOT, TRAIN
from unetgn.programs import parent
from unetgn.training import config_files
from unetgn.training.preview import import_pyplot

LAUNCHER = Path(accelerate.commands.launch.__file__)  # what `accelerate launch` runs; what it starts is not forked
IMPORTED_BY = os.getpid()  # of the server, which all processes here are forked from
config_files.make_parser()  # what takes half a second of every run
import_pyplot()
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Finished:
    """Holds how a run ended: the exit codes of its ranks (negative: the signal), and what all of them said."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        """The exit code of a run of one process."""
        (code,) = self.codes
        return code


class Started:
    """Holds the processes of one run, which do not outlive the context."""

    def __init__(self, ranks: list[Any], files: list[Any], store: torch.distributed.TCPStore | None) -> None:
        self.ranks, self._files, self._store = ranks, files, store

    def __enter__(self) -> Started:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()
        for file in self._files:
            file.close()

    @property
    def pid(self) -> int:
        """The id of rank 0."""
        return self.ranks[0].pid

    def running(self) -> bool:
        """Return True where a rank has not ended."""
        return any(rank.is_alive() for rank in self.ranks)

    def wait(self, timeout: float = 300) -> Finished:
        """Return how the run ended. Raises AssertionError where a rank is still there after `timeout` seconds."""
        end = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0, end - time.monotonic()))
        said = [Path(file.name).read_text(errors="replace") for file in self._files]
        assert not self.running(), f"not at its end after {timeout} s: {said[1][-3000:]}"
        return Finished([rank.exitcode for rank in self.ranks], *said)


def start(
    *arguments: str,
    script: Path = TRAIN,
    launcher: Path | Sequence[str] | None = None,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    new_session: bool = False,
) -> Started:
    """Start a script as `python` does or, with a launcher's configuration or options, as `accelerate launch` does."""
    files = [tempfile.NamedTemporaryFile() for _ in ("stdout", "stderr")]  # noqa: SIM115 (closed by Started)
    everyone, store = dict(os.environ), None
    if launcher is not None:
        # The store that the ranks meet in is the launcher's, at a port that nobody else has.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        configuration = ["--config_file", str(launcher), "--num_processes", str(processes)]
        everyone = launcher_environment(configuration if isinstance(launcher, Path) else launcher)
        everyone["MASTER_PORT"] = str(store.port)
    ranks = []
    for number in range(processes):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)} if "WORLD_SIZE" in everyone else {}
        names = [file.name for file in files]
        given = (str(script), list(arguments), everyone | own | dict(environment or {}), str(cwd), names, new_session)
        ranks.append(SERVER.Process(target=run, args=given))
        ranks[-1].start()
    return Started(ranks, files, store)


def finish(*arguments: str, **more: Any) -> Finished:
    """Start a script and wait for its end."""
    with start(*arguments, **more) as started:
        return started.wait()


def succeed(*arguments: str, **more: Any) -> Finished:
    """Start a script and wait for its end, which has to be a good one."""
    done = finish(*arguments, **more)
    assert not any(done.codes), f"{done.codes}: {done.stderr[-3000:]}"
    return done


def launcher_environment(options: Sequence[str]) -> dict[str, str]:
    """Return the variables that Accelerate's launcher, by its own code, and torchrun set for every rank.

    Options of one process start no torchrun, and know of no ranks.
    """
    checked, _, _ = _validate_launch_command(launch_command_parser().parse_args([*options, str(TRAIN)]))
    if not (checked.multi_gpu or checked.use_fsdp):
        return prepare_simple_launcher_cmd_env(checked)[1]
    size = str(checked.num_processes)
    return prepare_multi_gpu_env(checked) | {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def run(script: str, arguments: list[str], environment: dict[str, str], cwd: str, said: list[str], new: bool) -> None:
    """Become the process that runs `script`; in a child of the server."""
    if os.getppid() != IMPORTED_BY:
        raise RuntimeError("the fork server has not imported this module: every process would, for six seconds")
    for name, descriptor in zip(said, (1, 2), strict=True):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    if new:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the system's own for the loader's workers, not the server's
    parent.PARENT = os.getppid()
    torch.set_num_threads(1)
    np.random.seed()  # as a fresh process has it; Python's own generator does so by itself
    # Loss curves stay empty: they take half the time of a small run, and a run in a test's own process draws them.
    matplotlib.figure.Figure.savefig = lambda figure, path, **_: Path(path).touch()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
