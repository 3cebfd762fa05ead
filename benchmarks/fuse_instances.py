"""A small instance of each diffusers model that has group norms, and inputs to run it with: for `fuse_coverage`.

A recipe is keyed by the path of its class, so that the installed diffusers decides which recipes are used; several
recipes for one class are its variants. The inputs are seeded by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """`cls(**config)` and what to run it with: `run(model, inputs())`, by default the inputs as keyword arguments."""

    path: str
    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    run: Callable[[Any, dict[str, Any]], Any] = lambda model, inputs: model(**inputs)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def image(channels: int = 3, size: int = 16, **more: Any) -> Callable[[], dict[str, Any]]:
    """sample (2, channels, size, size)."""
    return lambda: {"sample": torch.randn(2, channels, size, size), **more}


def video(channels: int = 3, frames: int = 9, size: int = 16) -> Callable[[], dict[str, Any]]:
    """sample (1, channels, frames, size, size)."""
    return lambda: {"sample": torch.randn(1, channels, frames, size, size)}


def denoise(channels: int = 4, size: int = 8, context: int | None = 16, **more: Any) -> Callable[[], dict[str, Any]]:
    """sample, timestep and, with `context`, encoder_hidden_states (2, 5, context); callables in `more` are called."""

    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {"sample": torch.randn(2, channels, size, size), "timestep": torch.tensor(7)}
        if context is not None:
            given["encoder_hidden_states"] = torch.randn(2, 5, context)
        return given | {name: make() for name, make in more.items()}

    return inputs


def denoise_video(context: int = 16, frames: int = 3, contexts: int = 1) -> Callable[[], dict[str, Any]]:
    """sample (1, 4, frames, 8, 8), timestep, encoder_hidden_states (contexts, 5, context)."""
    return lambda: {
        "sample": torch.randn(1, 4, frames, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(contexts, 5, context),
    }


def randn(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def encoder_and_decoder(model: Any, inputs: dict[str, Any]) -> Tensor:
    """For an autoencoder that works on large tiles only: its two halves."""
    return model.decoder(model.encoder(inputs["sample"])[:, : model.config.latent_channels])


def encoder_alone(model: Any, inputs: dict[str, Any]) -> Tensor:
    """For an autoencoder whose decoder is a transformer."""
    return model.encoder(inputs["sample"])


def build(recipe: Recipe, cls: type[nn.Module]) -> nn.Module:
    """The small instance, with random weights everywhere (what is initialised to zero would hide differences)."""
    model = cls(**recipe.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.count_nonzero() == 0:
                parameter.normal_(0, 0.1)
    return model
