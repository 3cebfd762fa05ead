"""Ends a script in one line where Ctrl-C, or a package that is not installed, ends it.

Scripts import this module before all else: with it, Ctrl-C and a missing package end their imports in one line, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

# What is left after Ctrl-C, by the script.
STOPPED = {
    "train.py": "stopped before the first step, with nothing lost; start again with --resume auto",
    "sample.py": "stopped; the images that were made stay, and the same line goes on",
    "evaluate.py": "stopped; nothing was written",
    "average.py": "stopped; nothing was written",
    "train_classifier.py": "stopped; nothing was written",
    "cache_latents.py": "stopped; the same line goes on after the last whole shard",
}
# The extra of pyproject.toml that brings a package, by the name that it is imported by; "" is the package alone.
BASE = ("torch", "diffusers", "accelerate", "einops", "safetensors", "numpy")
TRAIN = ("jsonargparse", "yaml", "docstring_parser", "tensorboard", "matplotlib", "PIL", "tqdm", "sklearn", "scipy")
DATA = ("datasets", "pyarrow", "fsspec")
EXTRAS = {
    **dict.fromkeys(BASE, ""),
    **dict.fromkeys(TRAIN, "[train]"),
    **dict.fromkeys(DATA, "[train,data]"),
    "torch_fidelity": "[train,fid]",
}


def last_words(script: str, error: KeyboardInterrupt | ModuleNotFoundError) -> int:
    """Say in one line what ended the script, and return its exit code. Raises `error` where it is a fault of ours."""
    if isinstance(error, KeyboardInterrupt):
        words, code = f"{script}: {STOPPED[script]}", 1
    elif (package := (error.name or "").partition(".")[0]) in EXTRAS:
        words = f'{script}: error: the package {package} is not installed: pip install -e ".{EXTRAS[package]}"'
        code = 2
    else:
        raise error
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the others say the same
        print(words, file=sys.stderr)
    return code


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, (KeyboardInterrupt, ModuleNotFoundError)):
        try:
            code = last_words(Path(sys.argv[0]).name, error)
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit(code)
    sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).name in STOPPED:
    sys.excepthook = _hook
