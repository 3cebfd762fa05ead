"""Averages of any width, made afterwards, against their definition over the whole trajectory in float64."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from tests.training.launched import SIX_STEPS
from unetgn.sampling.sample import main as sample
from unetgn.training.average import main
from unetgn.training.checkpoint import checkpoint_path, verify
from unetgn.training.errors import CheckpointError
from unetgn.training.power_averages import (
    WIDTHS,
    PowerAverages,
    Snapshot,
    coefficients,
    decay,
    gamma_of,
    list_snapshots,
    make_average,
    save_snapshot,
)
from unetgn.training.train import main as train

STEPS, EVERY = 600, 50


def trajectory() -> Iterator[dict[str, torch.Tensor]]:
    """Walk at random with a drift that dies out, as weights do while they train."""
    generator = torch.Generator().manual_seed(0)
    place = torch.zeros(40)
    for step in range(1, STEPS + 1):
        place = place + 0.1 * torch.randn(40, generator=generator) + 1 / step
        yield {"a": place[:30].reshape(5, 6), "b": place[30:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots of the walk."""
    folder = tmp_path_factory.mktemp("averages")
    averages = PowerAverages({"a": torch.zeros(5, 6), "b": torch.zeros(10)})
    for parameters in trajectory():
        averages.update(parameters)
        if averages.step % EVERY == 0:
            averages.save(folder)
    return folder


def definition(width: float, step: int) -> np.ndarray:
    """Average the walk with the density τ^γ, integrated over each step, in float64."""
    gamma = gamma_of(width)
    walk = np.stack([torch.cat([p["a"].flatten(), p["b"]]).double().numpy() for p in trajectory()])[:step]
    edges = (np.arange(step + 1) / step) ** (gamma + 1)
    return (np.diff(edges)[:, None] * walk).sum(0)


def flat(average: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([average["a"].flatten(), average["b"]]).double().numpy()


@pytest.mark.parametrize("width", [0.001, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_a_width_is_the_deviation_of_its_density(width: float) -> None:
    gamma = gamma_of(width)
    time = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = (gamma + 1) * time**gamma
    mean = (density * time).mean()
    assert np.sqrt((density * (time - mean) ** 2).mean()) == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("width", [0, -0.1, 0.29, 1, float("nan")])
def test_a_width_that_no_power_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="none of a power function: give one from"):
        gamma_of(width)


def test_the_first_weights_are_forgotten_at_once() -> None:
    assert decay(gamma_of(0.1), 1) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_kept_is_the_definition(width: float, folder: Path) -> None:
    for snapshot in list_snapshots(folder)[:: STEPS // EVERY - 1]:
        expected = definition(width, snapshot.step)
        np.testing.assert_allclose(flat(snapshot.tensors(width)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [300, STEPS])
@pytest.mark.parametrize("width", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_any_width_is_made_afterwards(width: float, step: int, folder: Path) -> None:
    """To a hundredth of how far averages of different widths are apart, and some beyond those that were kept."""
    snapshots = list_snapshots(folder)
    made, expected = flat(make_average(snapshots, width, step)), definition(width, step)
    spread = np.abs(definition(0.001, step) - definition(0.25, step)).mean()
    assert np.abs(made - expected).mean() < (0.01 if 0.05 <= width <= 0.15 else 0.05) * spread
    assert sum(coefficients([(gamma_of(own), each.step) for each in snapshots for own in WIDTHS],
                            (gamma_of(width), step))) == pytest.approx(1)  # fmt: skip


def test_coefficients_give_the_closest_density() -> None:
    """Against least squares over a fine grid of times, of differences to the last one: the sum is one."""
    kept = [(gamma_of(width), step) for step in (100, 200, 400) for width in WIDTHS]
    wanted = (gamma_of(0.07), 400)
    time = (np.arange(400_000) + 0.5) / 1000

    def density(gamma: float, step: int) -> np.ndarray:
        return np.where(time < step, (gamma + 1) * (time / step) ** gamma / step, 0)

    basis = np.stack([density(*each) for each in kept], 1)
    last = basis[:, -1]
    expected, *_ = np.linalg.lstsq(basis[:, :-1] - last[:, None], density(*wanted) - last, rcond=None)
    np.testing.assert_allclose(coefficients(kept, wanted), [*expected, 1 - expected.sum()], atol=1e-3)
    assert coefficients(kept, kept[3]) == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-8)


def test_averages_go_on_exactly_from_a_snapshot(folder: Path, tmp_path: Path) -> None:
    again = PowerAverages({"a": torch.zeros(5, 6), "b": torch.zeros(10)})
    again.restore(folder, 300)
    for number, parameters in enumerate(trajectory(), start=1):
        if number > 300:
            again.update(parameters)
    file, whole = again.save(tmp_path), folder / f"step-{STEPS:06d}.safetensors"
    assert all(torch.equal(tensor, load_file(whole)[name]) for name, tensor in load_file(file).items())


@pytest.mark.parametrize("kind", ["cut off", "no metadata", "text", "missing", "a pipe", "a huge width"])
def test_a_damaged_snapshot_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    file, good = tmp_path / "step-000300.safetensors", folder / "step-000300.safetensors"
    if kind == "cut off":
        file.write_bytes(good.read_bytes()[:-4])
    elif kind == "no metadata":
        save_file(load_file(good), file)
    elif kind == "text":
        file.write_text("no tensors")
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a huge width":
        facts = {"step": 300, "widths": [10**400]}
        save_file(load_file(good), file, metadata={"power_averages": json.dumps(facts)})
    with pytest.raises(CheckpointError, match=r"step-000300\.safetensors is no snapshot"):
        Snapshot.read(file)
    with pytest.raises(CheckpointError, match=r"is no snapshot|holds no snapshots"):
        list_snapshots(tmp_path)


def test_snapshots_of_two_networks_make_no_average(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "step-000300.safetensors")
    for step, change in ((300, 1), (301, 2)):
        save_snapshot(
            tmp_path, step, {name: tensor.repeat(change, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}
        )
    with pytest.raises(CheckpointError, match=r"step-000301\.safetensors is of another network: the shape of "):
        make_average(list_snapshots(tmp_path), 0.1, 301)


def test_averages_of_another_network_or_width_are_not_gone_on_from(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="of another network"):
        PowerAverages({"a": torch.zeros(5, 6)}).restore(folder, 300)
    with pytest.raises(CheckpointError, match=r"widths \[0\.05, 0\.1\], not \[0\.2\]"):
        PowerAverages({"a": torch.zeros(5, 6), "b": torch.zeros(10)}, widths=[0.2]).restore(folder, 300)


def test_the_command_writes_what_is_sampled_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run whose snapshots are made of its checkpoints here, one a step."""
    (tmp_path / "tiny.yaml").write_text(SIX_STEPS.replace("every: 2", "every: 1"))
    run = tmp_path / "run"
    assert train(["--config", str(tmp_path / "tiny.yaml"), "--output", str(run), "preview.every=0"]) == 0
    assert main(["--run", str(run), "--width", "0.1"]) == 2
    assert "holds no snapshots of averages" in capsys.readouterr().err
    checkpoints = [verify(checkpoint_path(run / "checkpoints", step)) for step in range(1, 7)]
    averages = PowerAverages(checkpoints[0].tensors("model"))
    for checkpoint in checkpoints:
        averages.update(checkpoint.tensors("model"))
        averages.save(run / "averages")
    for arguments, code, words in (
        (["--width", "0.4"], 2, "give one from"),
        (["--width", "0.07", "--step", "9"], 2, "there is no snapshot of step 9; there are those of 1, 2, 3, 4, 5, 6"),
        (["--width", "0.1"], 0, ""),
        (["--width", "0.1", "--step", "3", "--out", str(tmp_path / "third")], 0, ""),
    ):
        assert main(["--run", str(run), *arguments]) == code
        assert words in capsys.readouterr().err
    for folder, step in ((run / "averages" / "width-0.1", 6), (tmp_path / "third", 3)):
        made = verify(checkpoint_path(folder / "checkpoints", step)).tensors("ema")
        snapshot = Snapshot.read(run / "averages" / f"step-{step:06d}.safetensors").tensors(0.1)
        for name, tensor in made.items():
            torch.testing.assert_close(tensor, snapshot[name], rtol=1e-5, atol=1e-6)
    AcceleratorState._reset_state(reset_partial_state=True)
    drawn = ["--seeds", "0-1", "--steps", "2", "--out", str(tmp_path / "drawn")]
    assert sample(["--checkpoint", str(run / "averages" / "width-0.1"), *drawn]) == 0
