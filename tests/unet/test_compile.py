"""Puts the whole U-Net through torch.compile and torch.export."""

import pytest
import torch
import torch._dynamo.testing

from tests.tensors import randomized
from tests.unet.test_model import noise
from unetgn import UNet

# Every kind of module once or twice: what takes time here are the blocks, not their widths.
FEW = {
    "channels": (32, 64),
    "depth": (0, 1),
    "attention_levels": (1,),
    "mid": {"depth": 1, "attention": False},
    "decoder": {"attention_blocks": ((), ())},
}
LABELS = torch.tensor([1, 10])


@pytest.fixture
def unet():
    torch._dynamo.reset()
    yield randomized(UNet(**FEW, num_classes=10))
    torch._dynamo.reset()


@pytest.mark.parametrize("grade", ["none", "activations", "blocks"])
def test_it_compiles_as_one_graph_once_for_all_timesteps(unet, grade):
    x = noise(2, 3, 8, 8)
    unet.set_checkpointing(grade)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    for timestep in (0, 17, 999):
        t = torch.tensor([timestep, timestep + 1])
        output = compiled(x, t, class_labels=LABELS).sample
        torch.testing.assert_close(output, unet(x, t, class_labels=LABELS).sample)
    assert counter.frame_count == 1
    gradients = torch.autograd.grad(output.square().sum(), list(unet.parameters()))
    expected = torch.autograd.grad(unet(x, t, class_labels=LABELS).sample.square().sum(), list(unet.parameters()))
    rounding = 1e-7 * max(float(other.abs().max()) for other in expected)  # all that the bias of attention's keys has
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + rounding)


def test_its_blocks_compile_alone_as_those_of_diffusers_models_do():
    unet = randomized(UNet(channels=(32, 64), depth=1, attention_levels=(1,)))
    x = noise(2, 3, 8, 8)
    expected = unet(x, 3).sample
    counter = torch._dynamo.testing.CompileCounter()
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(unet(x, 3).sample, expected)
    assert counter.frame_count > 0


@pytest.mark.slow
def test_it_compiles_to_native_code(unet):
    x, t = noise(2, 3, 8, 8), torch.tensor([5, 6])
    output = torch.compile(unet, fullgraph=True)(x, t, class_labels=LABELS).sample
    expected = unet(x, t, class_labels=LABELS).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    gradient, wanted = (torch.autograd.grad(out.square().sum(), unet.conv_in.weight)[0] for out in (output, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_transformer_with_a_vector_compiles_too():
    unet = randomized(
        UNet(**FEW, transformer={"context_dim": 6}, condition={"vector_dim": 4 + 2 * 8}, addition_time_embed_dim=8)
    )
    x, t, context = noise(2, 3, 8, 8), torch.tensor([5, 6]), noise(2, 5, 6)
    added = {"text_embeds": noise(2, 4), "time_ids": torch.tensor([[8.0, 8.0], [16.0, 8.0]])}
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = unet(x, t, context, added_cond_kwargs=added).sample
        torch.testing.assert_close(compiled(x, t, context, added_cond_kwargs=added).sample, expected)


def test_it_exports_for_any_batch_size_and_the_program_gives_the_same_numbers(unet):
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = {"sample": batch, "timestep": batch, "class_labels": batch}
    given = noise(2, 3, 8, 8), torch.tensor([5, 6])
    program = torch.export.export(unet.eval(), given, {"class_labels": LABELS}, dynamic_shapes=shapes)
    x, t, labels = noise(5, 3, 8, 8, seed=9), torch.arange(5) + 100, torch.tensor([0, 3, 10, 9, 1])
    with torch.no_grad():
        expected = unet(x, t, class_labels=labels).sample
        torch.testing.assert_close(program.module()(x, t, class_labels=labels).sample, expected)


@pytest.mark.parametrize("timesteps", [(7, 8, 9), (0.25, 0.5, 0.75)])
def test_it_compiles_with_numbers_for_the_timestep(timesteps):
    torch._dynamo.reset()
    unet = randomized(UNet(channels=(32,), depth=0, attention_levels=(), mid={"depth": 0}, num_classes=10))
    x = noise(2, 3, 8, 8)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        for timestep in timesteps:
            expected = unet(x, timestep, class_labels=LABELS).sample
            torch.testing.assert_close(compiled(x, timestep, class_labels=LABELS).sample, expected)


def test_a_batch_that_is_as_large_as_another_size_compiles_with_symbolic_sizes():
    """A compiler that makes sizes symbolic may know one of two equal sizes by its number and the other by its name."""
    torch._dynamo.reset()
    unet = randomized(UNet(channels=(32,), depth=0, attention_levels=(), mid={"depth": 0}, num_classes=3))
    x, t, labels = noise(3, 3, 8, 8), torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2])
    compiled = torch.compile(unet, backend="eager", fullgraph=True, dynamic=True)
    rows = torch.nn.functional.one_hot(labels, 3).float()
    with torch.no_grad():
        for given in (labels, rows):
            expected = unet(x, t, class_labels=given).sample
            torch.testing.assert_close(compiled(x, t, class_labels=given).sample, expected)
