"""train.py in surroundings that the variable ATTACK describes, in JSON; of several ranks on the one that it names.

run         the run's folder; operations on files below it are counted
count       a file that the number of operations is written to at the end
at, how     before or after operation `at`, or when it is half done, the process is killed; or the operation fails
            with the error that `how` names; or `how` is "vanish", "empty" or "folder", done to `path`
limits      of resources, by name
umask, clock, encoding, locale
"""

import builtins
import errno
import io
import json
import locale
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib.figure

from unetgn.training import checkpoint, meeting
from unetgn.training.train import main

ATTACK = json.loads(os.environ["ATTACK"])
COUNTED = ("open", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir", "fsync", "chmod", "scandir")
operations = 0


def is_of_the_run(arguments: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Return True where an operation is on a file of the run."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if more.get("dir_fd") is not None:
        return True
    return any(ATTACK["run"] in name_of(argument) for argument in arguments[:2])


def name_of(argument: Any) -> str:
    """Return the path that an argument of an operation means; "" where it means none."""
    if isinstance(argument, int) and os.path.lexists(f"/proc/self/fd/{argument}"):
        return os.readlink(f"/proc/self/fd/{argument}")
    return str(argument) if isinstance(argument, (str, os.PathLike)) else ""


def attacked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Count the calls of a function, and do at the chosen one what is asked for."""

    def call(*arguments: Any, **more: Any) -> Any:
        global operations
        if not is_of_the_run(arguments, more):
            return function(*arguments, **more)
        operations += 1
        if operations - 1 != ATTACK.get("at"):
            return function(*arguments, **more)
        how = ATTACK["how"]
        if how in ("vanish", "empty", "folder"):
            change(Path(ATTACK["run"]) / ATTACK["path"], how)
            return function(*arguments, **more)
        if how in errno.errorcode.values():
            raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)), str(arguments[0]))
        if how != "before":
            result = function(*arguments, **more)
            if how == "half":
                half(result, arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def half(result: Any, arguments: tuple[Any, ...]) -> None:
    """Leave a file half-written."""
    if hasattr(result, "write") and not result.closed and result.writable():
        os.write(result.fileno(), b"half")
    elif len(arguments) == 2 and isinstance(arguments[0], dict):  # what save_file wrote
        os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)


def change(path: Path, how: str) -> None:
    """Do to a file or folder what another program may do."""
    if how == "empty" and path.is_file():
        path.write_bytes(b"")
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir(parents=True)


def jumping(clock: Callable[[], float], seed: int) -> Callable[[], float]:
    """Return a clock of the day that is set back and forth."""
    draw = random.Random(seed)
    return lambda: max(0.0, clock() + draw.choice((0, 0, 0, -(10**9), 10**9, -3600, 3600, -1, 4e9)))


def take_place() -> None:
    """Make the surroundings."""
    if "umask" in ATTACK:
        os.umask(ATTACK["umask"])
    if "clock" in ATTACK:
        time.time = jumping(time.time, ATTACK["clock"])
    if "encoding" in ATTACK:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=ATTACK["encoding"])  # type: ignore[union-attr]
    if "locale" in ATTACK:
        locale.setlocale(locale.LC_ALL, ATTACK["locale"])
    for name in COUNTED:
        setattr(os, name, attacked(getattr(os, name)))
    io.open = builtins.open = attacked(io.open)  # type: ignore[assignment]
    checkpoint.save_file = attacked(checkpoint.save_file)
    for name, limit in ATTACK.get("limits", {}).items():
        kind = getattr(resource, f"RLIMIT_{name}")
        if name == "AS":
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


meeting.LONGEST_MEETING = meeting.LONGEST_CONNECTION = timedelta(seconds=30)  # less than the patience of the judge
matplotlib.figure.Figure.savefig = lambda figure, path, **_: Path(path).touch()  # a third of the time of such a run
if str(ATTACK.get("rank", 0)) == os.environ.get("RANK", "0"):
    take_place()
code = main()
if "count" in ATTACK and os.environ.get("RANK", "0") == "0":
    Path(ATTACK["count"]).write_text(str(operations))
sys.exit(code)
