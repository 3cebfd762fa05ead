"""How many groups a normalization has: the configuration that all blocks share."""

from dataclasses import dataclass

from unetgn.nn.norm import GroupNormSiLU


@dataclass(frozen=True)
class NormConfig:
    """Group normalization of a block or a network: the number of groups by one of three rules, and eps.

    num_groups = 1 is layer normalization over (C, *spatial), group_size = 1 is instance normalization.
    Raises ValueError where group_size and min_group_size are both given, or a number is below 1.
    """

    num_groups: int = 32
    """The same count for every width; 32 in DDPM, ADM and Stable Diffusion."""
    group_size: int | None = None
    """Channels per group instead (Wu & He 2018, section 4.1)."""
    min_group_size: int | None = None
    """At most `num_groups` groups, of at least that many channels: min(num_groups, C // min_group_size), which is EDM's
    rule with 32 and 4.
    """
    eps: float = 1e-5
    """Added to the variance."""

    def __post_init__(self) -> None:
        if self.group_size is not None and self.min_group_size is not None:
            raise ValueError(
                f"norm.group_size={self.group_size} and norm.min_group_size={self.min_group_size} contradict each "
                "other: give one of them"
            )
        for name in ("num_groups", "group_size", "min_group_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"norm.{name} must be at least 1, got {value}")

    def groups(self, channels: int) -> int:
        """The number of groups for `channels`. Raises ValueError, with counts that would do, where it cannot divide."""
        if self.group_size is not None:
            count, rest, rule = channels // self.group_size, channels % self.group_size, "norm.group_size"
        elif self.min_group_size is not None:
            count, rule = max(1, min(self.num_groups, channels // self.min_group_size)), "norm.min_group_size"
            rest = channels % count
        else:
            count, rest, rule = self.num_groups, channels % self.num_groups, "norm.num_groups"
        if rest or count == 0:
            divisors = [number for number in range(1, channels + 1) if channels % number == 0]
            raise ValueError(
                f"{rule}={getattr(self, rule.removeprefix('norm.'))} does not divide {channels} channels; "
                f"numbers that do: {', '.join(map(str, divisors))}"
            )
        return count

    def build(self, channels: int, *, activation: str | None = "silu") -> GroupNormSiLU:
        """The fused normalization for `channels`; activation None leaves the SiLU out."""
        return GroupNormSiLU(self.groups(channels), channels, self.eps, activation=activation)
