"""Ends a program in one line where Ctrl-C, or a package that is not there, ends it; prints on any terminal, or none.

It is imported before all else: with it, Ctrl-C and a missing package end the imports of a program in one line, too.
"""

from __future__ import annotations

import contextlib
import io
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
    "push.py": "stopped; the pipeline is as it was, and the same line sends it",
    "train_classifier.py": "stopped; nothing was written",
    "app.py": "stopped; the page is closed",
    "cache_latents.py": "stopped; the same line goes on after the last whole shard",
}
# The extra of pyproject.toml that brings a package, by the name that it is imported by; "" is the package alone.
BASE = ("torch", "diffusers", "huggingface_hub", "accelerate", "einops", "safetensors", "numpy")
TRAIN = ("jsonargparse", "yaml", "docstring_parser", "tensorboard", "matplotlib", "PIL", "tqdm", "sklearn", "scipy")
DATA = ("datasets", "pyarrow", "fsspec")
DEV = ("transformers", "triton")
EXTRAS = {
    **dict.fromkeys(BASE, ""),
    **dict.fromkeys(TRAIN, "[train]"),
    **dict.fromkeys(DATA, "[train,data]"),
    **dict.fromkeys(DEV, "[train,dev]"),
    "torch_fidelity": "[train,fid]",
    "gradio": "[train,app]",
    "peft": "[train,lora]",
    "monai": "[train,peers]",
}


def last_words(script: str, error: KeyboardInterrupt | ModuleNotFoundError) -> int:
    """Say in one line what ended the script, and return its exit code. Raises `error` where it is a fault of ours."""
    if isinstance(error, KeyboardInterrupt):
        words, code = f"{script}: {STOPPED.get(script, 'stopped')}", 130  # as shells say it: 128 + SIGINT
    elif (package := (error.name or "").partition(".")[0]) in EXTRAS:
        words = f"{script}: error: the package {package} is not installed: pip install {what_brings(EXTRAS[package])}"
        code = 2
    else:
        raise error
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the others say the same
        say(words)
    return code


def what_brings(extra: str) -> str:
    """Write for pip what brings an extra such as "[train]": of the clone that this is, or of the package."""
    clone = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()
    return f'-e ".{extra}"' if clone else f'"unetgn{extra}"'


def lacks_memory(error: MemoryError | RuntimeError) -> bool:
    """Return True where an error says that a GPU, or this machine, has no memory left, in torch's words or Python's."""
    lacking = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return lacking or "can't allocate memory" in str(error)  # of a CPU's torch raises no error of its own


def keep_output() -> None:
    """Have output that the terminal has no letters for written with others, and closed streams be none.

    A script that was started with closed descriptors (`>&-`) would give their numbers to the files that it opens next,
    and what C++ says to "the terminal" would go into those.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")


def say(words: str) -> None:
    """Print to stderr, where somebody may still be reading it; what a terminal would obey is written out."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in words)
    with contextlib.suppress(OSError, ValueError):
        print(shown, file=sys.stderr, flush=True)


def flush_output() -> None:
    """Write what is still to be printed. Where nobody reads it, Python would end with another code for that."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say the last words where Ctrl-C or a missing package ends the program: a hook for `sys.excepthook`."""
    if isinstance(error, (KeyboardInterrupt, ModuleNotFoundError)):
        try:
            code = last_words(Path(sys.argv[0]).name, error)
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit(code)
    sys.__excepthook__(kind, error, trace)
