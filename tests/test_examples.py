"""Runs the examples as they stand: the number that each prints says that it has learned something."""

import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from unetgn.training.train import main as train

EXAMPLES = Path(__file__).parents[1] / "examples"


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.thorough]


def main_of(name: str) -> Callable[[Path], Any]:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_the_1_d_u_net_wins_ten_decibels_on_real_signals(tmp_path):
    assert main_of("signals_1d.py")(tmp_path / "signals.png") > 10
    assert (tmp_path / "signals.png").read_bytes().startswith(b"\x89PNG")


def test_the_2_d_u_net_finds_the_flower_where_a_threshold_does_not(tmp_path):
    found, by_threshold = main_of("segment_2d.py")(tmp_path / "flower.png")
    assert found > 0.75
    assert found > by_threshold + 0.2
    assert (tmp_path / "flower.png").read_bytes().startswith(b"\x89PNG")


def test_the_3_d_u_net_finds_ellipsoids_in_noise(tmp_path):
    assert main_of("volumes_3d.py")(tmp_path / "volumes.png") > 0.65
    assert (tmp_path / "volumes.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_conditioned_u_net_reads_its_captions(tmp_path):
    errors = main_of("captions.py")(tmp_path / "captions.png")
    assert errors["right"] < 0.95 * errors["none"]
    assert errors["none"] < errors["wrong"]
    assert (tmp_path / "captions.png").read_bytes().startswith(b"\x89PNG")


def test_the_fused_diffusers_model_learns_at_batch_sizes_1_and_2_and_is_saved_for_plain_diffusers(tmp_path, capsys):
    before, after_one, after_two = main_of("fuse_diffusers.py")(tmp_path / "fused")
    assert after_one < 0.5 * before
    assert after_two < after_one
    assert "17 places fused" in capsys.readouterr().out
    assert (tmp_path / "fused" / "diffusion_pytorch_model.safetensors").exists()


def test_a_sweep_lists_its_runs_by_their_held_out_loss(tmp_path, monkeypatch):
    """A run that learns is before one that hardly moves; given again, the same line trains nothing anew."""
    main = main_of("sweep.py")

    def run(line):  # here, without imports of its own
        AcceleratorState._reset_state(reset_partial_state=True)
        assert Path(line[1]) == EXAMPLES.parent / "training" / "train.py"
        return subprocess.CompletedProcess(line, train(line[2:]))

    monkeypatch.setattr(subprocess, "run", run)
    quick = ["model.channels=[8,16]", "train.batch_size=16", "train.steps=30", "train.warmup_steps=0", "ema.decay=0.5",
             "train.validate_every=30", "preview.every=0", "train.trackers=[]"]  # fmt: skip
    keys = ["train.learning_rate=1e-6,5e-3", *quick]
    found = main("digits8_ddpm", keys, tmp_path)
    assert [name for _, name in found] == ["learning_rate=5e-3", "learning_rate=1e-6"]
    assert found[0][0] < 0.9 * found[1][0]
    logged = {name: (tmp_path / name / "metrics.csv").read_bytes() for _, name in found}
    assert main("digits8_ddpm", keys, tmp_path) == found
    assert logged == {name: (tmp_path / name / "metrics.csv").read_bytes() for _, name in found}
    with pytest.raises(SystemExit, match=r"has no fid to be listed by: set evaluate\.every"):
        main("digits8_ddpm", keys, tmp_path, "fid")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["train.learning_rate=1e-3,2e-3"], ["learning_rate=1e-3", "learning_rate=2e-3"]),
        (["optimizer.name=adamw,muon", "train.betas=0.9,0.99"], ["name=adamw", "name=muon"]),
        (["model.channels=8,16", "model.channels=16,32"], ["channels=8,16", "channels=16,32"]),
        (["train.learning_rate_rules=1:5,0.1", "train.learning_rate_rules=1:9,0.1"],
         ["learning_rate_rules=1:5,0.1", "learning_rate_rules=1:9,0.1"]),
        (["train.batch_size=4,8", "train.batch_size=16"], ["batch_size=4", "batch_size=8", "batch_size=16"]),
        (["train.betas=0.9,0.99", "model.channels=(8,16)"], ["run"]),
    ],
)  # fmt: skip
def test_a_sweep_divides_values_at_commas_that_are_not_their_own(keys, names):
    combinations = main_of("sweep.py").__globals__["combinations"]
    assert [name for name, _ in combinations(keys)] == names
    assert all("=" in key for _, chosen in combinations(keys) for key in chosen)
