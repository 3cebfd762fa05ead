"""Runs the commands of README and of docs/ as they stand there, but for fewer steps, and judges what they make."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from tests.pipelines.digits import FOLDER, assert_digits, judge_of_digits
from unetgn.sampling.evaluate import main as evaluate
from unetgn.sampling.sample import main as sample
from unetgn.training.train import main as train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
MAINS = {"training/train.py": train, "sampling/sample.py": sample, "sampling/evaluate.py": evaluate}
# What other tests run, and where.
ELSEWHERE = {
    "training/cache_latents.py": "tests/training/test_latent_runs.py",
    "latent256_ldm": "tests/training/test_latent_runs.py",
    "mnist28_ddpm": "three quarters of an hour; tests/training/data/test_mnist.py, tests/sampling/test_judging.py",
    "convert": "tests/test_command.py",
    "push": "tests/training/test_push.py",
    "completion": "tests/test_completion.py",
    "lora": "tests/training/test_lora.py",
    "SHARDS": "tests/training/test_train_on_shards.py",
    "sampling.app": "tests/sampling/test_app.py",
    "tensorboard": "another project's",
    "pip": ".ci/run, from a clean checkout, and so the next ones",
    "make": "",
    "python3": "",
    "ruff": "",
    "pytest": "",
}
# Weights that are trained already, and what makes a step quick and leaves them as they are.
TRAINED = ["model.channels=[16,32]", f"train.initial_weights={FOLDER / 'epsilon'}", "train.learning_rate=1e-9"]
QUICK = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=8", "train.trackers=[]", "preview.every=0"]


def shell_lines() -> list[str]:
    """List the lines of the shell blocks of README and the pages, each whole."""
    blocks = re.findall(r"```sh\n(.*?)```", "".join([README, *PAGES.values()]), re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def commands() -> list[list[str]]:
    """Split the lines of the shell blocks into words, without the launcher's own; each line once."""
    split = (shlex.split(line, comments=True) for line in shell_lines())
    lines = dict.fromkeys(shlex.join(words) for words in split)
    return [re.sub(r"^.*accelerate launch( --\w+ \d+)*|^python ", "", line).split() for line in lines]


RUN = [words for words in commands() if words[0] in MAINS and not any(key in " ".join(words) for key in ELSEWHERE)]


def test_every_command_is_run_here_or_elsewhere() -> None:
    left = [words for words in commands() if words not in RUN]
    assert [words for words in left if not any(key in " ".join(words) for key in ELSEWHERE)] == []
    assert {words[0] for words in RUN} == MAINS.keys()


def test_what_a_shell_would_take_for_patterns_is_quoted() -> None:
    """zsh refuses a word with [ or * that no file matches."""
    unquoted = [re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line) for line in shell_lines()]
    assert [line for line in unquoted if re.search(r"[][*?{}]", line)] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands are run, with photographs."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "PICTURES").mkdir()
    shades = np.random.default_rng(0).integers(0, 256, (12, 72, 80, 3), dtype=np.uint8)
    for number, picture in enumerate(shades):
        (folder / "PICTURES" / ("a", "b")[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / "PICTURES" / ("a", "b")[number % 2] / f"{number}.jpg")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_a_command_does_what_it_says(
    words: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In README's order: what is trained first is what is sampled."""
    script, *arguments = words
    if script == "training/train.py":
        if words != RUN[0]:
            monkeypatch.chdir(tmp_path)  # into a folder that has no run
            (tmp_path / "PICTURES").symlink_to(folder / "PICTURES")
        arguments += QUICK if "PICTURES" in " ".join(words) else QUICK + TRAINED
    elif "--batch-size" in arguments:
        arguments += ["--seeds", "0-99", "--steps", "50"]  # in the place of 500 images in 250 steps
    assert MAINS[script](arguments) == 0, capsys.readouterr().err
    if script == "sampling/sample.py":
        judge(Path(arguments[arguments.index("--out") + 1]))
    if script == "sampling/evaluate.py":
        figures = json.loads(Path("runs/digits8_ddpm/demo/evaluation.json").read_text())
        assert figures["samples"] == 100
        assert figures["label_agreement"] > 0.95
        assert figures["frechet_distance"] < 0.4  # where sampling fails it is 3 and more
        assert figures["novelty"] > 0.85


def judge(out: Path) -> None:
    """Check that the images in a folder are the digits that its list says."""
    _, *lines = (out / "samples.csv").read_text().splitlines()
    names, _, labels = zip(*(line.split(",")[:3] for line in lines), strict=True)
    pixels = np.stack([np.asarray(Image.open(out / name)) for name in names])
    images = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1
    assert_digits(images, [int(label) for label in labels])


def strangeness(pixels: np.ndarray) -> np.ndarray:
    """Measure how far digits (N, 64) in [0, 1] are from the nearest real one, in units of the farthest real one's."""
    real = load_digits().data / 16
    among_real = np.sort(cdist(real, real), axis=1)[:, 1]  # 0 is the distance to itself
    return cdist(pixels, real).min(1) / among_real.max()


def test_the_saved_pipeline_draws_digits_with_this_package_and_without() -> None:
    """The snippets in their order, and with the pipeline of the second what the first one draws."""
    blocks = re.findall(r"```python\n(.*?)```", "".join(PAGES.values()), re.DOTALL)
    ours, friends = [code for code in blocks if "digits8_ddpm" in code]
    assert f"```python\n{friends}```" in README
    found: dict[str, Any] = {}
    exec(ours, found)
    drawn = np.stack([np.asarray(picture) for picture in found["pictures"]])
    images = torch.from_numpy(drawn).float()[:, None] / 127.5 - 1
    assert (judge_of_digits().predict((images.flatten(1).double().numpy() + 1) * 8) == range(10)).mean() >= 0.9
    assert np.median(strangeness(drawn.reshape(10, 64) / 255)) < 1
    assert np.array_equal(np.asarray(Image.open("digit.png")), drawn[3])
    exec(friends, found)
    pipeline = found["pipeline"]
    assert not type(pipeline).__module__.startswith("unetgn")
    pipeline.use_scheduler("dpmsolver++")
    again = pipeline(seeds=range(10), class_labels=range(10), guidance_scale=2, num_inference_steps=20).images
    assert abs(np.stack([np.asarray(picture).astype(int) for picture in again]) - drawn).max() <= 1
