"""The learning rate as a function of the step, and the averaged weights."""

import math

import pytest
import torch
from accelerate import Accelerator

from unetgn import UNet
from unetgn.training.objective import Objective, ObjectiveConfig
from unetgn.training.step import EMAConfig, Numbers, TrainConfig, TrainState, learning_rate


def test_the_learning_rate_rises_linearly_then_falls_along_half_a_cosine() -> None:
    config = TrainConfig(steps=100, warmup_steps=20, learning_rate=2.0, learning_rate_schedule="cosine")
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:20] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert rates[20:] == pytest.approx([1 + math.cos(math.pi * (step - 20) / 80) for step in range(20, 100)])
    assert max(rates) == 2.0
    assert 0 < rates[-1] < 1e-3


def test_a_constant_learning_rate_stays_after_warm_up() -> None:
    config = TrainConfig(steps=10, warmup_steps=3, learning_rate=1.0)
    assert [learning_rate(config, step) for step in range(10)] == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)


def test_a_run_shorter_than_its_warm_up_ends_while_it_rises() -> None:
    config = TrainConfig(steps=3, warmup_steps=3, learning_rate=3.0, learning_rate_schedule="cosine")
    assert [learning_rate(config, step) for step in range(3)] == pytest.approx([1.0, 2.0, 3.0])


@pytest.fixture
def state() -> TrainState:
    torch.manual_seed(0)
    unet = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4})
    return TrainState(
        unet,
        Objective(ObjectiveConfig(), None),
        TrainConfig(steps=20, learning_rate=1e-2, gradient_accumulation=2, max_gradient_norm=0.0),
        EMAConfig(decay=0.5),
        Accelerator(cpu=True),
        seed=0,
    )


def batches(count: int, size: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.rand(size, 1, 8, 8, generator=generator),
            "noise": torch.randn(size, 1, 8, 8, generator=generator),
            "label": torch.full((size,), -1),
            "time": torch.rand(size, generator=generator, dtype=torch.float64),
            "drop": torch.rand(size, generator=generator, dtype=torch.float64),
        }
        for _ in range(count)
    ]


def test_the_average_is_the_exponential_one_with_its_warm_up(state: TrainState) -> None:
    """After step n the average moves by 1 - min(decay, (1 + n) / (10 + n)), n counted from 0 after the first."""
    name = state.names()[0]
    average = state.tensors()["model"][name]
    data = batches(16, 4)
    for step in range(8):
        state.run_step(data[2 * step : 2 * step + 2])
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state.tensors()["model"][name]
        assert torch.allclose(state.tensors()["ema"][name], average, atol=1e-6)
    assert not torch.allclose(state.tensors()["ema"][name], state.tensors()["model"][name], atol=1e-6)


def test_averaged_lends_the_average_and_gives_the_weights_back(state: TrainState) -> None:
    for _ in range(4):
        state.run_step(batches(2, 4))
    raw, averaged = state.tensors()["model"], state.tensors()["ema"]
    with state.averaged() as unet:
        assert not unet.training
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in unet.state_dict().items())
    assert all(torch.equal(tensor, raw[name]) for name, tensor in state.unet.state_dict().items())


def test_accumulated_batches_give_the_gradient_of_their_union(state: TrainState) -> None:
    """Two batches of 4 accumulated move the weights as one batch of 8 would, computed here by hand."""
    parts = batches(2, 4)
    union = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    state.unet.train()
    loss = state.objective.losses(state.unet, state.objective.prepare(union)).mean()
    gradients = torch.autograd.grad(loss, list(state.unet.parameters()), allow_unused=True)
    expected = torch.sqrt(sum(g.double().square().sum() for g in gradients if g is not None))
    numbers = state.run_step(parts)
    assert torch.allclose(numbers.loss, loss.detach(), rtol=1e-5)
    assert torch.allclose(numbers.gradient_norm.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight(state: TrainState, poison: float) -> None:
    assert state.run_step(batches(2, 4)).usable()
    before = state.tensors()["model"]
    bad = batches(2, 4)
    bad[1]["image"][2, 0, 3, 3] = poison
    assert not state.run_step(bad).usable()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors()["model"].items())
    assert state.run_step(batches(2, 4)).usable()  # and the optimizer's own state is as it was


def test_a_loss_scale_that_keeps_falling_is_no_step() -> None:
    one, infinite = torch.ones(()), torch.tensor(float("inf"))
    assert Numbers(1, one, infinite, scale=torch.tensor(1024.0)).usable()
    assert not Numbers(1, one, infinite, scale=torch.tensor(2.0**-15)).usable()
    assert not Numbers(1, one, infinite, scale=None).usable()
    assert not Numbers(1, infinite, one, scale=torch.tensor(1024.0)).usable()
