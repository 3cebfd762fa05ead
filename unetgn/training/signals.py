"""Lets all ranks stop after the same step: questions that they answer together, each of them asked by every rank.

What fails on one rank alone, between two questions, does not keep it from the next one, where all ranks learn of it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn, cast

import torch
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

from unetgn.training.errors import Diverged, Failed, one_line
from unetgn.training.meeting import connect_over_cpus

# What a scheduler, a terminal or a user ends a run by. SLURM sends what it is told to, often SIGUSR1; a limit on the
# processor's time SIGXCPU; a terminal that goes SIGHUP.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
STOPS = frozenset(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ALWAYS = (signal.SIGTERM, signal.SIGINT)  # the others stay ignored where they were, as nohup has it


class Interrupted(BaseException):
    """Says that a signal came while this process was waiting for something; raised by the signal's handler.

    Like KeyboardInterrupt no Exception, which whatever it comes up in, such as a decoder of images, might catch.
    """


class Messenger(threading.Thread):
    """Passes signals to stop on to the other ranks while it runs, and brings theirs, within a second or two.

    The main thread cannot: it may be waiting for another rank in C++, and Python runs no handler before it is back. But
    Python writes the number of each signal to its wakeup descriptor at once, where this thread reads it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._read, self._write = socket.socketpair()
        self._read.settimeout(1.0)
        self._write.setblocking(False)
        self._stopped = False

    def start(self) -> None:
        """Begin to listen; from the main thread."""
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        super().start()

    def stop(self) -> None:
        """Listen no more; from the main thread."""
        signal.set_wakeup_fd(-1)
        self._stopped = True
        self._write.send(b"\0")
        self.join(timeout=10)

    def run(self) -> None:
        """Listen until the first signal. The ranks meet in the store that their processes met by."""
        store = torch.distributed.PrefixStore("stop", _get_default_store())
        while not self._stopped:
            try:
                numbers = self._read.recv(64)
            except TimeoutError:
                numbers = b""
            if STOPS & {*numbers}:
                return store.set("received", "yes")
            if store.check(["received"]):
                main = cast(int, threading.main_thread().ident)
                return signal.pthread_kill(main, signal.SIGTERM)  # that thread, so that what it waits for ends


@dataclass(frozen=True)
class Faults:
    """Says what a rank found wrong with its steps; 0 where there is nothing."""

    loss: int = 0
    """The step whose loss is not finite on this rank."""
    gradient: int = 0
    """The step whose gradient, which all ranks share, is not finite though this rank's loss is."""
    weights: int = 0
    """The step after which the averaged weights are not finite, though its loss and gradient are."""


class StopSignals:
    """Remembers signals to stop, and lets every rank know as soon as one of them got one.

    While the context lasts, a signal does not end the process: it is asked for between steps. A rank that waits for its
    loader meanwhile is told within a second or two. Rank 0 is the main process. Every question raises Failed, or
    Diverged, on all ranks where one of them has noted an error since the one before.
    """

    def __init__(self, ranks: int) -> None:
        self.received = False
        self.interruptible = False  # then a signal raises Interrupted, once
        self.failure: BaseException | None = None  # what was noted on this rank
        # Over the CPU, so that asking does not wait for the GPU.
        self._group = connect_over_cpus() if ranks > 1 else None
        self._ranks = ranks
        self._previous: dict[int, Any] = {}
        self._child_ended: Any = None  # what torch does when a child ends: it raises, wherever this process is
        self._child_unseen, self._child_awaited = False, False
        self._messenger = Messenger() if ranks > 1 else None

    def __enter__(self) -> StopSignals:
        for number in STOPS:
            if number in ALWAYS or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        if self._messenger is not None:
            self._messenger.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._messenger is not None:
            self._messenger.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._child_ended is not None:
            signal.signal(signal.SIGCHLD, self._child_ended)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.interruptible:
            self.interruptible = False
            raise Interrupted

    def watch_children(self) -> None:
        """Have the death of a loader's worker raised within `raising_deaths`, and nowhere else.

        Torch's handler, which it sets when it starts the first workers, raises in the middle of anything.
        """
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._see_child:
            self._child_ended = handler
            signal.signal(signal.SIGCHLD, self._see_child)

    def _see_child(self, number: int, frame: FrameType | None) -> None:
        self._child_unseen = not self._child_awaited
        if self._child_awaited:
            self._child_ended(number, frame)

    @contextlib.contextmanager
    def raising_deaths(self) -> Iterator[None]:
        """Read from a loader: where one of its workers has died, or dies meanwhile, RuntimeError is raised at once."""
        try:
            self._child_awaited = True
            if self._child_unseen:
                self._see_child(signal.SIGCHLD, None)
            yield
        finally:
            self._child_awaited = False

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Begin to load, maybe in the middle of reading: workers inherit what a signal does here."""
        before, self.interruptible = self.interruptible, False
        try:
            yield
        finally:
            self.watch_children()
            self.interruptible = before

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Do what this rank does alone; what fails is noted, for the next question. A question in it raises as ever."""
        try:
            yield
        except (Interrupted, Failed):
            raise
        except BaseException as error:
            self.note(error)

    def note(self, error: BaseException) -> None:
        """Note an error of this rank. It has to come to the next question as if nothing had been."""
        traceback.clear_frames(error.__traceback__)  # they would keep a loader's workers
        self.failure = self.failure or error

    def unless_stopped(self, work: Callable[[], object]) -> None:
        """Do the work; leave it where a signal came before or comes meanwhile, as `received` then says."""
        try:
            self.interruptible = True
            if not self.received:
                work()
        except Interrupted:
            pass
        finally:
            self.interruptible = False

    def stop_asked(self) -> bool:
        """Return True where any rank received a signal. Every rank has to ask."""
        return any(received for (received,) in self._gather(self.received))

    def faults(self, mine: Faults) -> tuple[bool, list[Faults]]:
        """Return whether any rank received a signal, and the faults of each rank. Every rank has to ask."""
        answers = self._gather(self.received, mine.loss, mine.gradient, mine.weights)
        return any(received for received, *_ in answers), [Faults(*faults) for _, *faults in answers]

    def told_by_main(self, answer: bool) -> bool:
        """Return the main process's answer. Every rank has to ask; what the others answer is left unread."""
        return bool(self._gather(answer)[0][0])

    def tell_from_main(self, *, working: bool) -> bool:
        """Tell the ranks in `wait_for_main` that the main process is still working, or done.

        Returns True where any rank received a signal: then they wait no longer, and have to be told nothing more.
        """
        return any(received for received, _ in self._gather(self.received, working))

    def wait_for_main(self) -> None:
        """Wait while the main process works, which calls `tell_from_main` all the while."""
        stop, working = False, True
        while working and not stop:
            answers = self._gather(self.received, False)
            stop, working = any(received for received, _ in answers), bool(answers[0][1])

    def _gather(self, *numbers: int) -> list[list[int]]:
        """Return the numbers of each rank, by rank. Every rank has to give as many."""
        mine = torch.tensor([self.failure is not None, *numbers])
        everyone = [mine]
        if self._group is not None:
            everyone = [torch.empty_like(mine) for _ in range(self._ranks)]
            torch.distributed.all_gather(everyone, mine, group=self._group)
        answers = torch.stack(everyone).tolist()
        if any(failed for failed, *_ in answers):
            self._raise_failure()
        return [answer for _, *answer in answers]

    def _raise_failure(self) -> NoReturn:
        """Tell the ranks what failed on which. Raises Failed; Diverged where that is what one of them noted."""
        own, self.failure = self.failure, None
        mine = None if own is None else (isinstance(own, Diverged), one_line(own))
        everyone: list[tuple[bool, str] | None] = [mine]
        if self._group is not None:
            everyone = [None] * self._ranks
            torch.distributed.all_gather_object(everyone, mine, group=self._group)
        failed = [(rank, *failure) for rank, failure in enumerate(everyone) if failure is not None]
        said = "; ".join(text if self._ranks == 1 else f"rank {rank}: {text}" for rank, _, text in failed)
        raise (Diverged if any(diverged for _, diverged, _ in failed) else Failed)(said) from own

    def leave_word(self, words: str) -> str:
        """Tell the other ranks what ended this one, outside of all questions; return what the first of them said."""
        if self._group is None:
            return words
        with contextlib.suppress(RuntimeError):  # where the process that keeps the store has ended, too
            store = torch.distributed.PrefixStore("stop", _get_default_store())
            return store.compare_set("words", "", words).decode()
        return words
