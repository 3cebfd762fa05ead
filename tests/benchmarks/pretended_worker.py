"""A worker of `benchmarks.gpu` without a GPU, whose units end in every way.

    python pretended_worker.py UNIT[:SECONDS] ...

What a unit does is the first word of its name; after the colon stands what it would take by estimate.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.worker import Absent, Data, Unit, Worker

LIMIT = 0.3
alive = True


def raises() -> Data:
    raise ValueError("no such kernel")


def absent() -> Data:
    raise Absent("diffusers is not installed")


def breaks() -> Data:
    global alive
    alive = False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hangs() -> Data:
    time.sleep(60)
    return {}


def deaf() -> Data:
    """Hang where no signal arrives but the last, as in a driver; something that it started hangs, too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
    subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(60)", os.environ["MARK"]], check=False)
    return {}


def chatters() -> Data:
    print('{"unit": "fine", "status": "made up"}')
    os.write(1, b"not JSON\n")
    return {"us": [1.5, 2.5]}


ENDS: dict[str, Callable[[], Data]] = {
    "fine": lambda: {"us": [1.5, 2.5]},
    "wrong": lambda: {"faults": ["y is off by 1.0e+00 of its size"]},
    "raises": raises,
    "absent": absent,
    "breaks": breaks,
    "hangs": hangs,
    "deaf": deaf,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL) or {},
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV) or {},
    "exits": lambda: os._exit(7),
    "chatters": chatters,
    "slow": lambda: time.sleep(60) or {},
}


def unit(text: str) -> Unit:
    """Make the unit of an argument; a slow one may take long."""
    name, _, seconds = text.partition(":")
    word = name.split()[0]
    limit = LIMIT if word in ("hangs", "deaf") else 60.0
    return Unit(name, name.rpartition(" ")[2], float(seconds or 0.01), limit, ENDS[word])


if __name__ == "__main__":
    if os.environ.get("REFUSED"):
        Worker().say({"refused": os.environ["REFUSED"]})
        sys.exit(2)
    if os.environ.get("STARTS"):  # a machine on which nothing starts
        sys.exit(9)
    environment = {name: os.environ.get(name, name) for name in ("device", "torch", "triton", "source", "commit")}
    Worker().serve(environment, [unit(text) for text in sys.argv[1:]], lambda: alive)
