"""Runs units in a process that may hang or break: started by the supervisor, one line of JSON at a time.

    supervisor   the name of a unit, on a line
    worker       at first {"hello": environment, "units": [...]}; after each unit {"unit": name, "status": …,
                 "seconds": …, "data": …, "alive": …}

A worker whose device is lost (a kernel broke the process's context) says so with that unit, and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

Data = dict[str, Any]
LATER = 10.0  # seconds after its limit, a unit ends its own process: should there be no supervisor to do it


class Absent(Exception):
    """Says that a package or a property of the device, which the unit is about, is not there."""


@dataclass(frozen=True)
class Unit:
    """Holds what is run and recorded as one: `run` returns raw numbers, and `faults` where something is wrong."""

    name: str
    kind: str
    seconds: float  # that it will take, by estimate
    limit: float  # seconds after which it is taken for one that hangs
    run: Callable[[], Data]

    def describe(self) -> Data:
        return {"name": self.name, "kind": self.kind, "seconds": self.seconds, "limit": self.limit}


class Worker:
    """Runs units for one supervisor over standard input and output; what the units print goes to standard error."""

    def __init__(self) -> None:
        self.orders = sys.stdin
        self.reports: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        faulthandler.enable()  # says where a unit was when the supervisor aborts it

    def say(self, report: Data) -> None:
        """Write one report."""
        print(json.dumps(report, default=repr), file=self.reports, flush=True)

    def serve(self, environment: Data, units: Sequence[Unit], is_alive: Callable[[], bool]) -> None:
        """Run the units that are asked for, until nothing more is, or until the device is lost."""
        by_name = {unit.name: unit for unit in units}
        self.say({"hello": environment, "units": [unit.describe() for unit in units]})
        for name in self.orders:
            unit = by_name[name.strip()]
            faulthandler.dump_traceback_later(unit.limit + LATER, exit=True)
            report = outcome(unit)
            report["alive"] = is_alive()
            if not report["alive"]:
                report["status"] = "lost"
            faulthandler.cancel_dump_traceback_later()
            self.say(report)
            if not report["alive"]:
                return


def outcome(unit: Unit) -> Data:
    """Run a unit and report what became of it."""
    began = time.perf_counter()
    try:
        data = unit.run()
        report: Data = {"status": "wrong" if data.get("faults") else "done", "data": data}
    except Absent as error:
        report = {"status": "absent", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        report = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:600]}
    return {"unit": unit.name, **report, "seconds": round(time.perf_counter() - began, 3)}
