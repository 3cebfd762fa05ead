"""Checks that GroupNormSiLU is a GroupNorm like any other to checkpoints, copies, autocast and DDP."""

import copy
import faulthandler
import inspect
import io
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import unetgn
from tests.tensors import noise
from unetgn import GroupNormSiLU, largest_group_count

random = partial(noise, dtype=torch.float32)


def test_it_is_a_group_norm_with_the_same_state_dict():
    norm = GroupNormSiLU(4, 8)
    assert isinstance(norm, nn.GroupNorm)
    assert {k: v.shape for k, v in norm.state_dict().items()} == {
        k: v.shape for k, v in nn.GroupNorm(4, 8).state_dict().items()
    }


def test_weights_of_a_group_norm_give_group_norm_and_silu():
    theirs = nn.GroupNorm(4, 8, eps=1e-3)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    norm = GroupNormSiLU(4, 8, eps=1e-3)
    norm.load_state_dict(theirs.state_dict())
    x = random(2, 8, 5, 5)
    torch.testing.assert_close(norm(x), F.silu(theirs(x)))


def test_without_affine_it_has_no_parameters():
    norm = GroupNormSiLU(4, 8, affine=False)
    assert not list(norm.parameters())
    x = random(2, 8, 5)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 4)))


def test_without_activation_it_is_group_norm():
    x = random(2, 8, 5, 5)
    torch.testing.assert_close(GroupNormSiLU(4, 8, activation=None)(x), nn.GroupNorm(4, 8)(x))


def test_pre_bias_scale_and_shift_are_passed_on():
    norm = GroupNormSiLU(4, 8)
    x = random(2, 8, 5, 5)
    extras = {name: random(2, 8, seed=seed) for seed, name in enumerate(("pre_bias", "scale", "shift"), 1)}
    expected = unetgn.group_norm_silu(x, 4, norm.weight, norm.bias, norm.eps, **extras)
    assert torch.equal(norm(x, **extras), expected)


def test_training_and_evaluation_give_the_same():
    norm = GroupNormSiLU(4, 8)
    x = random(2, 8, 5, 5)
    assert torch.equal(norm.train()(x), norm.eval()(x))


def test_device_and_dtype_are_those_asked_for():
    norm = GroupNormSiLU(4, 8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in norm.parameters()} == {("meta", torch.bfloat16)}


def test_its_arguments_are_those_of_group_norm_in_their_order():
    ours, torchs = (
        list(inspect.signature(kind.__init__).parameters.values()) for kind in (GroupNormSiLU, nn.GroupNorm)
    )
    positional = [parameter.name for parameter in torchs if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert [parameter.name for parameter in ours][: len(positional)] == positional
    assert {parameter.name for parameter in torchs} <= {parameter.name for parameter in ours}
    assert {(p.device.type, p.dtype) for p in GroupNormSiLU(4, 8, 1e-5, True, "meta", torch.float64).parameters()} == {
        ("meta", torch.float64)
    }


@pytest.mark.parametrize("affine", [True, False])
def test_without_a_bias_it_has_a_weight_alone(affine):
    norm = GroupNormSiLU(4, 8, affine=affine, bias=False)
    assert [name for name, _ in norm.named_parameters()] == (["weight"] if affine else [])
    x = random(2, 8, 5, 5)
    if affine:
        nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 4, norm.weight, None)))
    assert torch.equal(copy.deepcopy(norm)(x), norm(x))


def test_a_group_count_that_does_not_divide_is_an_error_with_the_nearest_that_would():
    with pytest.raises(ValueError, match=r"num_groups=32 for 100 channels; the nearest that would do: 25 or 50"):
        GroupNormSiLU(32, 100)


def test_an_unknown_activation_is_an_error_at_construction():
    with pytest.raises(ValueError, match="'silu' or None, got 'gelu'"):
        GroupNormSiLU(4, 8, activation="gelu")


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "state_dict"])
def test_a_copy_gives_the_same_values(way):
    norm = GroupNormSiLU(4, 8, eps=1e-3)
    nn.init.normal_(norm.weight)
    if way == "deepcopy":
        other = copy.deepcopy(norm)
    elif way == "torch.save":
        torch.save(norm, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = GroupNormSiLU(4, 8, eps=1e-3)
        other.load_state_dict(norm.state_dict())
    x = random(2, 8, 5, 5)
    assert torch.equal(other(x), norm(x))
    assert other.weight is not norm.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_the_output_keeps_the_dtype_of_the_input(dtype):
    norm = GroupNormSiLU(4, 8)
    x = random(2, 8, 5, 5).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
        compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)(x)
    assert y.dtype == compiled.dtype == dtype
    torch.testing.assert_close(y, norm(x), rtol=0, atol=0)
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_cuda_autocast_the_output_keeps_the_dtype_of_the_input(dtype):
    norm = GroupNormSiLU(4, 8, device="cuda")
    x = random(2, 8, 5, 5).to("cuda", dtype)
    with torch.autocast("cuda", dtype=dtype):
        assert norm(x).dtype == dtype


def test_it_trains_under_ddp(tmp_path):
    """Two processes, a sample each: the gradients are those of both samples in one process."""
    processes = torch.multiprocessing.start_processes(
        _train_a_step, args=(2, str(tmp_path / "store")), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 240
    try:
        while not processes.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, "a process did not even begin; where the others are stands in stderr"
    finally:
        for process in processes.processes:
            process.kill()


def _train_a_step(rank, world_size, store):
    faulthandler.dump_traceback_later(180, exit=True)  # a process that hangs says where, and fails
    patience = timedelta(seconds=120)  # with the other one; PyTorch's own is half an hour
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=patience)
    norm = GroupNormSiLU(4, 8)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(norm))
    x = random(world_size, 8, 5, 5)
    parallel(x[rank : rank + 1]).square().sum().backward()
    norm(x).square().sum().div(world_size).backward()
    for got, want in zip(parallel.module.parameters(), norm.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def test_the_largest_group_count_divides_and_stays_below():
    for channels in range(1, 200):
        for at_most in (1, 8, 32):
            count = largest_group_count(channels, at_most)
            assert channels % count == 0
            assert not [c for c in range(count + 1, at_most + 1) if channels % c == 0]
            assert 1 <= count <= at_most
    assert largest_group_count(150) == 30


@pytest.mark.parametrize("arguments", [(0,), (8, 0)])
def test_the_largest_group_count_of_nothing_is_an_error(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        largest_group_count(*arguments)
