"""train.py that is killed in its second save: at the first call of the function that KILLED_AT names."""

import os
import signal
import sys
from pathlib import Path

from training import checkpoint, loop
from training.train import main

OWNERS = {
    "save_file": checkpoint.safetensors.torch,
    "flush": checkpoint,
    "rename": Path,
    "rmtree": checkpoint.shutil,  # of the older checkpoint, when the new one stands
}
original_write = loop.write_checkpoint
saves = []


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(*arguments: object, **more: object) -> object:
    saves.append(arguments)
    name = os.environ["KILLED_AT"]
    if len(saves) == 2 and name != "rmtree":
        setattr(OWNERS[name], name, kill)
    written = original_write(*arguments, **more)
    if len(saves) == 2:
        setattr(OWNERS[name], name, kill)
    return written


loop.write_checkpoint = write
sys.exit(main())
