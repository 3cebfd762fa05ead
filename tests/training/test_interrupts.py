"""A true Ctrl-C to a true process, at any moment: one line, exit code 130, nothing half-written, and it goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.training.forked import Finished, finish, succeed
from tests.training.launched import ROOT, SAMPLE, TRAIN
from unetgn.training.files import TEMPORARY

EVALUATE, CACHE = ROOT / "sampling" / "evaluate.py", ROOT / "training" / "cache_latents.py"
WITH_A_SIGNAL = ROOT / "tests" / "training" / "with_a_signal.py"
FLUSH = "unetgn.training.files:flush_all:{}".format  # once for each file, before it gets its name
# The moments, by the script: functions that are called there. The first of each is tried in every run of the tests.
MOMENTS = {
    SAMPLE: [
        FLUSH(4), "unetgn.training.checkpoint:verify:1", FLUSH(1), "unetgn.unet.model:UNet.forward:2",
        "unetgn.sampling.folder:write_grid:1", FLUSH(3), FLUSH(2), FLUSH(4), "unetgn.sampling.folder:read_pixels:3",
    ],
    EVALUATE: [
        "unetgn.sampling.folder:read_pixels:3", "unetgn.training.data.images:Digits.usable:1",
        "unetgn.training.data.images:Digits.image:9",
        "unetgn.sampling.figures:nearest:2", FLUSH(1),
    ],
    CACHE: [
        "unetgn.training.data.autoencoder:Autoencoder.encode:2", "unetgn.training.data.images:ImageFolder.look:3",
        "unetgn.training.data.images:ImageFolder.image:1", FLUSH(1), FLUSH(2), FLUSH(4),
    ],
    TRAIN: [
        "unetgn.training.data.images:Digits.usable:1", "unetgn.training.network:make_network:1", FLUSH(1),
        "unetgn.training.config_files:load_config:1", "unetgn.training.processes:make_accelerator:1",
    ],
}  # fmt: skip


def line(script: Path, out: Path, finished: Path, stable_diffusion: Path, photographs: Path) -> list[str]:
    if script == SAMPLE:
        return ["--checkpoint", finished, "--seeds", "0-2", "--batch-size", "2", "--steps", "2", "--scheduler", "ddim",
                "--npz", "--out", out]  # fmt: skip
    if script == EVALUATE:
        return ["--samples", finished.parent / "samples", "--out", out / "evaluation.json"]
    if script == CACHE:
        return ["--autoencoder", stable_diffusion, "--out", out, "--shard-size", "4", "--batch-size", "2",
                "data.name=folder", f"data.path={photographs}", "data.image_size=16"]  # fmt: skip
    return ["--config", finished.parent / "tiny.yaml", "--output", out, "preview.every=0", "--resume", "auto"]


def interrupt(script: Path, arguments: list[str], moment: str) -> Finished:
    return finish(str(script), *arguments, script=WITH_A_SIGNAL, environment={"AT": moment})


def contents(folder: Path) -> dict[str, bytes]:
    """Read what a script left, but for what says how long it took."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def sampled(finished: Path) -> Path:
    """Draw what there is to be judged."""
    run, out = str(finished), str(finished.parent / "samples")
    succeed("--checkpoint", run, "--seeds", "0-9", "--steps", "2", "--scheduler", "ddim", "--out", out, script=SAMPLE)
    return finished


@pytest.mark.parametrize("script", MOMENTS, ids=lambda script: script.name)
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["one", "all"])
def test_it_ends_in_one_line_and_goes_on(
    few: bool, script: Path, sampled: Path, stable_diffusion: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = list(map(str, line(script, out, sampled, stable_diffusion, photographs)))
    for moment in MOMENTS[script][: 1 if few else None]:
        done = interrupt(script, arguments, moment)
        assert done.code == 130, (moment, done.stderr[-3000:])
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.rpartition("\r")[2].startswith(f"{script.name}: stopped"), (moment, last)
        assert not list(tmp_path.rglob(f"{TEMPORARY}*")), moment
        for picture in out.rglob("*.png"):
            Image.open(picture).load()
    if script == TRAIN:
        return  # what it leaves is for other tests
    succeed(*arguments, script=script)
    again = [argument.replace(str(out), str(tmp_path / "again")) for argument in arguments]
    succeed(*again, script=script)
    assert contents(out) == contents(tmp_path / "again")


# The module during whose import the signal comes; the first is there at once.
IMPORTED = [
    *(("argparse", script) for script in MOMENTS),
    pytest.param("diffusers", TRAIN, marks=pytest.mark.thorough),
    *(pytest.param("diffusers", script, marks=pytest.mark.slow) for script in MOMENTS if script != TRAIN),
]


@pytest.mark.parametrize(("module", "script"), IMPORTED, ids=lambda value: getattr(value, "name", value))
def test_it_ends_in_one_line_while_it_imports(module: str, script: Path) -> None:
    program = f"""
import importlib.abc, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = [{str(script)!r}]
with open(sys.argv[0]) as file:
    exec(compile(file.read(), sys.argv[0], "exec"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith(f"{script.name}: stopped")
