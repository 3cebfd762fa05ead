"""Configures group normalization: the rule by which every block of a network finds its number of groups."""

from dataclasses import dataclass

from unetgn.nn.fields import check_at_least, check_kind
from unetgn.nn.norm import Activation, GroupNormAct, GroupNormSiLU

DEFAULT_GROUPS = 32


@dataclass(frozen=True)
class NormConfig:
    """Sets the number of groups, by one of three rules, and eps.

    num_groups = 1 is layer normalization over (C, *spatial) (Ba et al. 2016, arXiv 1607.06450, section 3); group_size =
    1 is instance normalization (Ulyanov et al. 2016, arXiv 1607.08022, section 2). A group of a single value
    (group_size = 1 at 1x1 pixels) comes out as the bias, whatever the value was: what is before it gets no gradient.
    Raises ValueError where two rules contradict each other, or a number is below 1.
    """

    num_groups: int | None = None
    """Sets the same count for every width; None is 32, as in DDPM, ADM and Stable Diffusion."""
    group_size: int | None = None
    """Sets the channels of a group instead (Wu & He 2018, section 4.1)."""
    min_group_size: int | None = None
    """Sets the least number of channels of a group: the count is min(num_groups, C // min_group_size), which is EDM's
    rule with 32 and 4.
    """
    eps: float = 1e-5
    """Is added to the variance."""

    def __post_init__(self) -> None:
        for name in ("min_group_size", "num_groups"):
            value = getattr(self, name)
            if self.group_size is not None and value is not None:
                raise ValueError(
                    f"norm.group_size={self.group_size} and norm.{name}={value} contradict each other: give one of them"
                )
        check_at_least(
            1, {f"norm.{name}": getattr(self, name) for name in ("num_groups", "group_size", "min_group_size")}
        )
        check_at_least(0, {"norm.eps": self.eps})

    def groups(self, channels: int) -> int:
        """Count the groups of `channels`. Raises ValueError, with counts that do, where the rule cannot divide."""
        most = DEFAULT_GROUPS if self.num_groups is None else self.num_groups
        if self.group_size is not None:
            count, rest, rule = channels // self.group_size, channels % self.group_size, f"group_size={self.group_size}"
        elif self.min_group_size is not None:
            count, rule = max(1, min(most, channels // self.min_group_size)), f"min_group_size={self.min_group_size}"
            rest = channels % count
        else:
            count, rest, rule = most, channels % most, f"num_groups={most}"
        if rest or count == 0:
            divisors = [number for number in range(1, channels + 1) if channels % number == 0]
            raise ValueError(
                f"norm.{rule} does not divide {channels} channels; numbers that do: {', '.join(map(str, divisors))}"
            )
        return count

    def build(self, channels: int, *, activation: Activation | None = "silu") -> GroupNormSiLU:
        """Build the normalization for `channels`, fused with "silu" or None; another activation comes after it."""
        if activation in ("silu", None):
            return GroupNormSiLU(self.groups(channels), channels, self.eps, activation=activation)
        return GroupNormAct(self.groups(channels), channels, self.eps, after=activation)


def build_norm(norm: NormConfig | None, channels: int) -> GroupNormSiLU | None:
    """Build the fused normalization without its SiLU, or nothing for None. Raises TypeError for anything else."""
    if norm is None:
        return None
    check_kind("norm", norm, NormConfig)
    return norm.build(channels, activation=None)
