"""Gives units to workers one by one, and outlives them: a hang, a broken context, a signal cost one unit each.

This process never touches the GPU, and imports neither torch nor what is measured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import Child, Report
from benchmarks.gpu.journal import FAILED, KNOWN, Journal

STARTS_IN_A_ROW = 3  # that fail, before the machine is given up
HANGS_OF_A_KIND = 2  # after which its other units are left out: each costs its limit
LOG = "worker.log"


class Refused(RuntimeError):
    """Says why a worker cannot work here."""


@dataclass
class Supervisor:
    """Runs what is missing in a folder until the deadline (monotonic), with workers started by `command`."""

    command: Sequence[str]
    folder: Path
    deadline: float
    variables: Mapping[str, str]  # of the workers
    start_limit: float = 90.0  # seconds until a worker must have said what it can do
    again: bool = False  # run once more what has failed
    only: Sequence[str] = ()  # kinds
    began: float = field(default_factory=time.monotonic)
    journal: Journal | None = None
    _child: Child | None = None
    _todo: list[Report] | None = None  # unknown until a worker has said it
    _hangs: Counter[str] = field(default_factory=Counter)

    def run(self) -> bool:
        """Run all units that fit the time. Return False where no worker could be started.

        Raises Refused where a worker says that it cannot work on this machine.
        """
        failures = 0
        try:
            while (self._todo is None or self._todo) and not self._is_late() and failures < STARTS_IN_A_ROW:
                if self._child is None and not self._start():
                    failures += 1
                elif self._todo:
                    failures = 0
                    self._run_next(self._todo.pop(0))
        except BaseException:
            if self._child is not None:
                self._child.abort()
            raise
        self._end()
        late = self._is_late()
        self._leave(self._todo or [], "the time was up" if late else "no worker could be started")
        return late or self._todo == []

    def _is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _start(self) -> bool:
        """Call a worker and hear what it can do; the first one says which units there are."""
        child = Child(self.command, self.folder / LOG, self.variables)
        hello = child.report(min(time.monotonic() + self.start_limit, self.deadline))
        if hello is None or "refused" in hello:
            how = child.ended() or f"no word for {self.start_limit:.0f} s"
            child.abort()
            if hello is not None:
                raise Refused(hello["refused"])
            journal = self.journal or Journal(self.folder, {})
            journal.add("start", "start", "died", reason=f"a worker did not start: {how}; see {LOG}")
            return False
        self._child = child
        if self._todo is None:
            self.journal = Journal(self.folder, hello["hello"])
            self._todo = self._missing(hello["units"])
        return True

    def _missing(self, units: list[Report]) -> list[Report]:
        assert self.journal is not None
        latest = self.journal.latest()
        settled = KNOWN if self.again else KNOWN + FAILED
        chosen = [unit for unit in units if not self.only or unit["kind"] in self.only]
        return [unit for unit in chosen if latest.get(unit["name"], {}).get("status") not in settled]

    def _run_next(self, unit: Report) -> None:
        left = self.deadline - time.monotonic()
        if self._hangs[unit["kind"]] >= HANGS_OF_A_KIND:
            self._leave([unit], f"{HANGS_OF_A_KIND} others of this kind have hung")
        elif unit["seconds"] > left:
            self._leave([unit], f"it takes {unit['seconds']:.0f} s by estimate, and {max(left, 0):.0f} s were left")
        else:
            self._run(unit)

    def _run(self, unit: Report) -> None:
        """Run one unit and write its line, whatever becomes of the worker."""
        child, began = self._child, time.monotonic()
        assert child is not None
        child.order(unit["name"])
        report = child.report(min(began + unit["limit"], self.deadline))
        if report is not None:
            del report["unit"]
            alive = report.pop("alive")
            self._write(unit, **report)
            if not alive:
                self._end()
            return
        seconds = time.monotonic() - began
        status, reason = "died", child.ended()
        if reason is None and self._is_late() and seconds < unit["limit"]:
            status, reason = "skipped", f"the time was up after {seconds:.0f} s of it"
        elif reason is None:
            status, reason = "hung", f"killed after {seconds:.0f} s; {LOG} says where it was"
            self._hangs[unit["kind"]] += 1
        self._write(unit, status, round(seconds, 3), reason=reason)
        child.abort()
        self._child = None

    def _write(self, unit: Report, status: str, seconds: float, **more: Any) -> None:
        assert self.journal is not None
        at = round(time.monotonic() - self.began, 1)
        self.journal.add(unit["name"], unit["kind"], status, seconds=seconds, at=at, **more)
        print(f"{at:6.1f} s  {status:7}  {unit['name']}  {more.get('reason', '')}", flush=True)

    def _leave(self, units: list[Report], reason: str) -> None:
        for unit in units:
            self._write(unit, "skipped", 0.0, reason=reason, estimate=unit["seconds"])

    def _end(self) -> None:
        """Let the worker go, by its own will or not."""
        if self._child is not None:
            self._child.dismiss()
            self._child = None
