"""Every file that a folder of ours holds is attacked."""

from typing import get_args

import pytest

from tests.attacks import files
from tests.attacks.files import READABLE, made, make_adapters
from unetgn.training.checkpoint import BASE, CONFIGS, TensorFile
from unetgn.training.data.standing import SAMPLES
from unetgn.training.manifest import MANIFEST

# Of those that hold a run, which takes seconds to make: all of its files are attacked there ("run/**/*").
RUNS = (files.make_run, files.make_stream_run)
CHEAP = {readable.make: readable.name for readable in READABLE if readable.make not in RUNS}
# What no loader of ours reads there, by folder and ending of the name.
UNREAD = {
    "pipeline": (
        "scheduler/scheduler_config.json",  # diffusers reads it, as it sees fit
        ".md",
        ".py",  # never, unless diffusers is told to run code
    ),
    "request of samples": (".png",),  # of "samples" they are attacked
}


@pytest.mark.thorough
@pytest.mark.parametrize("make", CHEAP, ids=CHEAP.values())
def test_every_file_of_a_folder_is_attacked(make) -> None:
    readables = [readable for readable in READABLE if readable.make == make]
    folder = made(readables[0])
    attacked = {path for readable in readables for name in readable.files for path in folder.glob(name)}
    left = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path not in attacked
    ]
    unread = UNREAD.get(CHEAP[make], ())
    assert [path for path in left if not path.endswith(unread) and not path.startswith("step-000001/")] == []


def test_the_checkpoint_that_is_attacked_has_every_file_that_one_may_have() -> None:
    folder = made(next(readable for readable in READABLE if readable.make == make_adapters)) / "step-000002"
    every = {*CONFIGS, SAMPLES, BASE, MANIFEST, *(f"{name}.safetensors" for name in get_args(TensorFile))}
    assert {path.name for path in folder.iterdir()} == every
