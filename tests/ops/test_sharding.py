"""Shards the operator over two devices that do not exist: what this process, the first of them, has is looked at."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from unetgn import group_norm_silu

OF_CHANNELS = ("weight", "bias")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("parameters", ["", "weight", "weight bias pre_bias scale shift", "bias scale shift maps"])
def test_samples_are_normalized_where_they_lie(draw, mesh, parameters, compiled):
    torch._dynamo.reset()
    call = torch.compile(group_norm_silu, backend="aot_eager", fullgraph=True) if compiled else group_norm_silu
    inputs = draw(0, (4, 6, 3, 2), parameters=parameters)
    # Each process takes its part of what it has itself: no other is there to send it one.
    x, dy = (distribute_tensor(part, mesh, [Shard(0)], src_data_rank=None) for part in (inputs.x, inputs.dy))
    given = {name: part for name, part in inputs.keywords().items() if part is not None}
    placed = {
        name: distribute_tensor(
            part, mesh, [Replicate() if name in OF_CHANNELS else Shard(0)], src_data_rank=None
        ).requires_grad_()
        for name, part in given.items()
    }
    y = call(x.requires_grad_(), 3, **placed)
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(0),)

    own_x = inputs.x[:2].clone().requires_grad_()
    own = {
        name: (part if name in OF_CHANNELS else part[:2]).detach().clone().requires_grad_()
        for name, part in given.items()
    }
    own_y = group_norm_silu(own_x, 3, **own)
    assert torch.equal(y.to_local(), own_y)
    found = torch.autograd.grad(y, [x, *placed.values()], dy)
    expected = torch.autograd.grad(own_y, [own_x, *own.values()], inputs.dy[:2])
    assert all(torch.equal(part.to_local(), wanted) for part, wanted in zip(found, expected, strict=True))
    for name, gradient in zip(("x", *placed), found, strict=True):
        assert gradient.placements == ((Partial(),) if name in OF_CHANNELS else (Shard(0),))


@pytest.mark.parametrize("placement", [Replicate(), Shard(1), Shard(2)], ids=str)
def test_what_is_sharded_otherwise_is_put_together_first(draw, mesh, placement):
    inputs = draw(0, (4, 6, 4, 2))
    x = distribute_tensor(inputs.x, mesh, [placement]).requires_grad_()
    weight = distribute_tensor(torch.ones(6), mesh, [Replicate()]).requires_grad_()
    y = group_norm_silu(x, 3, weight)
    assert y.placements == (Replicate(),)
    assert y.to_local().shape == inputs.x.shape
    y.sum().backward()
    assert x.grad.shape == inputs.x.shape
    assert weight.grad.placements == (Replicate(),)
