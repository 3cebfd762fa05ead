"""Holds one worker process: what it is told, what it says, and its end, which it may not come to by itself."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]
LOOK = 0.05  # seconds between two looks whether the process lives
LAST_WORDS = 1.0  # seconds for it to say where it hangs
GOODBYE = 5.0  # seconds for it to end by itself
END = 10.0  # seconds to wait for the end of a killed process, which a driver may hold


class Child:
    """Holds a worker in a process group of its own; its standard error goes to the end of a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=dict(environment),
                start_new_session=True,
            )
        self._reports: queue.Queue[Report] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self._reports.put(json.loads(line))
            except ValueError:
                continue  # a process that was killed in the middle of a line

    def order(self, unit: str) -> None:
        """Ask for a unit. A process that is no more does not answer, which `report` finds."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(unit + "\n")
            self.process.stdin.flush()

    def report(self, until: float) -> Report | None:
        """Return what the worker says next; None where it has ended, or where it is later than `until` (monotonic)."""
        while True:
            lives = self.process.poll() is None
            try:
                return self._reports.get(timeout=LOOK)
            except queue.Empty:
                if not lives or time.monotonic() >= until:
                    return None

    def ended(self) -> str | None:
        """Say how the process has ended; None while it lives."""
        code = self.process.poll()
        if code is None:
            return None
        return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"

    def abort(self) -> None:
        """Put an end to the process and all that it started: first such that it says in the log where it was."""
        self._send(signal.SIGABRT)
        self._wait(LAST_WORDS)
        self._send(signal.SIGKILL)
        self._wait(END)

    def dismiss(self) -> None:
        """Let the worker end, which it does where no more orders come."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self._wait(GOODBYE)
        self.abort()

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
