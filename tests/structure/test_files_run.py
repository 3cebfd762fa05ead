"""Few files run in one forward, one training step and one launch: a newcomer reads them in an afternoon.

What is counted, and how: `tests/structure/files_run.py`, which this runs in a process of its own, since Triton reads
TRITON_INTERPRET when it is imported.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.structure.imports import ROOT

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def counted() -> dict[str, list[str]]:
    command = [sys.executable, "-m", "tests.structure.files_run", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("what", "most"), [("a forward", 12), ("a training step", 18), ("a launch, warm", 9)])
def test_few_files_run(what: str, most: int, counted: dict[str, list[str]]):
    files = counted[what]
    assert len(files) <= most, f"{len(files)} files run in {what}, and {most} should do:\n" + "\n".join(files)


def test_the_files_that_must_run_are_seen(counted: dict[str, list[str]]):
    """A trace that sees nothing would pass."""
    must = {
        "a forward": {"unetgn/unet/model.py", "unetgn/nn/resblock.py", "unetgn/ops/aten.py"},
        "a training step": {"unetgn/training/step.py", "unetgn/training/data/samples.py", "unetgn/ops/autograd.py"},
        "a launch, warm": {"unetgn/ops/functional.py", "unetgn/ops/triton/entry.py", "unetgn/ops/triton/recipe.py"},
    }
    assert {what: files - set(counted[what]) for what, files in must.items()} == {what: set() for what in must}
