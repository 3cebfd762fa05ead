"""FSDP2 through Accelerate's own code, on CPUs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.forked import succeed
from tests.training.launched import FSDP2, ON_CPUS, TWO
from tests.training.runs import assert_close, assert_equal_bits, logged, rows, weights

pytestmark = pytest.mark.thorough

SHARDED = {"script": ON_CPUS, "launcher": FSDP2, "processes": 2}


@pytest.fixture(scope="module")
def sharded(tiny: Path) -> Path:
    output = tiny.parent / "sharded"
    succeed("--config", str(tiny), "--output", str(output), "checkpoint.every=20", **SHARDED)
    return output


def test_fsdp2_trains_what_ddp_trains(two: Path, sharded: Path) -> None:
    """Accelerate's and PyTorch's own FSDP2, over gloo: whole tensors in the checkpoint, the same up to rounding."""
    assert_close(two, sharded, 25)
    assert weights(two, 25, "optimizer").keys() == weights(sharded, 25, "optimizer").keys()
    held_out = [float(rows(run, "validation.csv")[-1]["loss"]) for run in (two, sharded)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert (sharded / "samples" / "step-000020.png").is_file()
    assert json.loads((sharded / "checkpoints/step-000025/config.json").read_text())["_class_name"] == "UNet"
    averaged, pipeline = (
        weights(sharded, 25, "ema"),
        sharded / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors",
    )
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_file(pipeline).items())


def test_fsdp2_goes_on_exactly_and_from_what_ddp_left(tiny: Path, two: Path, sharded: Path, tmp_path: Path) -> None:
    for number, before in enumerate((sharded, two)):
        middle, output = before / "checkpoints" / "step-000020", tmp_path / str(number)
        line = ["--config", str(tiny), "--output", str(output), "--resume", str(middle), "preview.every=0"]
        succeed(*line, **SHARDED)
    assert_equal_bits(sharded, tmp_path / "0", 25)
    assert_close(two, tmp_path / "1", 25)


@pytest.mark.slow
def test_fsdp2_in_bfloat16_with_accumulation_and_channels_last_trains_what_ddp_trains(
    tiny: Path, tmp_path: Path
) -> None:
    line = ["--config", str(tiny), "train.mixed_precision=bf16", "train.gradient_accumulation=2", "train.steps=6",
            "train.channels_last=true", "preview.every=0", "train.learning_rate=1e-4"]  # fmt: skip
    succeed(*line, "--output", str(tmp_path / "sharded"), **SHARDED)
    succeed(*line, "--output", str(tmp_path / "two"), launcher=TWO, processes=2)
    losses = [[row.split(",")[2] for row in logged(tmp_path / run)[1:]] for run in ("sharded", "two")]
    assert [float(x) for x in losses[0]] == pytest.approx([float(x) for x in losses[1]], rel=1e-4)
    assert_close(tmp_path / "sharded", tmp_path / "two", 6)
