"""Runs the command `unetgn`: each of its words starts a program, as a script of the repository does, too."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

# By the word: the module with the program's `main`, and what it does.
PROGRAMS = {
    "train": ("unetgn.training.train", "train a diffusion U-Net: on your own images, `unetgn train PICTURES`"),
    "sample": ("unetgn.sampling.sample", "draw images with a trained network"),
    "evaluate": ("unetgn.sampling.evaluate", "say what samples are worth"),
    "app": ("unetgn.sampling.app", "draw, and watch a run, on a page in the browser"),
    "average": ("unetgn.training.average", "make averaged weights of any width of a run"),
    "cache-latents": ("unetgn.training.cache_latents", "encode images once, to train on their latents"),
    "push": ("unetgn.training.push", "send a finished pipeline to Hugging Face's hub"),
    "configs": ("unetgn.training.configs", "list the configurations that come along, or print one"),
    "convert": ("unetgn.interop.convert_files", "convert somebody else's U-Net to ours, or ours to diffusers'"),
    "completion": ("unetgn.programs.completion", "print what completes this command in bash, zsh or fish"),
    "fuse-report": ("unetgn.fusion.fuse_report", "say what `unetgn.fuse` would do to a model"),
}


def usage() -> str:
    """List the words."""
    lines = [f"  {word:15}{what}" for word, (_, what) in PROGRAMS.items()]
    return "\n".join(["usage: unetgn COMMAND …", "", *lines, "", "unetgn COMMAND --help lists what it takes."])


def main(arguments: list[str] | None = None) -> int:
    """Run the program that the first word names, with the rest; return its exit code."""
    word, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if word in ("", "-h", "--help", "--version"):
        print(f"unetgn {import_module('unetgn').__version__}" if word == "--version" else usage())
        return 0 if word else 2
    if word not in PROGRAMS:
        near = difflib.get_close_matches(word, PROGRAMS, n=1)
        print(f"unetgn: error: there is no {word!r}.{f' Did you mean {near[0]!r}?' if near else ''}\n\n{usage()}",
              file=sys.stderr)  # fmt: skip
        return 2
    return int(import_module(PROGRAMS[word][0]).main(rest[:-1]))
