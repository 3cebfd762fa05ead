"""The noise scale is that of gradients whose mean and covariance are known, with accumulation and between processes."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.training.forked import succeed
from tests.training.launched import TINY, TWO
from unetgn import UNet
from unetgn.training.config_files import load_config
from unetgn.training.errors import ConfigError
from unetgn.training.network import make_network
from unetgn.training.noise_scale import noise_scale
from unetgn.training.objective import Objective, ObjectiveConfig
from unetgn.training.prepare import prepare_samples
from unetgn.training.processes import make_accelerator
from unetgn.training.step import EMAConfig, TrainConfig, TrainState
from unetgn.training.throughput import Window


def test_the_noise_scale_is_exact_of_exact_norms() -> None:
    """|G|² = 3 and tr(Σ) = 60: batches of 4 have 3 + 15, of 20 have 3 + 3."""
    assert noise_scale(18.0, 6.0, small_batch=4, large_batch=20) == pytest.approx(20)
    assert noise_scale(18.0, 3.6, small_batch=4, large_batch=20) is None  # no signal: 20·3.6 = 4·18


class KnownGradients(Objective):
    """Makes losses linear in the weights: the gradient of a sample is mean + deviation·e, with e from N(0, 1)."""

    mean, deviation = 0.05, 0.5

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
        return batch["gradients"] @ weights


@pytest.mark.parametrize("accumulated", [2, 5])
def test_it_is_that_of_a_known_covariance_with_accumulated_batches(accumulated: int) -> None:
    torch.manual_seed(0)
    unet = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4})
    config = TrainConfig(
        steps=99, gradient_accumulation=accumulated, batch_size=3, noise_scale=True, max_gradient_norm=0.01
    )
    objective = KnownGradients(ObjectiveConfig(), None)
    state = TrainState(unet, objective, config, EMAConfig(), Accelerator(cpu=True), seed=0)
    window = Window(state.accelerator, 3 * accumulated, lambda: 1, (3, 3 * accumulated))
    count = unet.num_parameters()
    for _ in range(40):
        state_batches = [
            {"gradients": objective.mean + objective.deviation * torch.randn(3, count)} for _ in range(accumulated)
        ]
        window.add([state.run_step(state_batches)])
    wanted = objective.deviation**2 / objective.mean**2
    assert wanted == pytest.approx(100)
    assert window.close()["noise_scale"] == pytest.approx(wanted, rel=0.1)


def squared(network: UNet, objective: Objective, samples: list[dict[str, torch.Tensor]]) -> float:
    """Compute |G_B|² of samples, by the definition."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    network.zero_grad()
    objective.losses(network, objective.prepare(batch)).mean().backward()
    return sum(float(parameter.grad.double().square().sum()) for parameter in network.parameters())


def test_two_processes_compare_their_gradients_with_the_mean_and_train_as_without(tmp_path: Path, two: Path) -> None:
    """The first row is of the first step, whose gradients are computed here from the samples of both."""
    keys = ["train.noise_scale=true", "train.log_every=1", "train.steps=2", "checkpoint.every=2", "preview.every=0"]
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), *keys]
    succeed(*line, launcher=TWO, processes=2)
    config = load_config(tmp_path / "run" / "config.yaml")
    samples, _ = prepare_samples(config, Accelerator(cpu=True), None)
    network = make_network(config, None).eval()  # tiny.yaml has no dropout
    assert not config.model.dropout
    objective = Objective(config.objective, config.model.num_classes)
    size = config.train.batch_size
    first, second = ([samples[rank * size + i] for i in range(size)] for rank in (0, 1))
    small = (squared(network, objective, first) + squared(network, objective, second)) / 2
    large = squared(network, objective, first + second)
    wanted = noise_scale(small, large, small_batch=size, large_batch=2 * size)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as lines:
        row = next(csv.DictReader(lines))
    assert wanted is not None
    assert float(row["noise_scale"]) == pytest.approx(wanted, rel=1e-3)
    succeed(*line[:3], str(tmp_path / "plain"), *keys[1:], launcher=TWO, processes=2)
    from tests.training.runs import assert_equal_bits

    assert_equal_bits(tmp_path / "run", tmp_path / "plain", 2)


def test_a_step_of_one_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load_config(tmp_path / "tiny.yaml", ["train.noise_scale=true", "train.gradient_accumulation=1"])
    with pytest.raises(
        ConfigError, match=r"here it has one part: set train\.gradient_accumulation=2 train\.batch_size="
    ):
        make_accelerator(config, tmp_path)


def test_a_resumed_run_logs_the_same_noise_scales(tmp_path: Path) -> None:
    from unetgn.training.train import main

    (tmp_path / "tiny.yaml").write_text(TINY)
    keys = ["train.noise_scale=true", "train.gradient_accumulation=2", "train.log_every=2", "train.steps=4",
            "preview.every=0", "train.trackers=[]", "train.processes=null"]  # fmt: skip
    line = ["--config", str(tmp_path / "tiny.yaml"), *keys]
    assert main([*line, "--output", str(tmp_path / "whole"), "checkpoint.every=3"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000004")
    assert main([*line, "--output", str(tmp_path / "broken"), "checkpoint.every=3", "--resume", "auto"]) == 0
    scales = []
    for run in ("whole", "broken"):
        with (tmp_path / run / "metrics.csv").open(newline="") as lines:
            scales.append({row["step"]: row["noise_scale"] for row in csv.DictReader(lines)})
    assert scales[0]["4"] == scales[1]["4"] != ""
