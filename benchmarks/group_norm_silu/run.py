"""Runs cases into a record: checks each case, measures it, writes it, and stops in time."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.group_norm_silu.cases import Case
from benchmarks.group_norm_silu.checks import faults_of_case
from benchmarks.group_norm_silu.measure import (
    DeviceLost,
    Row,
    cluster_rows,
    first_line,
    host_rows,
    passes_with_clusters,
    rows,
)
from benchmarks.group_norm_silu.record import Record
from benchmarks.group_norm_silu.timing import Machine

DONE, WRONG_RESULTS, CANNOT_RUN, DEVICE_LOST, NOT_MEASURED = 0, 1, 2, 3, 4  # exit codes
WORST_FIRST = (CANNOT_RUN, DEVICE_LOST, WRONG_RESULTS, NOT_MEASURED, DONE)
CLUSTER_SECONDS = 300.0  # for all cases: a barrier that never opens would take for ever
HUNG_SECONDS = 60.0  # a case that has run this long when the time is up is taken for one that hangs
Measure = Callable[[Case, Machine, float], list[Row]]


def measure_plain(todo: Sequence[Case], record: Record, machine: Machine, deadline: float | None) -> int:
    """Measure all contenders on each case that the record does not have. Returns the exit code."""
    try:
        prepare(record, machine)
        return _measure(todo, record, machine, deadline, rows, clusters=False)
    except DeviceLost as error:
        return _lost(record, error)


def measure_clusters(todo: Sequence[Case], record: Record, machine: Machine, deadline: float | None) -> int:
    """Measure ours with groups held by clusters of blocks, on each case where that changes the plan."""
    from unetgn.ops.triton.device import clusters

    concerned = [case for case in todo if passes_with_clusters(case, machine.device)]
    try:
        prepare(record, machine)
        with clusters(True):
            return _measure(concerned, record, machine, deadline, cluster_rows, clusters=True)
    except DeviceLost as error:
        return _lost(record, error)


def measure_with_clusters(
    todo: Sequence[Case], record: Record, machine: Machine, deadline: float | None, arguments: Sequence[str]
) -> int:
    """Call `measure_plain`, then this program again for the clusters alone: no GPU has run those, and they may hang."""
    code = measure_plain(todo, record, machine, deadline)
    left = CLUSTER_SECONDS if deadline is None else deadline - time.monotonic()
    if code == DEVICE_LOST or left < 1:
        return code
    given = [argument for argument in arguments if argument != "--clusters"]
    commit = str(record.contents["commit"])
    command = [sys.executable, "-m", "benchmarks.group_norm_silu", *given, "--commit", commit, "--clusters-alone"]
    machine.empty_cache()
    try:
        alone = subprocess.run([*command, "--seconds", str(left)], timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"The clusters took more than {left:.0f} s and were stopped; what was measured is in {record.path}.")
        record.give_up_running(f"did not end before the clusters' {left:.0f} s were up", after=HUNG_SECONDS)
        alone = NOT_MEASURED
    if alone < 0:
        record.give_up_running(f"signal {-alone} ended its process")
        alone = DEVICE_LOST
    return next(one for one in WORST_FIRST if one in (code, alone))


def prepare(record: Record, machine: Machine) -> None:
    """Measure the copy bandwidth and the host's time, once a file."""
    from torch._functorch import config

    # A backward pass is repeated on one graph; a compiled one would otherwise reuse the buffers that it saved.
    config.donated_buffer = False
    if "copy_bandwidth" not in record.contents:
        record.contents["copy_bandwidth"] = machine.copy_bandwidth()
    if "host" not in record.contents:
        try:
            record.contents["host"] = host_rows(machine)
        except Exception as error:
            if not machine.is_alive():
                raise DeviceLost(f"host time: {first_line(error)}") from error
            record.contents["host"] = [{"error": first_line(error)}]
    record.save()


def _measure(
    todo: Sequence[Case],
    record: Record,
    machine: Machine,
    deadline: float | None,
    measure: Measure,
    *,
    clusters: bool,
) -> int:
    longest = 0.0
    left = [case for case in todo if not record.has(case, clusters=clusters)]
    for index, case in enumerate(left):
        began = time.monotonic()
        if deadline is not None and began + longest > deadline:
            print(f"The time is up with {len(left) - index} of {len(todo)} cases left; the same command goes on.")
            break
        print(case, flush=True)
        _measure_one(case, record, machine, measure, clusters=clusters)
        machine.empty_cache()
        longest = max(longest, time.monotonic() - began)
    print(f"Wrote {record.path}; `python -m benchmarks.group_norm_silu.report {record.path}` makes the table.")
    return _verdict(record, clusters=clusters)


def _verdict(record: Record, *, clusters: bool) -> int:
    """Name what is wrong and what could not be run. Returns the exit code."""
    wrong, errors = (
        [one for one in record.contents[kind] if one["clusters"] == clusters] for kind in ("faults", "errors")
    )
    for entry in wrong:
        print(f"WRONG, not timed: {entry}", file=sys.stderr)
    for entry in errors:
        print(f"NOT MEASURED{', to be tried again' if entry['again'] else ''}: {entry}", file=sys.stderr)
    return WRONG_RESULTS if wrong else NOT_MEASURED if errors else DONE


def _measure_one(case: Case, record: Record, machine: Machine, measure: Measure, *, clusters: bool) -> None:
    """Check, then time; an error of either is the case's alone, unless the device does not survive it."""
    record.begin(case, clusters=clusters)
    try:
        faults = faults_of_case(case, machine.device, machine.implementation)
        found = [] if faults else measure(case, machine, record.contents["copy_bandwidth"])
    except Exception as error:
        lost = isinstance(error, DeviceLost) or not machine.is_alive()
        record.add_error(case, first_line(error), clusters=clusters, again=not lost)
        if lost:
            raise DeviceLost(f"{case}: {first_line(error)}") from error
        return
    if faults:
        record.add_faults(case, faults, clusters=clusters)
        return
    record.add(found)
    for one in found:
        print({key: round(v, 1) if isinstance(v, float) else v for key, v in one.items()}, flush=True)


def _lost(record: Record, error: DeviceLost) -> int:
    print(f"The device's context is lost: {error}", file=sys.stderr)
    print(f"Run the same command again: it goes on in {record.path}, without that case.", file=sys.stderr)
    return DEVICE_LOST
