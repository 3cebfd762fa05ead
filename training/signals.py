"""Stopping: one question that all ranks answer alike, so that all of them stop after the same step."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal came while this process was waiting for something; raised by the signal's handler.

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
        """Until the first signal. The ranks meet in the store that their processes met by."""
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


class StopSignals:
    """SIGTERM and SIGINT, seen by every rank as soon as one of them got one.

    While the context lasts, a signal does not end the process: it is remembered, and asked for between steps. A rank
    that waits for its loader meanwhile is told within a second or two.
    """

    def __init__(self, ranks: int) -> None:
        self.received = False
        self._interruptible = False
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
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """The result of `work`, or None where a signal came before or meanwhile: a slow loader delays no checkpoint."""
        try:
            self._interruptible = True
            if self.received:
                return None
            return work()
        except Interrupted:
            return None
        except RuntimeError:  # a loader whose workers got the signal, too
            if self.received:
                return None
            raise
        finally:
            self._interruptible = False

    def exchange(self, number: int) -> tuple[bool, list[int]]:
        """Whether any rank received a signal, and the `number` of each. Every rank has to ask."""
        mine = torch.tensor([self.received, number])
        if self._group is None:
            everyone = [mine]
        else:
            everyone = [torch.empty_like(mine) for _ in range(self._ranks)]
            torch.distributed.all_gather(everyone, mine, group=self._group)
        received, numbers = torch.stack(everyone).T.tolist()
        return any(received), numbers

    def wait_for_main(self) -> None:
        """For the other ranks while the main one works and exchanges True at every step of it, False at its end."""
        stop, working = self.exchange(False)
        while any(working) and not stop:
            stop, working = self.exchange(False)
