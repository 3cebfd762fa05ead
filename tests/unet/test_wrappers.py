"""What frameworks put around parts of a network: hooks, offloading, recomputation. All of them call a part twice, with
other tensors in the place of those that it was given, or only see what it is given by position."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.fusion.models import CASES
from tests.tensors import noise, randomized
from unetgn import UNet, fuse
from unetgn.unet.levels import DecoderLevel, EncoderLevel, Level, MidLevel

NETWORKS = {
    "plain": {},
    "one level": {"channels": (16,), "attention_levels": (0,)},
    "three levels, two blocks": {"channels": (16, 32, 16), "depth": 2, "attention_levels": (1, 2)},
    "blocks that resample": {"resample": {"kind": "resblock"}, "resblock": {"embedding": "scale_shift"}},
    "a branch of the input": {"encoder": {"residual_input": True}, "resample": {"taps": (1.0, 3.0, 3.0, 1.0)}},
    "more blocks than skip connections": {"decoder": {"depth": (4, 3)}},
    "no middle": {"mid": {"depth": 0}},
    "a level without blocks": {"depth": (1, 0), "decoder": {"depth": (2, 1)}, "attention_levels": (0,)},
    "text, classes, a vector": {
        "num_classes": 3,
        "transformer": {"context_dim": 6},
        "condition": {"vector_dim": 9},
        "time_cond_proj_dim": 4,
    },
}
SIDES = (5, 1)  # at 1 all levels have the same size: a skip connection in a wrong place fits

every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> UNet:
    small = {"channels": (16, 32), "depth": 1, "attention_levels": (1,), "norm": {"num_groups": 4}}
    return randomized(UNet(**{**small, **NETWORKS[name]}))


def inputs(unet: UNet, side: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config, batch = unet.unet_config, 2
    x, context = noise(batch, 3, side, side, dtype=torch.float32), None
    more: dict[str, Any] = {}
    if config.transformer is not None:
        context = noise(batch, 3, 6, seed=1, dtype=torch.float32)
    if config.num_classes:
        more["class_labels"] = torch.tensor([2, 0])
    if config.condition.vector_dim:
        more["added_cond_kwargs"] = {"vector": noise(batch, 9, seed=2, dtype=torch.float32)}
    if config.time_cond_proj_dim:
        more["timestep_cond"] = noise(batch, 4, seed=3, dtype=torch.float32)
    return (x, torch.tensor([3, 700]), context), more


def results(unet: UNet, side: int) -> list[Tensor]:
    """Return the output and the gradient of every parameter that is used."""
    given, more = inputs(unet, side)
    unet.zero_grad()
    y = unet(*given, **more).sample
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in unet.parameters() if p.grad is not None)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors_in(value: object) -> list[Tensor]:
    """List the tensors of nested containers."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def shape_of(value: object) -> object:
    """Describe containers and the identity and version of the tensors in them."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, Mapping):
        return {key: shape_of(part) for key, part in value.items()}
    return [shape_of(part) for part in value] if isinstance(value, (list, tuple)) else repr(value)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, set[str]]]:
    """Collect what modules within `model` do to what they are given."""
    faults: dict[str, set[str]] = {"change an argument": set(), "get a tensor by keyword": set()}
    before: dict[str, list[object]] = {}
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            before.setdefault(name, []).append(shape_of([args, kwargs]))
            if name and tensors_in(kwargs):
                faults["get a tensor by keyword"].add(f"{name} ({type(module).__name__})")

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            if before[name].pop() != shape_of([args, kwargs]):
                faults["change an argument"].add(f"{name} ({type(module).__name__})")

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    yield faults
    for handle in handles:
        handle.remove()


@every_network
@pytest.mark.parametrize("checkpointing", ["none", "activations", "blocks"])
def test_no_part_changes_what_it_is_given_or_is_given_a_tensor_by_keyword(name: str, checkpointing: str) -> None:
    unet = network(name)
    unet.set_checkpointing(checkpointing)
    with watched(unet) as faults:
        results(unet, 8)
    assert faults == {"change an argument": set(), "get a tensor by keyword": set()}


def by_group(unet: UNet, _: Path) -> None:
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


def by_leaf(unet: UNet, _: Path) -> None:
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def over_disk(unet: UNet, folder: Path) -> None:
    places = {name: "disk" if name in ("mid_block", "up_blocks") else "cpu" for name, _ in unet.named_children()}
    dispatch_model(unet, places, main_device="cpu", offload_dir=str(folder))


def recomputing(*kinds: type[nn.Module]) -> Callable[[UNet, Path], None]:
    return lambda unet, _: apply_activation_checkpointing(unet, check_fn=lambda module: isinstance(module, kinds))


def copying(unet: UNet, _: Path) -> None:
    """Give every part copies, as what moves tensors between devices does."""

    def copied(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(part(arg) for arg in args), {key: part(value) for key, value in kwargs.items()}

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, Mapping):
            return {key: part(item) for key, item in value.items()}
        return type(value)([part(item) for item in value]) if isinstance(value, (list, tuple)) else value

    for module in unet.modules():
        module.register_forward_pre_hook(copied, with_kwargs=True)


def sharded(unet: UNet, _: Path) -> None:
    """Shard each level by itself, as FSDP2 does for networks of few and large levels."""
    mesh = init_device_mesh("cpu", (1,))
    for module in unet.modules():
        if isinstance(module, Level) and list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)


WRAPPERS = {
    "group offload by blocks": by_group,
    "group offload by leaves": by_leaf,
    "dispatched over disk": over_disk,
    "decoder levels computed again": recomputing(DecoderLevel),
    "all levels computed again": recomputing(EncoderLevel, MidLevel, DecoderLevel),
    "every part gets copies": copying,
    "FSDP2 by levels": sharded,
}


@pytest.fixture
def alone() -> Iterator[None]:
    """Make a process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Each with every other one of the networks, and each network with every other one of these; all with `-m slow`.
PAIRS = [
    pytest.param(name, wrapper, marks=pytest.mark.slow if (row + column) % 2 else ())
    for row, name in enumerate(NETWORKS)
    for column, wrapper in enumerate(WRAPPERS)
]


@pytest.mark.parametrize(("name", "wrapper"), PAIRS)
def test_a_wrapped_network_is_the_network(
    wrapper: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if WRAPPERS[wrapper] is sharded:
        request.getfixturevalue("alone")
    for side in SIDES:
        plain = network(name)
        wrapped = copy.deepcopy(plain)
        WRAPPERS[wrapper](wrapped, tmp_path / str(side))
        given, more = inputs(plain, side)
        if WRAPPERS[wrapper] is over_disk:  # its weights are there in a forward alone
            with torch.no_grad():
                got, expected = [wrapped(*given, **more).sample], [plain(*given, **more).sample]
        else:
            got, expected = [whole(tensor) for tensor in results(wrapped, side)], results(plain, side)
        torch.testing.assert_close(got, expected)


def test_a_level_gives_the_same_twice() -> None:
    """What computes a level again calls it with the same arguments."""
    level = next(part for part in network("plain").modules() if isinstance(part, DecoderLevel))
    assert isinstance(level, Level)
    skips = tuple(noise(1, 32 if index else 16, 4, 4, seed=index, dtype=torch.float32) for index in range(2))
    arguments = (noise(1, 32, 4, 4, dtype=torch.float32), skips, (8, 8), noise(1, 64, dtype=torch.float32), None)
    assert torch.equal(level(*arguments), level(*arguments))


@pytest.mark.parametrize("name", ["DDPM cifar10", "consistency ImageNet-64", "SD 1.5"])
def test_a_fused_model_hands_on_what_the_original_does(name: str) -> None:
    case = CASES[name]
    model = case.model()
    found = []
    for _ in range(2):
        with watched(model) as faults:
            case.run(model)
        found.append(faults)
        fuse(model)
    assert found[0] == found[1]
