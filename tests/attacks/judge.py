"""Judges attacks: makes each in a child process, within bounds of time and memory, and says how it ended.

An attack is named by its kind, a seed and a number; all that it does is drawn from these three.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import resource
import select
import shlex
import shutil
import signal
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.fresh import forget_peak


class Draw(random.Random):
    """Draws all that an attack is made of, from its name."""

    def __init__(self, kind: str, seed: int, number: int) -> None:
        super().__init__(f"{kind}/{seed}/{number}")
        self.kind, self.given_seed, self.number = kind, seed, number

    def __new__(cls, *_: object) -> Draw:
        return super().__new__(cls)


Outcome = Literal["survived", "refused", "lost", "wrong", "hung"]
BAD: tuple[Outcome, ...] = ("lost", "wrong", "hung")
ONE_LINE = 5000  # characters of an error that still are one line; paths are a part of it


@dataclass(frozen=True)
class Verdict:
    """Says how an attack ended.

    survived: it made no difference. refused: one line said what is wrong, and all was as before. lost: sound data are
    gone, or a run does not go on. wrong: other contents were taken without a word, the process crashed, or the error
    was none of those that are promised. hung: more time or memory than the bounds.
    """

    outcome: Outcome
    said: str = ""


class Wrong(Exception):
    """Ends an attack as "wrong"."""


class Lost(Exception):
    """Ends an attack as "lost"."""


@dataclass(frozen=True)
class Kind:
    """Describes attacks of one kind, which take their folder and what to draw from; None: it made no difference."""

    name: str
    attack: Callable[[Draw, Path], Verdict | None]
    seconds: float = 30.0
    memory: int = 2**30  # bytes beyond what the process had
    in_child: bool = True  # else the attack starts processes of its own, with bounds of its own
    share: float = 1.0  # of the time, beside other kinds


@dataclass
class Count:
    """Counts how the attacks of a kind ended, and keeps those that ended badly."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("survived", "refused", *BAD), 0))
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        """Count all of them."""
        return sum(self.outcomes.values())

    def add(self, kind: str, seed: int, number: int, verdict: Verdict) -> None:
        """Count an attack."""
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome in BAD:
            again = command(kind, seed, number)
            self.faults.append({"again": again, "outcome": verdict.outcome, "said": verdict.said})


def command(kind: str, seed: int, number: int) -> str:
    """Write the line that repeats an attack."""
    return f"python -m tests.attacks --kind {shlex.quote(kind)} --seed {seed} --number {number}"


def judge(kind: Kind, seed: int, numbers: Sequence[int]) -> Iterator[tuple[int, Verdict]]:
    """Make the attacks of these numbers one after the other, and give the verdict of each."""
    left = list(numbers)
    while left:
        if not kind.in_child:
            yield left[0], one(kind, seed, left[0])
            left = left[1:]
            continue
        for number, verdict in in_child(kind, seed, left):
            yield number, verdict
            left = left[1:]


def in_child(kind: Kind, seed: int, numbers: Sequence[int]) -> Iterator[tuple[int, Verdict]]:
    """Make attacks in a forked process; it ends early where one takes more than its bounds, or crashes."""
    forget_peak()  # and give back what is freed but kept: an attack that is given it would not be seen to take memory
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.setsid()
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as answers:
            torch.set_num_threads(1)
            silence()
            bound_memory(kind.memory)
            for number in numbers:
                verdict = one(kind, seed, number)
                answers.write(json.dumps([verdict.outcome, verdict.said]) + "\n")
                answers.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as answers:
        line = b""
        for number in numbers:
            end = time.monotonic() + kind.seconds
            while not line.endswith(b"\n"):
                ready = select.select([answers], [], [], max(0.0, end - time.monotonic()))[0]
                more = answers.read(1) if ready else b""
                if not more:
                    os.killpg(child, signal.SIGKILL)
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    how = f"the process ended with {code}" if ready else f"not at its end after {kind.seconds} s"
                    yield number, Verdict("wrong" if ready else "hung", how)
                    return
                line += more
            yield number, Verdict(*json.loads(line))
            line = b""
    os.waitpid(child, 0)


def silence() -> None:
    """Have what this process prints go nowhere; what is judged is read elsewhere."""
    faulthandler.disable()  # a crash is what is looked for
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def bound_memory(more: int) -> None:
    """Have this process fail where it takes far more memory than the bound; `one` measures the bound itself."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 4 * more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def one(kind: Kind, seed: int, number: int) -> Verdict:
    """Make one attack, here."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    before = peak()
    try:
        verdict = kind.attack(Draw(kind.name, seed, number), folder) or Verdict("survived")
    except (Wrong, Lost) as error:
        verdict = Verdict("wrong" if isinstance(error, Wrong) else "lost", str(error)[:ONE_LINE])
    except MemoryError:
        verdict = Verdict("hung", "no memory")
    except Exception:
        verdict = Verdict("wrong", traceback.format_exc()[-3000:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if kind.in_child and peak() - before > kind.memory:
        return Verdict("hung", f"{(peak() - before) / 2**30:.1f} GiB of memory")
    return verdict


def peak() -> int:
    """Return the bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CONVERTED = "is opened here. Where you trust it, convert it once"  # of a pickle: the lines that do so follow


def refused(error: BaseException) -> Verdict:
    """Judge an error of a type that is promised: it has to be one line, of which a terminal obeys nothing."""
    said = str(error)
    for line in said.split("\n") if CONVERTED in said else [said]:
        check_line(line)
    return Verdict("refused", said)


def check_line(said: str) -> None:
    """Raise Wrong for what is more than a line, or holds what a terminal obeys."""
    if "\n" in said.strip() or len(said) > ONE_LINE:
        raise Wrong(f"more than a line: {said[:2000]!r}")
    if not said.strip().isprintable():
        raise Wrong(f"a line that a terminal obeys: {said!r}")


def ended(code: int, stderr: str) -> Verdict:
    """Judge how a script ended: 0, or an exit code of ours with what is wrong in one line."""
    if "Traceback" in stderr:
        raise Wrong(f"a traceback: {stderr[-3000:]}")
    if code == 0:
        return Verdict("survived")
    said = [line for line in stderr.splitlines() if ".py: " in line]
    for line in stderr.replace("\r", "\n").split("\n"):
        check_line(line)
    if code not in (1, 2) or not said:
        raise Wrong(f"exit code {code}: {stderr[-3000:]}")
    return Verdict("refused", said[-1])


def fingerprint(folder: Path) -> dict[str, str]:
    """Say of each thing below a folder what it is: of files the sha256, of links where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        what = "folder" if stat.S_ISDIR(mode) else "special"
        if stat.S_ISLNK(mode):
            what = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = what
    return found


def same(one: Any, other: Any) -> bool:
    """Compare what was loaded, bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)
