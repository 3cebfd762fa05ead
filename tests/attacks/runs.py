"""Attacks runs: kills them at any time and at any operation on a file, and puts them into bad surroundings.

Whatever it was, the same line, started again where all is well, ends with the bits of the run that nothing happened to.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attacks.damage import BYTES
from tests.attacks.judge import Draw, Kind, Lost, Verdict, Wrong, ended, same
from tests.training.forked import start
from tests.training.launched import TWO
from tests.training.runs import everything, logged_without_speed, status
from unetgn.training.checkpoint import newest_valid

UNDER = Path(__file__).with_name("train_under.py")
TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8], depth: 1, attention_levels: [],
        num_classes: 10, dropout: 0.1, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
train: {steps: 4, batch_size: 4, learning_rate: 1e-3, warmup_steps: 2, log_every: 1, trackers: []}
checkpoint: {every: 1, keep: 2}
preview: {every: 2, count: 1, steps: 1}
"""
HOWS = ("before", "after", "half")  # when a process is killed, of an operation on a file
PATIENCE = 120.0  # seconds that a run may take, on a busy machine


@dataclass(frozen=True)
class Ended:
    """Says how a run ended: the exit codes of its ranks (None: still there), and what they said."""

    codes: list[int | None]
    stderr: str

    @property
    def killed(self) -> bool:
        """Return True where a signal ended a rank."""
        return any(code is not None and code < 0 for code in self.codes)


def train(
    folder: Path,
    processes: int,
    attack: dict[str, Any] | None = None,
    *,
    disturb: Callable[[list[int]], object] | None = None,
    keys: tuple[str, ...] = (),
) -> Ended:
    """Train in a folder, or go on; `disturb` is called with the ids of the processes when they have begun."""
    config, run = folder / "tiny.yaml", folder / "run"
    config.write_text(TINY)
    line = ["--config", str(config), "--output", str(run), "--resume", "auto", *keys]
    environment = {"ATTACK": json.dumps({"run": str(run), **(attack or {})})}
    launcher = TWO if processes > 1 else None
    with start(*line, script=UNDER, launcher=launcher, processes=processes, environment=environment) as started:
        if disturb is not None:
            disturb([rank.pid for rank in started.ranks])
        end = time.monotonic() + PATIENCE
        while started.running() and time.monotonic() < end:
            if any(rank.exitcode is not None and rank.exitcode < 0 for rank in started.ranks):
                end = min(end, time.monotonic() + 1)  # the launcher would end the others
            time.sleep(0.01)
        codes = [rank.exitcode for rank in started.ranks]
        stderr = Path(started._files[1].name).read_text(errors="replace")
    return Ended(codes, stderr)


@functools.cache
def whole(processes: int, keys: tuple[str, ...] = ()) -> tuple[Path, int]:
    """Return the folder of a run that nothing happened to, and its number of operations on files."""
    folder = Path(tempfile.mkdtemp(prefix="sound-"))
    done = train(folder, processes, {"count": str(folder / "count")}, keys=keys)
    if any(done.codes):
        raise AssertionError(done.stderr)
    return folder / "run", int((folder / "count").read_text())


def check(folder: Path, processes: int, what: str, *, keys: tuple[str, ...] = (), all_there: bool = True) -> None:
    """Start the line again where all is well: it has to end as the run that nothing happened to.

    Without `all_there`, rows of the log and older checkpoints may have been taken away for good.
    """
    sound, run = whole(processes, keys)[0], folder / "run"
    done = train(folder, processes, keys=keys)
    if any(code is None for code in done.codes):
        raise Lost(f"{what}: started again, it is not at its end after {PATIENCE} s: {done.stderr[-1000:]}")
    if any(done.codes):
        raise Lost(f"{what}: started again, it ends with {done.codes}: {done.stderr[-2000:]}")
    step = int(status(run)["step"])
    if status(run)["state"] != "completed" or step != int(status(sound)["step"]):
        raise Lost(f"{what}: started again, it says {status(run)}")
    if not same(everything(sound, step), everything(run, step)):
        raise Lost(f"{what}: started again, it ends with other tensors")
    if all_there and logged_without_speed(sound) != logged_without_speed(run):
        raise Lost(f"{what}: started again, its log is another: {logged_without_speed(run)}")
    names = [sorted(path.name for path in (of / "checkpoints").iterdir()) for of in (sound, run)]
    kept = len(names[0]) == len(names[1]) or (not all_there and len(names[1]) < len(names[0]))
    if not kept or names[0][-1:] != names[1][-1:]:  # a signal saves a step of its own
        raise Lost(f"{what}: started again, it leaves {names[1]} where {names[0]} are right")
    if left := [str(path) for path in run.rglob(".tmp-*")]:
        raise Wrong(f"{what}: started again, it leaves {left}")


def judged(done: Ended, what: str) -> Verdict:
    """Judge how an attacked run itself ended: at its end, by a signal, or with what is wrong in one line."""
    if any(code is None for code in done.codes) and not done.killed:
        return Verdict("hung", f"{what}: not at its end after {PATIENCE} s: {done.stderr[-1000:]}")
    if done.killed:
        if any(code == -signal.SIGSEGV or code == -signal.SIGABRT for code in done.codes):
            raise Wrong(f"{what}: a crash, {done.codes}: {done.stderr[-2000:]}")
        return Verdict("survived", what)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    if said and len(done.codes) > 1 and only_left_alone(done.stderr):
        return Verdict("refused", f"{what}: {said[0]}")  # what the launcher would end is told by gloo that it is alone
    verdict = ended(max((code or 0 for code in done.codes), key=abs), done.stderr)
    return Verdict(verdict.outcome, f"{what}: {verdict.said}")


ALONE = ("closed by peer", "reset by peer", "Broken pipe")  # how gloo says that the other process has gone
WITHOUT_ANY = ("MemoryError", "bad_alloc", "Cannot allocate memory", "allocate memory", "out of memory",
               "can't start new thread", "Too many open files", "Resource temporarily unavailable", "cannot allocate",
               "failed to map", "failed to mmap", "ENOMEM", "could not create a primitive")  # fmt: skip
ABORTED = (-signal.SIGABRT, 127)  # the second where libc has no memory for a thread


def only_left_alone(stderr: str) -> bool:
    """Return True where there are tracebacks, and each ends with what says that the other process has gone."""
    parts = stderr.split("Traceback (most recent call last)")[1:]
    ends = [
        next((line for line in part.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)), "") for part in parts
    ]
    return bool(ends) and all(any(sign in end for sign in ALONE) for end in ends)


def killed_at_an_operation(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Kill at an operation on a file, maybe damage the newest checkpoint, maybe kill what goes on, and go on."""
    operations = whole(processes)[1]
    every = [(at, how) for at in range(operations) for how in HOWS]
    random.Random(draw.given_seed).shuffle(every)  # so that numbers 0, 1, … have each once
    at, how = every[draw.number % len(every)]
    attack = {"at": at, "how": how}
    what = f"killed {attack['how']} operation {attack['at']} of {operations}"
    done = train(folder, processes, attack)
    if not done.killed and any(done.codes):
        raise Wrong(f"{what}: {done.codes} {done.stderr[-2000:]}")
    checkpoints = sorted((folder / "run" / "checkpoints").glob("step-??????"))
    if len(checkpoints) > 1 and draw.random() < 0.3:
        file = draw.choice(sorted(checkpoints[-1].iterdir()))
        file.write_bytes(BYTES[draw.choice(("flip", "cut", "blot"))](file.read_bytes(), draw))
        what += f", {checkpoints[-1].name}/{file.name} damaged"
    if draw.random() < 0.3:
        again = {"at": draw.randrange(60), "how": draw.choice(HOWS)}
        what += f", killed {again['how']} operation {again['at']} of what went on"
        train(folder, processes, again)
    check(folder, processes, what)
    return Verdict("survived", what)


def killed_at_any_time(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Kill all processes at a moment of the training, up to three times, and go on."""
    keys = ("train.steps=20", "checkpoint.every=3", "preview.every=10")
    what = "killed"
    for _ in range(draw.choice((1, 1, 2))):
        moment = draw.uniform(0, 1.5)

        def kill(ids: list[int], moment: float = moment) -> None:
            before, end = status(folder / "run"), time.monotonic() + PATIENCE
            while status(folder / "run") == before and alive(ids[0]) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(moment)
            send(ids, signal.SIGKILL)

        train(folder, processes, disturb=kill, keys=keys)
        what += f" at step {status(folder / 'run')['step']} or after it"
    check(folder, processes, what, keys=keys)
    return Verdict("survived", what)


def workers_killed(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Kill a loader's worker once or more; the run starts them anew, or says so and has saved."""
    keys = ("train.steps=20", "checkpoint.every=8", "preview.every=10", "data.num_workers=2")
    moments = [draw.uniform(0, 1.5) for _ in range(draw.choice((1, 1, 2, 4)))]

    def disturb(ids: list[int]) -> None:
        end = time.monotonic() + PATIENCE
        while not status(folder / "run")["step"] and alive(ids[0]) and time.monotonic() < end:
            time.sleep(0.01)
        for moment in moments:
            time.sleep(moment)
            if workers := children(draw.choice(ids)):
                send([draw.choice(workers)], signal.SIGKILL)

    done = train(folder, processes, disturb=disturb, keys=keys)
    what = ", ".join(f"a worker killed after {moment:.2f} s" for moment in moments)
    said = judged(done, what)
    check(folder, processes, what, keys=keys)
    return said


def children(process: int) -> list[int]:
    """List the processes that a process has started and that are at work."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def alive(process: int) -> bool:
    """Return True while a process runs."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def send(ids: list[int], number: signal.Signals) -> None:
    """Send a signal to those processes that are still there."""
    for process in ids:
        if alive(process):
            os.kill(process, number)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGXCPU)


def signalled(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Send signals at random moments; what TERM and INT end is saved to its last step."""
    numbers = draw.choices(SIGNALS, k=draw.choice((1, 1, 2)))
    moments = [draw.uniform(0, 2) for _ in numbers]
    keys = ("train.steps=20", "checkpoint.every=8", "preview.every=10")

    def disturb(ids: list[int]) -> None:
        end = time.monotonic() + PATIENCE
        while not (folder / "run" / ".lock").exists() and alive(ids[0]) and time.monotonic() < end:
            time.sleep(0.01)  # until it is train.py that is at work, and not what starts it here
        chosen = ids if draw.random() < 0.5 else [draw.choice(ids)]
        for number, moment in zip(numbers, moments, strict=True):
            time.sleep(moment)
            send(chosen, number)

    done = train(folder, processes, disturb=disturb, keys=keys)
    what = ", ".join(f"{number.name} after {moment:.2f} s" for number, moment in zip(numbers, moments, strict=True))
    said = judged(done, what)
    if status(folder / "run")["state"] == "preempted":
        found = newest_valid(folder / "run" / "checkpoints")
        if found is None or found.step != status(folder / "run")["step"]:
            raise Lost(f"{what}: stopped at {status(folder / 'run')}, saved {found and found.step}")
    check(folder, processes, what, keys=keys)
    return said


ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT", "ESTALE", "EMFILE", "ENOMEM", "EPERM", "EINTR")
PATHS = ("metrics.csv", "validation.csv", "status.json", "config.yaml", "data.json", "checkpoints",
         "checkpoints/step-000002", "checkpoints/step-000002/manifest.json",
         "samples", "pipeline", ".lock", "loss.png", ".")  # fmt: skip


def failing(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Have one operation on a file fail, as a full, broken or read-only disk makes it."""
    attack = {"at": draw.randrange(whole(processes)[1]), "how": draw.choice(ERRORS)}
    return under(processes, folder, attack, f"{attack['how']} at operation {attack['at']}")


def vanished(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Have another program delete, empty or replace a file of the run while it is at work."""
    attack = {
        "at": draw.randrange(whole(processes)[1]),
        "how": draw.choice(("vanish", "empty", "folder")),
        "path": draw.choice(PATHS),
    }
    if attack["path"] == ".lock" and attack["how"] == "folder":
        attack["how"] = "vanish"  # in such a folder nothing starts again before somebody has removed it, as it says
    what = f"{attack['path']} {attack['how']} at operation {attack['at']}"
    return under(processes, folder, attack, what, all_there=False)


def limited(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Limit the size of files, their number, or the memory."""
    name, least, most = draw.choice((("FSIZE", 0, 10**6), ("NOFILE", 3, 60), ("AS", 0, 2**26)))
    limit = draw.randrange(least, most)
    return under(processes, folder, {"limits": {name: limit}}, f"{name} of {limit}", scarce=name != "FSIZE")


def surrounded(processes: int, draw: Draw, folder: Path) -> Verdict:
    """Have the clock jump, and set umask, encoding and locale."""
    attack = {
        "clock": draw.randrange(10**6),
        "umask": draw.choice((0, 0o22, 0o77, 0o777)),
        "encoding": draw.choice(("utf-8", "ascii", "latin-1")),
        "locale": draw.choice(("C", "POSIX", "C.UTF-8")),
    }
    verdict = under(processes, folder, attack, str(attack))
    if verdict.outcome == "refused":
        raise Wrong(verdict.said)
    return verdict


def under(
    processes: int, folder: Path, attack: dict[str, Any], what: str, *, all_there: bool = True, scarce: bool = False
) -> Verdict:
    """Train in such surroundings, then where all is well."""
    done = train(folder, processes, attack)
    try:
        verdict = judged(done, what)
    except Wrong as error:
        # The error is a library's that had none left, in words of its own, of which these are known.
        # C and C++ abort where they cannot even say so; any other signal is a crash.
        crashed = any(code not in (None, 0, 1, 2, *ABORTED) for code in done.codes)
        said = any(code in ABORTED for code in done.codes) or any(sign in done.stderr for sign in WITHOUT_ANY)
        if not scarce or crashed or not said:
            raise Wrong(f"{what}: {error}") from None
        verdict = Verdict("refused", f"{what}: no memory, or no file")
    if verdict.outcome != "hung":
        check(folder, processes, what, all_there=all_there)
    return verdict


ATTACKS = {
    "killed at an operation": (killed_at_an_operation, 2.0),
    "killed at any time": (killed_at_any_time, 2.0),
    "signals": (signalled, 1.0),
    "workers are killed": (workers_killed, 0.5),
    "an operation fails": (failing, 1.0),
    "files vanish": (vanished, 1.0),
    "limits": (limited, 1.0),
    "clock, umask, encoding": (surrounded, 0.5),
}
OF_THREE = ("killed at any time", "signals", "an operation fails")
KINDS = [
    Kind(
        f"run of {processes}: {name}", functools.partial(attack, processes), in_child=False, share=2 * share / processes
    )
    for name, (attack, share) in ATTACKS.items()
    for processes in ((1, 2, 3) if name in OF_THREE else (1, 2))
]
