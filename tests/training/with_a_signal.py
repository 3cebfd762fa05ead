"""Runs a script that gets a true SIGINT at a call of a function: AT is MODULE:FUNCTION:NUMBER OF THE CALL."""

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys

module, path, number = os.environ["AT"].split(":")
owner = functools.reduce(getattr, path.split(".")[:-1], importlib.import_module(module))
name = path.rpartition(".")[2]
original, calls = getattr(owner, name), itertools.count(1)


@functools.wraps(original)
def interrupted(*arguments: object, **more: object) -> object:
    if next(calls) == int(number):
        os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments, **more)


setattr(owner, name, interrupted)
for other in list(sys.modules.values()):  # the program's modules, imported already, have it by its name
    if vars(other).get(name) is original:
        setattr(other, name, interrupted)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
