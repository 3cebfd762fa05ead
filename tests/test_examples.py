"""Runs the examples as they stand: the number that each prints says that it has learned something."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
