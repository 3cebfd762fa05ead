"""Arguments that nobody means: each is refused, at once, by the function and by the registered operator."""

import random

import pytest
import torch

from unetgn.ops import group_norm_silu
from unetgn.ops.checks import check_num_groups


@pytest.mark.parametrize("channels", [10**9, 10**9 + 7, 2**40, 10**12 + 39, 2**62])
@pytest.mark.parametrize("groups", [0, -1, 7, 10**9 + 1, 10**30])
def test_any_number_of_channels_is_refused_at_once(groups: int, channels: int) -> None:
    """A loop over all channels would take minutes to years."""
    if channels % max(1, groups) == 0 and groups > 0:
        pytest.skip("these divide")
    with pytest.raises(ValueError, match="the nearest that would do"):
        check_num_groups(groups, channels)
    with pytest.raises(ValueError, match="the nearest that would do"):
        group_norm_silu(torch.zeros(1, 1).expand(1, channels), groups)


def test_the_counts_that_are_named_are_the_nearest_divisors() -> None:
    draw = random.Random(0)
    for _ in range(200):
        channels, groups = draw.randrange(1, 2000), draw.randrange(-3, 2500)
        divisors = [count for count in range(1, channels + 1) if channels % count == 0]
        if groups in divisors:
            continue
        below, above = [d for d in divisors if d < groups], [d for d in divisors if d > groups]
        nearest = " or ".join(str(count) for count in (*below[-1:], *above[:1]))
        with pytest.raises(ValueError, match=rf"the nearest that would do: {nearest} \("):
            check_num_groups(groups, channels)


@pytest.mark.parametrize("eps", [10**400, float("inf"), float("nan"), -1e-300, -1])
def test_an_eps_beyond_what_a_float_holds_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be finite and 0 or more"):
        group_norm_silu(torch.zeros(1, 4), 2, eps=eps)


WRONG = {
    "no groups": {"num_groups": 0},
    "groups that do not divide": {"num_groups": 3},
    "a weight of one": {"weight": torch.ones(1)},
    "a bias of another length": {"bias": torch.ones(5)},
    "a scale of one sample": {"scale": torch.ones(1, 4)},
    "integers": {"x": torch.ones(2, 4, 3, dtype=torch.int64)},
    "booleans": {"x": torch.ones(2, 4, 3, dtype=torch.bool)},
    "float8": {"x": torch.ones(2, 4, 3).to(torch.float8_e4m3fn)},
    "no channels": {"x": torch.ones(2, 0, 3)},
    "one axis": {"x": torch.ones(4)},
    "a negative eps": {"eps": -1.0},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_registered_operator_checks_its_arguments_as_the_function_does(wrong: str, device: str) -> None:
    given = {"x": torch.ones(2, 4, 3), "num_groups": 2, "weight": None, "bias": None, "eps": 1e-5} | WRONG[wrong]
    values = [v.to(device) if isinstance(v, torch.Tensor) else v for v in given.values() if not isinstance(v, bool)]
    scale = given["scale"].to(device) if "scale" in given else None
    with pytest.raises((ValueError, TypeError)) as of_the_function:
        group_norm_silu(*values[:5], scale=scale)
    with pytest.raises((ValueError, TypeError)) as of_the_operator:
        torch.ops.unetgn.group_norm_silu(*values[:5], True, None, scale, None, "auto")
    assert str(of_the_operator.value) == str(of_the_function.value)
