"""Embeds what a network is told beside the image: noise level, class, augmentation and vectors."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.fields import check_at_least, check_choice, check_positive
from unetgn.nn.norm import ACTIVATIONS, Activation, activate
from unetgn.ops.dispatch import has_values

MAX_PERIOD = 10_000


@dataclass(frozen=True)
class TimeConfig:
    """Configures the embedding of the timestep, or of the noise level."""

    features: Literal["sinusoidal", "fourier"] = "sinusoidal"
    """Chooses "sinusoidal" features, or "fourier" (random frequencies, kept in the checkpoint)."""
    order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    """Says which half comes first."""
    frequency_shift: float = 0.0
    """Shifts the exponent, i / (half - shift): 0, or 1 where the last frequency is to be 1/10000 itself (DDPM)."""
    frequencies: Literal["exp", "power"] = "exp"
    """Computes them by "exp" of a multiple, or as a "power" (EDM's code): equal in mathematics, 3e-5 of a radian apart
    in float32 near t = 950.
    """
    fourier_scale: float = 16.0
    """Sets the standard deviation of the random frequencies of "fourier"; above 0."""
    width: int | None = None
    """Sets the width of the features; None is the first level's."""
    embedding_width: int | None = None
    """Sets the width after the MLP; None is four times `width`."""
    activation: Activation = "silu"
    """Stands between the layers of the MLP."""
    post_activation: Activation | None = None
    """Follows the MLP; None is none."""

    def __post_init__(self) -> None:
        check_choice("time.features", self.features, ("sinusoidal", "fourier"))
        check_choice("time.order", self.order, ("cos_sin", "sin_cos"))
        check_choice("time.frequencies", self.frequencies, ("exp", "power"))
        check_choice("time.activation", self.activation, ACTIVATIONS)
        check_choice("time.post_activation", self.post_activation, (*ACTIVATIONS, None))
        check_positive("time.fourier_scale", self.fourier_scale)
        if not math.isfinite(self.frequency_shift):
            raise ValueError(f"time.frequency_shift must be a finite number, got {self.frequency_shift}")
        check_at_least(1, {"time.width": self.width, "time.embedding_width": self.embedding_width})
        if self.features == "sinusoidal" and self.fourier_scale != type(self).fourier_scale:
            raise ValueError(f"time.fourier_scale={self.fourier_scale} needs time.features='fourier'")


def feature_dtype(network_dtype: torch.dtype) -> torch.dtype:
    """Return the precision of time features: float64 in a float64 network, else float32."""
    return torch.float64 if network_dtype == torch.float64 else torch.float32


class SinusoidalFeatures(nn.Module):
    """Computes cos and sin of timestep * 10000 ** (-i / (half - shift)), for i = 0 .. half - 1, half = width // 2.

    Shapes: timesteps (N,) of any dtype -> (N, width) in `dtype`; an odd width ends in a zero.
    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; for timesteps Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """

    def __init__(
        self,
        width: int,
        *,
        order: Literal["cos_sin", "sin_cos"] = "cos_sin",
        frequency_shift: float = 0.0,
        frequencies: Literal["exp", "power"] = "exp",
    ) -> None:
        super().__init__()
        if width // 2 <= frequency_shift:
            raise ValueError(f"time features {width} wide are too narrow for frequency_shift={frequency_shift}")
        self.width, self.order = width, order
        self.frequency_shift, self.frequencies = frequency_shift, frequencies

    def forward(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=dtype, device=timesteps.device)
        if self.frequencies == "exp":
            frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / (half - self.frequency_shift))
        else:
            frequencies = (1 / MAX_PERIOD) ** (steps / (half - self.frequency_shift))
        features = _waves(timesteps.to(dtype)[:, None] * frequencies, self.order)
        return F.pad(features, (0, self.width % 2))

    def extra_repr(self) -> str:
        rule = f"frequency_shift={self.frequency_shift}, frequencies={self.frequencies!r}"
        return f"{self.width}, order={self.order!r}, {rule}"


class FourierFeatures(nn.Module):
    """Computes cos and sin of 2 pi * weight_i * timestep, with fixed random weights: the buffer `weight`, (width / 2,).

    Shapes: timesteps (N,) -> (N, width) in `dtype`. The weights stay in float32 in a 16-bit network: rounded, they
    would turn the phases by whole radians. Tancik et al. 2020 (arXiv 2006.10739); Song et al. 2021 (arXiv 2011.13456).
    """

    weight: Tensor

    def __init__(self, width: int, *, order: Literal["cos_sin", "sin_cos"] = "cos_sin", scale: float = 16.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"Fourier features come in pairs: time.width must be even, got {width}")
        self.order = order
        self.width, self.scale = width, scale
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("weight", torch.randn(width // 2, dtype=dtype) * scale)

    def forward(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return _waves(timesteps.to(dtype)[:, None] * (2 * math.pi * self.weight.to(dtype)), self.order)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]  # nn.Module's own signature is not public
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            self.weight = before.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.width}, order={self.order!r}, scale={self.scale}"


def _waves(phases: Tensor, order: str) -> Tensor:
    halves = (phases.cos(), phases.sin()) if order == "cos_sin" else (phases.sin(), phases.cos())
    return torch.cat(halves, dim=1)


class TimestepEmbedding(nn.Module):
    """Computes post(linear_2(act(linear_1(features + cond_proj(condition))))), with SiLU and nothing unless told.

    Shapes: features (N, in_channels), condition (N, cond_channels) -> (N, out_channels). The condition is that of
    guidance distillation (Meng et al. 2023, arXiv 2210.03142); without cond_channels it must be None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        cond_channels: int | None = None,
        activation: Activation = "silu",
        post_activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.post_activation = activation, post_activation
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)
        self.cond_proj = None if cond_channels is None else nn.Linear(cond_channels, in_channels, bias=False)

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond was given, but time_cond_proj_dim is None")
            features = features + self.cond_proj(condition.to(features.dtype))
        embedded = self.linear_2(activate(self.linear_1(features), self.activation))
        return embedded if self.post_activation is None else activate(embedded, self.post_activation)

    def extra_repr(self) -> str:
        widths = f"{self.linear_1.in_features}, {self.linear_2.out_features}"
        condition = "" if self.cond_proj is None else f", cond_channels={self.cond_proj.in_features}"
        post = "" if self.post_activation is None else f", post_activation={self.post_activation!r}"
        return f"{widths}{condition}, activation={self.activation!r}{post}"


class ClassEmbedding(nn.Module):
    """Looks up a row of `weight` for each class: labels as indices (N,) or as rows (N, classes) -> (N, channels).

    Labels as rows mix the rows of `weight` linearly, so that a one-hot label gives what its index gives. `scale`
    multiplies the result, before the `bias`. With `null_class` one more last row stands for "no label": for labels
    None, and for the index `num_classes`; where that row was not trained, both are refused. Without it, `missing` says
    what labels None give: "zeros" (EDM) or "error".
    Raises ValueError where labels are missing, of another shape or batch, or (on the CPU) not among the classes, and
    where `missing` is "zeros" beside a null class, or `null_class_trained` False without one.
    The null class is that of Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        null_class: bool = True,
        missing: Literal["zeros", "error"] = "error",
        null_class_trained: bool = True,
        bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("missing", missing, ("zeros", "error"))
        if null_class and missing != "error":
            raise ValueError(f"missing={missing!r} is for null_class=False: a null class stands for missing labels")
        if not null_class and not null_class_trained:
            raise ValueError("null_class_trained=False is for null_class=True: there is no other null class")
        self.num_classes, self.null_class, self.missing, self.scale = num_classes, null_class, missing, scale
        self.known = num_classes + (null_class and null_class_trained)  # rows that labels may name
        self.weight = nn.Parameter(torch.randn(num_classes + null_class, channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        if labels is None:
            embedded = self._unlabelled(batch)
        elif labels.ndim and labels.shape[0] != batch:
            raise ValueError(f"class_labels must have one entry for each of {batch} samples, got {labels.shape[0]}")
        elif labels.ndim == 2 and (labels.shape[1] == self.num_classes or labels.shape[1] == self.known):
            embedded = (labels.to(self.weight.dtype) * self.scale) @ self.weight[: labels.shape[1]]
        elif labels.ndim == 1 and _is_integral(labels.dtype):
            indices = labels.long()  # an embedding takes no shorter ones
            self._check_range(indices)
            embedded = F.embedding(indices, self.weight)
            embedded = embedded if self.scale == 1.0 else embedded * self.scale
        else:
            raise ValueError(
                f"class_labels must be (N,) integers or (N, {self.num_classes}) rows, got {tuple(labels.shape)} of "
                f"{labels.dtype}"
            )
        return embedded if self.bias is None else embedded + self.bias

    def extra_repr(self) -> str:
        missing = "null_class=True" if self.null_class else f"missing={self.missing!r}"
        missing += ", null_class_trained=False" if self.known < len(self.weight) else ""
        channels, scale = self.weight.shape[1], f"scale={self.scale:.4g}"
        return f"{self.num_classes}, {channels}, {missing}, bias={self.bias is not None}, {scale}"

    def _check_range(self, labels: Tensor) -> None:
        """Raise ValueError where a label is none of the classes; on the CPU alone.

        A look at labels on a GPU would wait for it, and its kernel checks them itself.
        """
        if not has_values(labels) or not labels.numel():
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.known:
            wrong = low if low < 0 else high
            raise ValueError(f"class_labels has {wrong}; this network's classes are 0 to {self.known - 1}")

    def _unlabelled(self, batch: int) -> Tensor:
        if self.known < len(self.weight):
            raise ValueError(
                f"class_labels are missing, and this network was trained with its {self.num_classes} classes only "
                "(objective.label_dropout was 0; condition.null_class_trained is False), so that without one it draws "
                f"rubbish: give class_labels from 0 to {self.num_classes - 1}, without guidance, or train with "
                "objective.label_dropout above 0"
            )
        if self.null_class:
            return self.weight[-1].expand(batch, -1) * self.scale
        if self.missing == "zeros":
            return self.weight.new_zeros(batch, self.weight.shape[1])
        raise ValueError(
            f"class_labels are missing: this network has {self.num_classes} classes and no null class "
            "(condition.null_class)"
        )


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


class AugmentEmbedding(nn.Linear):
    """Maps EDM's augmentation labels linearly, without bias: (N, label_channels) -> (N, channels).

    Karras et al. 2022 (arXiv 2206.00364), appendix F.2.
    """

    def __init__(self, label_channels: int, channels: int) -> None:
        super().__init__(label_channels, channels, bias=False)
