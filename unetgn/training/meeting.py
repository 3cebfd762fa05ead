"""Lets the processes of a start find each other, each wait within a time, and says which of them did not come."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed.distributed_c10d import _set_pg_timeout

from unetgn.programs.allocator import keep_freed_memory
from unetgn.training.errors import reason

logger = logging.getLogger(__name__)

LONGEST_MEETING = timedelta(minutes=30)  # from the first process to the last: a cluster's machines begin as they can
LONGEST_CONNECTION = timedelta(minutes=10)  # of processes that are all there
LONGEST_WAIT = timedelta(hours=2)  # of a process for another: the main one reads every image before the first step
SILENT = timedelta(minutes=1)  # of the meeting, before it is said for whom it waits
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells of a meeting
GONE = ("closed by peer", "reset by peer", "Broken pipe")
LEFT_ALONE = "another process of this start has ended"  # before the reason
LISTED = 10  # a message names at most this many ranks


@contextlib.contextmanager
def connecting() -> Iterator[timedelta]:
    """Lend the timeout for a process group that is made in the block, once all processes have come.

    A process that dies before it is connected leaves the others waiting for that long, and not for LONGEST_WAIT, which
    holds afterwards. Raises ConnectionError where one does not come, or cannot be connected.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield LONGEST_WAIT
        return
    store = meet()  # kept until the process group has its own: rank 0 may be the one that serves it
    # NCCL connects at the first sum, and not here.
    on_cpu = not torch.accelerator.is_available()
    try:
        yield LONGEST_CONNECTION if on_cpu else LONGEST_WAIT
    except RuntimeError as error:
        raise ConnectionError(
            f"the processes of this start were all there, and one has gone before they were connected: {reason(error)}"
        ) from error
    if on_cpu and torch.distributed.is_initialized():
        _set_pg_timeout(LONGEST_WAIT)
    del store


def start_processes() -> Accelerator:
    """Make Accelerate's view of the processes that a launcher started. Raises ConnectionError where one is missing."""
    with connecting() as timeout:
        handlers = [InitProcessGroupKwargs(timeout=timeout)]
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=handlers)
    keep_freed_memory(accelerator.device.type)
    return accelerator


def connect_over_cpus() -> torch.distributed.ProcessGroup:
    """Make a group of all processes that goes over the CPUs. Raises ConnectionError where one has gone."""
    try:
        group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_CONNECTION)
        _set_pg_timeout(LONGEST_WAIT, group)
    except RuntimeError as error:
        raise ConnectionError(f"{LEFT_ALONE}: {reason(error)}") from error
    return group


def meet() -> torch.distributed.Store | None:
    """Wait until every process of this start has come, and return where they met.

    None where no launcher has said how they find each other. Raises ConnectionError, which names those that have not
    come within LONGEST_MEETING.
    """
    if not all(os.environ.get(name) for name in NAMES):
        return None  # mpirun's, which Accelerate finds out about
    rank, world, host, port = (os.environ[name] for name in NAMES)
    began = time.monotonic()
    try:
        # As the process group makes its own, which waits for all without a word: with torchrun at the launcher's.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store: torch.distributed.Store = torch.distributed.TCPStore(
            host, int(port), int(world), rank == "0" and not kept, LONGEST_MEETING, False, multi_tenant=True
        )
        store = torch.distributed.PrefixStore("met", store)
        store.set(rank, "here")
        everyone = [str(number) for number in range(int(world))]
        said = False
        while not store.check(everyone):
            waited = timedelta(seconds=time.monotonic() - began)
            if waited > LONGEST_MEETING:
                raise ConnectionError(f"{missing(store, everyone)} of {world} has not come within {LONGEST_MEETING}")
            if waited > SILENT and not said:
                said = True
                logger.warning("waiting for %s of %s, which has not come yet", missing(store, everyone), world)
            time.sleep(min(1.0, 0.02 + waited.total_seconds() / 10))
        return store
    except RuntimeError as error:
        raise ConnectionError(f"rank 0, which is to be at {host}:{port}, cannot be reached: {reason(error)}") from error


def missing(store: torch.distributed.Store, everyone: list[str]) -> str:
    """Name the ranks that have not come."""
    absent = [rank for rank in everyone if not store.check([rank])]
    more = f" and {len(absent) - LISTED} more" * (len(absent) > LISTED)
    return f"rank {', '.join(absent[:LISTED])}{more}"


def left_alone(error: BaseException) -> bool:
    """Return True where an error says that another process has gone: in gloo's words, or of torch's kinds."""
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in GONE)
