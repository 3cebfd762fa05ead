"""What the backward pass makes again is, to the bit, what would have been kept; and it is not kept."""

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from tests import tensors
from tests.tensors import randomized
from unetgn import ResBlock, UNet
from unetgn.nn import Downsample, NormConfig, Upsample, resample
from unetgn.nn.resample import remade, unkept
from unetgn.ops import dispatch
from unetgn.unet import levels

noise = partial(tensors.noise, dtype=torch.float32)
SMALL = {"channels": (16, 32), "depth": 1, "attention_levels": (1,), "norm": {"num_groups": 4}}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def plain(function: Callable[..., Tensor], *inputs: Tensor) -> contextlib.nullcontext[Tensor]:
    return contextlib.nullcontext(function(*inputs))


def network(**options: object) -> UNet:
    return randomized(UNet(**{**SMALL, "resample": {"padding": "end"}, **options}))


def results(unet: UNet, x: Tensor) -> list[Tensor]:
    """Return the output, the gradient of x, and those of all parameters."""
    y = unet(x, torch.tensor([3, 700])).sample
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *unet.parameters()])]


def same_as_plain(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> bool:
    """Compare what `run` gives with what it gives where everything is kept, to the bit."""
    got = run()
    with monkeypatch.context() as patch:
        for module in (levels, resample):
            patch.setattr(module, "remade", plain)
        expected = run()
    return len(got) == len(expected) > 1 and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grade", ["none", "activations", "blocks"])
@pytest.mark.parametrize("options", [{}, {"decoder": {"depth": (4, 3)}, "resblock": {"embedding": "scale_shift"}}])
def test_outputs_and_gradients_are_those_of_a_network_that_keeps_all(options, grade, layout, monkeypatch):
    unet = network(**options).to(memory_format=LAYOUTS[layout])
    unet.set_checkpointing(grade)
    x = noise(2, 3, 8, 6).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    assert same_as_plain(monkeypatch, lambda: results(unet, x))


def kept(run: Callable[[], object]) -> Counter[tuple[int, ...]]:
    """Count the tensors of each shape that are kept for the backward pass, each storage once."""
    shapes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        shapes[storage.data_ptr()] = (tuple(tensor.shape), storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return Counter(shape for shape, _ in shapes.values())


@pytest.mark.parametrize("grade", ["none", "activations", "blocks"])
def test_no_concatenation_is_kept(grade, monkeypatch):
    unet = network(channels=(16, 24), attention_levels=())
    unet.set_checkpointing(grade)
    run = partial(unet, noise(2, 3, 8, 8), 5)
    joined = [(2, 32, 8, 8), (2, 40, 8, 8), (2, 40, 4, 4), (2, 48, 4, 4)]
    norms = 1 if grade == "none" else 0  # the result of a norm, which conv1 reads
    assert [kept(run)[shape] for shape in joined] == [norms] * 4
    monkeypatch.setattr(levels, "remade", plain)
    assert [kept(run)[shape] for shape in joined] == [norms + 1] * 4


@pytest.mark.parametrize("grade", ["none", "activations", "blocks"])
def test_no_concatenation_is_kept_where_norms_return_it_for_the_shortcut(grade, monkeypatch):
    """As on Triton: the shortcut's convolution then reads a view of the concatenation."""
    monkeypatch.setattr(dispatch, "is_triton", lambda name, x: True)
    monkeypatch.setattr(dispatch, "resolve", lambda name, x: dispatch.aten)
    unet = network(channels=(16, 24), attention_levels=())
    unet.set_checkpointing(grade)
    x = noise(2, 3, 8, 8).requires_grad_()
    joined = [(2, 32, 8, 8), (2, 40, 8, 8), (2, 40, 4, 4), (2, 48, 4, 4)]
    assert [kept(lambda: unet(x, 5))[shape] for shape in joined] == [1 if grade == "none" else 0] * 4
    assert same_as_plain(monkeypatch, lambda: results(unet, x))


@pytest.mark.parametrize("layer", [Upsample(4), Downsample(4, padding="end")])
def test_nothing_enlarged_or_padded_is_kept(layer):
    x = noise(2, 4, 6, 6).requires_grad_()
    assert kept(lambda: layer(x)) == Counter([tuple(x.shape), tuple(layer.conv.weight.shape)])


class Readers(nn.Module):
    """Reads x by several layers, as a block does by its norm and its shortcut, and by a third where that is adapted."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = randomized(nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for layer in self.layers:
            with unkept(x):
                total = total + layer(x)
        return total


def parts() -> tuple[Tensor, Tensor]:
    return noise(2, 5, 4, 4).requires_grad_(), noise(2, 3, 4, 4, seed=1).requires_grad_()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_backward_pass_makes_it_once_and_lets_it_go(count):
    made = []

    def function(*inputs: Tensor) -> Tensor:
        result = join(*inputs)
        made.append(weakref.ref(result))
        return result

    with remade(function, *parts()) as x:
        loss = Readers(count)(x).square().sum()
    del x
    for passes in (1, 2):
        assert [one() for one in made] == [None] * passes
        loss.backward(retain_graph=passes == 1)
    assert [one() for one in made] == [None] * 3


def test_gradients_of_gradients_are_those_of_what_is_kept():
    block, results = randomized(ResBlock(8, 4, norm=NormConfig(num_groups=2))), []
    for made in (remade, plain):
        x, skip = parts()
        with made(join, x, skip) as joined:
            y = block(joined)
        inputs = [x, skip, *block.parameters()]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(each.square().sum() for each in first), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradients_of_a_batch_of_losses_are_those_of_what_is_kept():
    layers, results = Readers(), []
    for made in (remade, plain):
        x, skip = parts()
        with made(join, x, skip) as joined:
            y = layers(joined)
        results.append(torch.autograd.grad(y, (x, skip), noise(3, *y.shape), is_grads_batched=True))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("changed", ["an input", "a weight"])
def test_what_is_changed_in_place_before_the_backward_pass_is_refused(changed):
    layers, (x, skip) = Readers(), parts()
    x, skip = x * 1, skip * 1
    with remade(join, x, skip) as joined:
        loss = layers(joined).sum()
    with torch.no_grad():
        (skip if changed == "an input" else layers.layers[0].weight).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* is at version "):
        loss.backward()


def in_place(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        args[0].mul_(2)


def by_another(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0] * 2, *args[1:]


PLACES = {
    "block": lambda block: block,
    "norm": lambda block: block.norm1,
    "shortcut": lambda block: block.conv_shortcut,
}


@pytest.mark.parametrize(
    ("hook", "place"), [(in_place, "block"), (in_place, "norm"), *((by_another, place) for place in PLACES)]
)
def test_a_hook_may_change_or_replace_what_a_part_reads(hook, place, monkeypatch):
    unet, x = network(), noise(2, 3, 8, 8).requires_grad_()
    PLACES[place](unet.up_blocks[0].resnets[0]).register_forward_pre_hook(hook)
    assert same_as_plain(monkeypatch, lambda: results(unet, x))


def test_hooks_of_others_for_saved_tensors_see_the_parts_and_all_the_rest():
    layers, (x, skip), seen = Readers(), parts(), []
    hooks = saved_tensors_hooks(lambda tensor: seen.append(tensor) or [tensor.detach()], lambda packed: packed.pop())
    with hooks, remade(join, x, skip) as joined:
        loss = layers(joined).sum()
    assert [id(tensor) for tensor in seen] == [id(one) for one in (x, skip, *(each.weight for each in layers.layers))]
    loss.backward()
    assert x.grad is not None


def test_gradients_are_the_same_where_saved_tensors_are_offloaded(monkeypatch):
    unet, x = network(), noise(2, 3, 8, 8).requires_grad_()
    expected = results(unet, x)
    with save_on_cpu():
        got = results(unet, x)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_network_may_be_computed_again_as_a_whole(reentrant):
    unet, x = network(), noise(2, 3, 8, 8).requires_grad_()

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        unet.zero_grad()
        run(x).square().sum().backward()
        return [parameter.grad for parameter in unet.parameters()]

    def forward(x: Tensor) -> Tensor:
        return unet(x, 5).sample

    expected = gradients(forward)
    got = gradients(partial(checkpoint, forward, use_reentrant=reentrant))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", [ResBlock, nn.Conv2d, levels.DecoderLevel])
def test_parts_may_be_computed_again_by_others(kind, monkeypatch):
    unet, x = network(), noise(2, 3, 8, 8).requires_grad_()
    unet.up_blocks[0].resnets[0].conv_shortcut = Adapted(unet.up_blocks[0].resnets[0].conv_shortcut)
    expected = results(unet, x)
    apply_activation_checkpointing(unet, check_fn=lambda module: isinstance(module, kind))
    got = results(unet, x)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


class Adapted(nn.Module):
    """Adds to a layer another of the same input, as LoRA does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.beside = randomized(nn.Conv2d(layer.in_channels, layer.out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.beside(x)


def test_nothing_is_left_behind_by_an_operation_that_keeps_its_output():
    gc.disable()
    try:
        with remade(join, *parts()) as joined, unkept(joined):
            y = joined.tanh()
        output = weakref.ref(y)
        del y
        assert output() is None
    finally:
        gc.enable()


def test_mixed_precision_gives_the_same(monkeypatch):
    unet, x = network(), noise(2, 3, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_as_plain(monkeypatch, lambda: results(unet, x))


def is_plain(*inputs: Tensor) -> bool:
    """Return True where nothing is recorded."""
    return type(remade(join, *inputs)) is contextlib.nullcontext


class Subclass(Tensor):
    pass


def test_nothing_is_recorded_where_nothing_is_to_be_gained_or_somebody_else_records():
    x, skip = parts()
    assert not is_plain(x, skip)
    assert is_plain(x.detach(), skip.detach())
    assert is_plain(x.bfloat16(), skip)  # both become float32
    assert is_plain(x.as_subclass(Subclass), skip)
    for context in (torch.no_grad(), torch.inference_mode(), disable_saved_tensors_hooks("none here")):
        with context:
            assert is_plain(x, skip)
    found = []

    def function(x: Tensor) -> Tensor:
        found.append(is_plain(x, x))
        return x.sum()

    grad(function)(x)
    vmap(function)(x[None])
    jvp(function, (x,), (x,))
    torch.jit.trace(function, (x,), check_trace=False)
    assert found == [True] * 4
