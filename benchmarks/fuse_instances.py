"""Builds small instances of models, and inputs to run them with, for `fuse_coverage` and `fuse_libraries`.

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
    """Says how to make a model, `cls(**config)`, and how to run it: `run(model, inputs())`, by default by keyword.

    dtype is that of weights and inputs: float32 where the model casts to it by itself. training: run as in training.
    """

    path: str
    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    run: Callable[[Any, dict[str, Any]], Any] = lambda model, inputs: model(**inputs)
    dtype: str = "float64"
    training: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Library:
    """Names a library, the package or repository that it is, and models of it. `prepare` runs before any import."""

    name: str
    recipes: list[Recipe]
    package: str = ""
    repository: str = ""
    prepare: Callable[[], None] = lambda: None


def image_and_time(size: int = 16, channels: int = 3, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Return what draws an image and two timesteps, and what `more` draws."""
    return lambda: {
        "x": torch.randn(2, channels, size, size),
        "time": torch.tensor([3, 7]),
        **{name: make() for name, make in more.items()},
    }


def image(channels: int = 3, size: int = 16, **more: Any) -> Callable[[], dict[str, Any]]:
    """Return the function that draws sample (2, channels, size, size)."""
    return lambda: {"sample": torch.randn(2, channels, size, size), **more}


def video(channels: int = 3, frames: int = 9, size: int = 16) -> Callable[[], dict[str, Any]]:
    """Return the function that draws sample (1, channels, frames, size, size)."""
    return lambda: {"sample": torch.randn(1, channels, frames, size, size)}


def denoise(channels: int = 4, size: int = 8, context: int | None = 16, **more: Any) -> Callable[[], dict[str, Any]]:
    """Return the function that draws sample, timestep and, with `context`, encoder_hidden_states (2, 5, context).

    Callables in `more` are called for other inputs.
    """

    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {"sample": torch.randn(2, channels, size, size), "timestep": torch.tensor(7)}
        if context is not None:
            given["encoder_hidden_states"] = torch.randn(2, 5, context)
        return given | {name: make() for name, make in more.items()}

    return inputs


def denoise_video(context: int = 16, frames: int = 3, contexts: int = 1) -> Callable[[], dict[str, Any]]:
    """Return what draws sample (1, 4, frames, 8, 8), timestep and encoder_hidden_states (contexts, 5, context)."""
    return lambda: {
        "sample": torch.randn(1, 4, frames, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(contexts, 5, context),
    }


def randn(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def positional(model: Any, inputs: dict[str, Any]) -> Any:
    """Run a model with the inputs by position."""
    return model(*inputs.values())


def encoder_and_decoder(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Run the two halves of an autoencoder that as a whole works on large tiles only."""
    return model.decoder(model.encoder(inputs["sample"])[:, : model.config.latent_channels])


def encoder_alone(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Run the encoder of an autoencoder whose decoder is a transformer."""
    return model.encoder(inputs["sample"])


def build(recipe: Recipe, cls: type[nn.Module]) -> nn.Module:
    """Build the small instance, with random weights everywhere (what starts at zero would hide differences)."""
    model = cls(**recipe.config).train(recipe.training)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.count_nonzero() == 0:
                parameter.normal_(0, 0.1)
    return model
