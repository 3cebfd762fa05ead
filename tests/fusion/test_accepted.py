"""A fused forward accepts what the original accepts, and refuses what it refuses, whatever it is handed."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unetgn
from tests import tensors
from tests.fusion.sources import maker

ADDED = "h = self.conv(x)\nh = h + a\nh = self.norm(h)\nh = self.act(h)\nreturn h"
IN_A_BRANCH = "h = self.conv(x)\nif b is not False:\n  h = h + a\nh = self.act(self.norm(h))\nreturn h"
SCALED = "h = self.norm(x)\nh = h * (1 + a) + b\nh = self.act(h)\nreturn h"
FORMS = {
    "sum": ADDED,
    "sum in a branch": IN_A_BRANCH,
    "scale-shift": SCALED,
    "scale-shift the other way round": SCALED.replace("h * (1 + a) + b", "b + (a + 1) * h"),
    "scale-shift in an expression": "return F.silu(self.norm(x) * (a + 1) + b)",
    "scale-shift in a branch": SCALED.replace("h = h * (1 + a) + b", "if a is not False:\n  h = h * (1 + a) + b"),
    "addcmul": "return F.silu(torch.addcmul(a, self.norm(x), 1 + b))",
    "switch that is missing": "return F.silu(self.norm(x), inplace=self.missing)",
    "plain": "return self.act(self.norm(x))",
    "written out": "h = self.norm(x)\nreturn h * torch.sigmoid(h)",
    "laid out between": "h = self.norm(x)\nh = h.flatten(1)\nh = self.act(h)\nreturn h",
}
GIVEN = {
    "none": None,
    "a number": 2,
    "a truth value": True,
    "text": "2",
    "a list": [1.0, 2.0, 3.0, 4.0],
    "an array": numpy.ones((2, 4, 1, 1)),
    "a scalar tensor": torch.tensor(0.5),
    "a row": torch.ones(1, 4, 1, 1),
    "rows": tensors.noise(2, 4, 1, 1, dtype=torch.float32),
    "rows of more samples": torch.ones(3, 4, 1, 1),
    "too many channels": torch.ones(2, 6, 1, 1),
    "a column": torch.ones(2, 1, 1, 1),
    "without spatial axes": torch.ones(2, 4),
    "over space": tensors.noise(2, 4, 3, 3, dtype=torch.float32),
    "one axis more": torch.ones(1, 2, 4, 3, 3),
    "whole numbers": torch.ones(2, 4, 1, 1, dtype=torch.int64),
    "halves": torch.ones(2, 4, 1, 1, dtype=torch.float16),
    "doubles": torch.ones(2, 4, 1, 1, dtype=torch.float64),
    "complex numbers": torch.ones(2, 4, 1, 1, dtype=torch.complex64),
}
IMAGES = {
    "none": None,
    "no batch": tensors.noise(4, 3, 3, dtype=torch.float32),
    "one image": tensors.noise(1, 4, 3, 3, dtype=torch.float32),
    "images": tensors.noise(2, 4, 3, 3, dtype=torch.float32),
    "an empty batch": torch.ones(0, 4, 3, 3),
    "no pixels": torch.ones(2, 4, 0, 3),
    "one pixel": torch.ones(1, 4, 1, 1),
    "a value a group": torch.ones(1, 2, 1, 1),
    "rows": tensors.noise(2, 4, dtype=torch.float32),
    "a row": tensors.noise(4, dtype=torch.float32),
    "volumes": tensors.noise(2, 4, 3, 3, 3, dtype=torch.float32),
    "another number of channels": torch.ones(2, 6, 3, 3),
    "channels that make no groups": torch.ones(2, 5, 3, 3),
    "whole numbers": torch.ones(2, 4, 3, 3, dtype=torch.int64),
    "doubles": torch.ones(2, 4, 3, 3, dtype=torch.float64),
    "halves": torch.ones(2, 4, 3, 3, dtype=torch.float16),
    "brain floats": torch.ones(2, 4, 3, 3, dtype=torch.bfloat16),
    "complex numbers": torch.ones(2, 4, 3, 3, dtype=torch.complex64),
}


class Casting(nn.GroupNorm):
    """Computes in float32, as guided-diffusion's norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).type(x.dtype)


class CastingParameters(nn.Module):
    """Casts its parameters, as EDM's norm."""

    def __init__(self, num_groups: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Calling(CastingParameters):
    """Casts nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Block(nn.Module):
    def __init__(self, *, affine: bool = True, norm: Callable[..., nn.Module] = nn.GroupNorm) -> None:
        super().__init__()
        self.norm, self.act, self.conv = norm(2, 4, affine=affine), nn.SiLU(), nn.Conv2d(4, 4, 1)
        if affine:
            nn.init.normal_(self.norm.weight)  # type: ignore[arg-type]


def outcome(block: nn.Module, *given: Any) -> torch.Tensor | None:
    """Return what a block computes, or None where it raises."""
    try:
        result: torch.Tensor = block(*(value.clone() if isinstance(value, torch.Tensor) else value for value in given))
    except Exception:  # whichever: what is asked is whether
        return None
    return result


def check(block: nn.Module, fused: nn.Module, *given: Any) -> None:
    """Compare outcomes: both raise, or both give the same values of the same dtype."""
    expected, got = outcome(block, *given), outcome(fused, *given)
    assert (got is None) == (expected is None), given
    if expected is not None and got is not None:
        assert got.dtype == expected.dtype
        tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64, torch.complex64) else 2e-2
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture
def pair(tmp_path):
    """Return the function that makes a block with a forward, and a fused copy of it."""
    make = maker(tmp_path)

    def made(body: str, **options: Any) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        block = make(Block, body, "x, a=None, b=0.0")(**options)
        fused = copy.deepcopy(block)
        assert len(unetgn.fuse(fused).fused) == 1
        return block, fused

    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_added_scaled_by_or_shifted_by_is_refused_where_the_original_refuses_it(form, pair):
    block, fused = pair(FORMS[form])
    x = IMAGES["images"]
    for value in GIVEN.values():
        check(block, fused, x, value, GIVEN["rows"])
        check(block, fused, x, GIVEN["rows"], value)
        check(block, fused, IMAGES["one image"], value, GIVEN["a row"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", ["plain", "written out", "laid out between", "scale-shift"])
def test_what_is_normalized_is_refused_where_the_original_refuses_it(form, affine, pair):
    block, fused = pair(FORMS[form], affine=affine)
    for x in IMAGES.values():
        for dtype in (torch.float32, torch.bfloat16):
            check(block.to(dtype), fused.to(dtype), x, 0.5, 0.25)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["plain", "sum", "scale-shift"])
@pytest.mark.parametrize("norm", [Casting, CastingParameters, Calling])
def test_a_norm_that_casts_or_does_not_is_handed_no_dtype_that_it_refuses(norm, form, pair):
    block, fused = pair(FORMS[form], norm=norm)
    for name, dtype in itertools.product(IMAGES, (torch.float32, torch.float64, torch.bfloat16)):
        check(block.to(dtype), fused.to(dtype), IMAGES[name], GIVEN["rows"], 0.25)
        block.conv.float(), fused.conv.float()  # type: ignore[operator]
        check(block, fused, IMAGES[name], GIVEN["doubles"], 0.25)
        check(block, fused, IMAGES[name], GIVEN["whole numbers"], 0.25)
