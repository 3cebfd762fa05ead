"""Lets all ranks stop after the same step: questions that they answer together, each of them asked by every rank."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, cast

import torch
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store


class Interrupted(BaseException):
    """Says that a signal came while this process was waiting for something; raised by the signal's handler.

    Like KeyboardInterrupt no Exception, which whatever it comes up in, such as a decoder of images, might catch.
    """


class Messenger(threading.Thread):
    """Passes SIGTERM and SIGINT on to the other ranks while it runs, and brings theirs, within a second or two.

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
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
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


class StopSignals:
    """Remembers SIGTERM and SIGINT, and lets every rank know as soon as one of them got one.

    While the context lasts, a signal does not end the process: it is asked for between steps. A rank that waits for its
    loader meanwhile is told within a second or two. Rank 0 is the main process.
    """

    def __init__(self, ranks: int) -> None:
        self.received = False
        self.interruptible = False  # then a signal raises Interrupted, once
        # Over the CPU, so that asking does not wait for the GPU.
        self._group = torch.distributed.new_group(backend="gloo") if ranks > 1 else None
        self._ranks = ranks
        self._previous: dict[signal.Signals, Any] = {}
        self._messenger = Messenger() if ranks > 1 else None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
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

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.interruptible:
            self.interruptible = False
            raise Interrupted

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
        answers = self._gather(self.received, mine.loss, mine.gradient)
        return any(received for received, *_ in answers), [Faults(loss, gradient) for _, loss, gradient in answers]

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
        if self._group is None:
            return [list(numbers)]
        mine = torch.tensor(numbers)
        everyone = [torch.empty_like(mine) for _ in range(self._ranks)]
        torch.distributed.all_gather(everyone, mine, group=self._group)
        return torch.stack(everyone).tolist()
