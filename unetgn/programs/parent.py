"""Watches the process that started this one, which may be a launcher of Accelerate's.

A launcher of one process passes no signal on, and a killed one passes none on at all. Its process would go on for ever,
holding the run's folder, with nobody to end it. Imported before all else: a launcher may die during the other imports.
"""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT = os.getppid()


def stop_with_parent() -> None:
    """Have this process get SIGTERM where its launcher dies. Does nothing where Accelerate did not start it."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # every launcher of Accelerate's sets it
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while os.getppid() == PARENT:  # afterwards the parent is whoever adopts orphans
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
