"""Computes the residual block of diffusion U-Nets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unetgn.nn.checkpointing import recomputed
from unetgn.nn.conv import convolution, zero_parameters
from unetgn.nn.fields import check_choice, check_kind, check_positive
from unetgn.nn.groups import NormConfig
from unetgn.nn.norm import ACTIVATIONS, Activation, activate, with_shortcut
from unetgn.nn.resample import BOX, Resample, unkept


@dataclass(frozen=True)
class ResBlockConfig:
    """Configures all residual blocks of a network."""

    embedding: Literal["add", "scale_shift"] = "add"
    """Adds the projected embedding before the second normalization with "add" (DDPM), or modulates after it with
    "scale_shift": h * (1 + scale) + shift, scale first (ADM).
    """
    activation: Activation = "silu"
    """Follows each norm, and the embedding: "silu", which is fused with the norm, "gelu", "relu" or "mish"."""
    activate_embedding: bool = True
    """Applies it to the embedding inside each block; False where the caller has applied it once."""
    residual_scale: float = 1.0
    """Multiplies the sum of branch and shortcut, above 0; sqrt(1/2) in NCSN++ and EDM's DDPM++."""
    project_resampled: bool = False
    """Puts a 1x1 convolution on the shortcut of every block that resamples (EDM's SongUNet), not only where the width
    changes.
    """
    zero_init: bool = True
    """Starts the last convolution at zero, so that the block starts as its shortcut (DDPM)."""

    def __post_init__(self) -> None:
        check_choice("resblock.embedding", self.embedding, ("add", "scale_shift"))
        check_choice("resblock.activation", self.activation, ACTIVATIONS)
        check_positive("resblock.residual_scale", self.residual_scale)


class ResBlock(nn.Module):
    """Computes (shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1(x))), emb))))) * residual_scale.

    Both pairs of norm and activation are the fused core where that is SiLU, and the embedding goes into the second
    one: as its pre_bias ("add") or as its scale and shift. With `resample`, "down" or "up", the resolution changes
    after the first activation, before conv1, and on the shortcut, by `strides` and filter `taps` as in `Resample`.

    Shapes: x (N, in_channels, *spatial), emb (N, emb_channels) -> (N, out_channels, *spatial), one to three spatial
    axes; `size` fixes the result's size when upsampling. emb_channels None is a block without an embedding.
    Parameters are named as in diffusers' ResnetBlock2D. `recompute` computes the norms and activations again in the
    backward pass instead of keeping them.
    Raises ValueError where the groups do not divide the channels, an embedding is missing or not expected, strides or
    taps are given to a block that does not resample, or config says how an embedding enters a block without one;
    TypeError where norm or config is of another class.
    He et al. 2016 (arXiv 1603.05027), figure 4 (e); Ho et al. 2020 (arXiv 2006.11239), appendix B; "scale_shift" and
    resampling inside: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3.
    """

    recompute = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        emb_channels: int | None = None,
        spatial_dims: int = 2,
        norm: NormConfig | None = None,
        config: ResBlockConfig | None = None,
        dropout: float = 0.0,
        resample: Literal["down", "up"] | None = None,
        strides: Sequence[int] | None = None,
        taps: Sequence[float] = BOX,
    ) -> None:
        super().__init__()
        norm = NormConfig() if norm is None else norm
        config = ResBlockConfig() if config is None else config
        check_kind("norm", norm, NormConfig)
        check_kind("config", config, ResBlockConfig)
        out_channels = in_channels if out_channels is None else out_channels
        if resample is None and (strides is not None or tuple(taps) != BOX):
            raise ValueError(
                f"strides={strides} and taps={tuple(taps)} are for a ResBlock with resample='down' or 'up'"
            )
        if resample is None and config.project_resampled:
            raise ValueError("project_resampled=True is for a ResBlock with resample='down' or 'up'")
        if emb_channels is None and (config.embedding != "add" or not config.activate_embedding):
            raise ValueError(
                f"embedding={config.embedding!r} with activate_embedding={config.activate_embedding} says how an "
                "embedding enters, but this ResBlock has none: give it emb_channels"
            )
        self.config = config
        self.norm1 = norm.build(in_channels, activation=config.activation)
        self.resample = None
        if resample is not None:
            self.resample = Resample(resample, spatial_dims=spatial_dims, strides=strides, taps=taps)
        self.conv1 = convolution(spatial_dims, in_channels, out_channels)
        self.time_emb_proj = None
        if emb_channels is not None:
            width = out_channels if config.embedding == "add" else 2 * out_channels
            self.time_emb_proj = nn.Linear(emb_channels, width)
        self.norm2 = norm.build(out_channels, activation=config.activation)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(spatial_dims, out_channels, out_channels)
        if config.zero_init:
            zero_parameters(self.conv2)
        self.conv_shortcut = None
        if in_channels != out_channels or (resample is not None and config.project_resampled):
            self.conv_shortcut = convolution(spatial_dims, in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None, *, size: Sequence[int] | None = None) -> Tensor:
        if size is not None and self.resample is None:
            raise ValueError(f"size={size} is for a ResBlock that upsamples: build it with resample='up'")
        modulation = self._modulation(emb)
        if self.recompute:
            with unkept(x):
                hidden, x = recomputed(self._first_half, x, size)
            random = self.training and self.dropout.p > 0
            hidden = recomputed(self._second_half, hidden, *modulation, random=random)
        else:
            hidden, x = self._first_half(x, size)
            hidden = self._second_half(hidden, *modulation)
        if self.resample is not None:
            x = self.resample(x, size=size)
        if self.conv_shortcut is not None:
            with unkept(x):
                x = self.conv_shortcut(x)
        total = x + hidden
        return total if self.config.residual_scale == 1.0 else total * self.config.residual_scale

    def _first_half(self, x: Tensor, size: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Compute conv1's output, and x for the shortcut."""
        with unkept(x):
            hidden, x = with_shortcut(self.norm1, x)
        if self.resample is not None:
            hidden = self.resample(hidden, size=size)
        return self.conv1(hidden), x

    def _second_half(
        self, hidden: Tensor, pre_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        return self.conv2(self.dropout(self.norm2(hidden, pre_bias, scale, shift)))

    def _modulation(self, emb: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute pre_bias, scale and shift of the second normalization, each (N, out_channels) or None."""
        if self.time_emb_proj is None:
            if emb is not None:
                raise ValueError("this ResBlock was built without emb_channels and takes no embedding")
            return None, None, None
        if emb is None:
            raise ValueError(f"this ResBlock needs an embedding (N, {self.time_emb_proj.in_features})")
        projected = self.time_emb_proj(activate(emb, self.config.activation) if self.config.activate_embedding else emb)
        if self.config.embedding == "add":
            return projected, None, None
        scale, shift = torch.chunk(projected, 2, dim=1)
        return None, scale, shift

    def extra_repr(self) -> str:
        widths = f"{self.conv1.in_channels}, {self.conv1.out_channels}"
        embedding = "None" if self.time_emb_proj is None else repr(self.config.embedding)
        activation = "" if self.config.activation == "silu" else f", activation={self.config.activation!r}"
        return f"{widths}, embedding={embedding}, residual_scale={self.config.residual_scale:.4g}{activation}"
