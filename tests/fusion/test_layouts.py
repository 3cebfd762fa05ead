"""Results of a fused model lie in memory as the original's do: seeded noise drawn like them is the same noise."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import unetgn
from tests.fusion.models import monai_model

SHAPES = [
    *((samples, channels, *space) for samples in (1, 2) for channels in (1, 4) for space in [(6,), (3, 5), (2, 3, 4)]),
    *((1, 4, 6, 1), (1, 4, 1, 6), (2, 4, 6, 1), (1, 4, 1, 1), (2, 4, 1, 1), (1, 4, 1), (1, 4, 1, 3, 1)),
]


def layouts(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield tensors of a shape: contiguous, channels_last, as attention hands them on, permuted, cut out, repeated."""
    samples, channels, *space = shape
    positions = torch.Size(space).numel()
    yield torch.randn(shape)
    yield torch.randn(samples, *space, channels).movedim(-1, 1)
    yield torch.randn(samples, positions, channels).transpose(1, 2).unflatten(2, space)
    yield torch.randn(samples, *space[::-1], channels).permute(0, *range(len(shape) - 1, 0, -1))
    yield torch.randn(channels, samples, *space).transpose(0, 1)
    yield torch.randn(samples, 2 * channels, *space)[:, ::2]
    yield torch.randn(samples, *space, 2 * channels).movedim(-1, 1)[:, ::2]
    yield torch.randn(samples, channels, *(size + 1 for size in space))[(..., *(slice(size) for size in space))]
    yield torch.randn(1, channels, *space).expand(shape)
    if len(space) > 1:
        last = torch.channels_last if len(space) == 2 else torch.channels_last_3d
        yield torch.empty(shape, memory_format=last).normal_()


class Plain(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(1, channels), nn.SiLU()

    def forward(self, x, emb):
        return self.act(self.norm(x))


class Addition(Plain):
    def forward(self, x, emb):
        x = x + emb
        x = self.norm(x)
        x = self.act(x)
        return x


class ScaleShift(Plain):
    def forward(self, x, emb):
        x = self.norm(x)
        x = x * (1 + emb) + emb
        x = self.act(x)
        return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [Plain, Addition, ScaleShift])
def test_the_strides_of_a_result_are_those_of_the_original(shape, kind, calls):
    torch.manual_seed(0)
    block, emb = kind(shape[1]), torch.randn(shape[0], shape[1], *(1 for _ in shape[2:]))
    unetgn.fuse.read(kind)
    for x in layouts(shape):
        unetgn.unfuse(block)
        original = block(x, emb)
        unetgn.fuse(block)
        fused = block(x, emb)
        assert fused.stride() == original.stride(), f"strides of x: {x.stride()}"
        torch.testing.assert_close(fused, original)
    assert calls


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("attention_levels", [(False, False), (False, True)])  # in the middle there always is one
@pytest.mark.parametrize("network", ["AutoencoderKL", "SPADEAutoencoderKL"])
def test_an_autoencoder_with_attention_draws_the_noise_of_the_original(network, attention_levels, samples):
    spade = {"label_nc": 2, "spade_intermediate_channels": 8} if network.startswith("SPADE") else {}
    settings = {"channels": (8, 16), "num_res_blocks": (1, 1), "norm_num_groups": 4}
    settings |= {"attention_levels": attention_levels}
    torch.manual_seed(0)
    shared = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "latent_channels": 3}
    model = monai_model(network, **shared, **settings, **spade)().double().eval()
    inputs = [torch.randn(samples, channels, 16, 16, dtype=torch.float64) for channels in ((1, 2) if spade else (1,))]

    def outputs() -> list[Tensor]:
        torch.manual_seed(1)  # its latents are drawn like the standard deviation, in the order of the memory
        with torch.no_grad():
            return list(model(*inputs))

    original = outputs()
    assert unetgn.fuse(model).fused
    for fused, plain in zip(outputs(), original, strict=True):
        assert fused.stride() == plain.stride()
        assert (fused - plain).norm() <= 1e-10 * plain.norm()
