"""Captures steps of the U-Net: torch.compile(mode="reduce-overhead"), and a whole training step as one CUDA graph.

A CPU shows what a capture needs: that no part of a step asks for a number of a tensor. A GPU shows the rest.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tensors import randomized
from tests.unet.test_model import noise
from unetgn import UNet

SMALL = {"channels": (16, 32), "depth": 1, "attention_levels": (1,), "num_classes": 3, "norm": {"num_groups": 4}}
NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")


class Asked(TorchDispatchMode):
    """Lists what would make the host wait for the device: tensors read as numbers, sizes that values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def batch(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Draw noisy images, timesteps and labels."""
    return noise(2, 3, 8, 8).to(device), torch.tensor([5, 600], device=device), torch.tensor([0, 2], device=device)


def training_step(unet: UNet, x: Tensor, timesteps: Tensor, labels: Tensor) -> tuple[Callable[[], None], Tensor]:
    """Return a whole step, and where it leaves its loss."""
    capturable = x.device.type == "cuda"
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, capturable=capturable)
    loss = torch.zeros((), device=x.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        error = unet(x, timesteps, class_labels=labels).sample.square().mean()
        error.backward()
        optimizer.step()
        loss.copy_(error.detach())

    return step, loss


@pytest.mark.parametrize("grade", ["none", "activations", "blocks"])
def test_a_step_of_forward_and_backward_asks_the_device_for_no_number(grade):
    unet = randomized(UNet(**SMALL)).train()
    unet.set_checkpointing(grade)
    x, timesteps, labels = batch()
    with Asked() as asked:
        unet(x, timesteps, class_labels=labels).sample.square().mean().backward()
    assert asked.found == []


def test_a_question_is_seen():
    with Asked() as asked:
        if torch.ones(()) > 0:
            torch.ones(3).nonzero()
    assert set(asked.found) & {"_local_scalar_dense", "is_nonzero"}
    assert "nonzero" in asked.found


@pytest.mark.slow
def test_reduce_overhead_compiles_on_a_cpu_too_and_computes_the_same():
    unet = randomized(UNet(**SMALL)).train()
    x, timesteps, labels = batch()
    expected = unet(x, timesteps, class_labels=labels).sample
    wanted = torch.autograd.grad(expected.square().sum(), unet.conv_in.weight)[0]
    output = torch.compile(unet, mode="reduce-overhead", fullgraph=True)(x, timesteps, class_labels=labels).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.autograd.grad(output.square().sum(), unet.conv_in.weight)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.gpu
@NEEDS_A_GPU
def test_reduce_overhead_replays_on_new_inputs():
    unet = randomized(UNet(**SMALL)).cuda().train()
    x, timesteps, labels = batch("cuda")
    compiled = torch.compile(unet, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        x.copy_(noise(2, 3, 8, 8, seed=seed))
        output = compiled(x, timesteps, class_labels=labels).sample
        expected = unet(x, timesteps, class_labels=labels).sample
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        gradients = [torch.autograd.grad(of.square().sum(), unet.conv_in.weight)[0] for of in (output, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3 * float(gradients[1].abs().max()))


@pytest.mark.gpu
@NEEDS_A_GPU
def test_a_captured_training_step_is_the_step():
    """Weights after replays on new batches are those of as many plain steps."""
    plain, captured = (randomized(UNet(**SMALL)).cuda().train() for _ in range(2))
    captured.load_state_dict(copy.deepcopy(plain.state_dict()))
    inputs = {id(unet): batch("cuda") for unet in (plain, captured)}
    steps = {id(unet): training_step(unet, *inputs[id(unet)]) for unet in (plain, captured)}
    step, loss = steps[id(captured)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        steps[id(plain)][0]()
    for seed in range(3):
        for unet, run in ((plain, steps[id(plain)][0]), (captured, graph.replay)):
            x, timesteps, _ = inputs[id(unet)]
            x.copy_(noise(2, 3, 8, 8, seed=seed))
            timesteps.fill_(100 * seed)
            run()
        torch.testing.assert_close(loss, steps[id(plain)][1], rtol=1e-4, atol=1e-5)
    for one, other in zip(captured.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
