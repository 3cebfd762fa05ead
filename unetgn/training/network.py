"""Makes the network that a run begins with: of random weights, or of those that `train.initial_weights` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unetgn import UNet
from unetgn.json_files import read_object
from unetgn.messages import said, short
from unetgn.training.checkpoint import (
    Checkpoint,
    TensorFile,
    check_tensors,
    check_weights,
    find_checkpoint,
    is_run_or_checkpoint,
)
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config
from unetgn.training.data.text import context_dims
from unetgn.training.errors import CheckpointError, ConfigError, reason
from unetgn.training.lora import add_adapter, base_digest, merged, trained_state
from unetgn.unet.facts import facts
from unetgn.unet.model import empty_unet

FREE = ("sample_size", "dropout")  # in these a network may differ from the one whose weights it takes
LISTED = 5  # an error message names at most this many fields that differ


def outline(config: RunConfig) -> UNet:
    """Build the network without memory for it. Raises ConfigError where there can be no such network."""
    try:
        return empty_unet(config.model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def make_network(config: RunConfig, initial: UNet | None, start: Checkpoint | None = None) -> UNet:
    """Make the network of `config.model` in float32, of the weights of `initial`, or random ones of the run's seed.

    With `lora` it has adapters, of the run's seed, and only they are to be trained.

    It says whether training meets its null class or the empty text, or met it before: in `initial`, or in what the run
    that goes on from `start` began with.
    """
    model, before = config.model, initial
    if start is not None and config.train.initial_weights is not None:
        before = described_network(start)
    told = (model.num_classes is not None and model.condition.null_class) or context_dims(model)
    if told and config.objective.label_dropout == 0:
        trained = before is not None and before.unet_config.condition.null_class_trained
        model = replace(model, condition=replace(model.condition, null_class_trained=trained))
    if initial is None:
        torch.manual_seed(config.seed)
        return UNet.from_unet_config(model)
    network = empty_unet(model)
    load_in_float32(network, initial)
    if config.lora is not None:
        torch.manual_seed(config.seed)
        add_adapter(network, config.lora)
    return network


def load_in_float32(network: UNet, source: UNet) -> None:
    """Copy the weights of `source` into a network that has none."""
    weights = source.state_dict().items()
    network.load_state_dict({key: tensor.to(torch.float32, copy=True) for key, tensor in weights}, assign=True)


def load_initial_weights(config: RunConfig) -> UNet | None:
    """Load the network that train.initial_weights names, None without it.

    Raises ConfigError where there is none, or another than `config.model` describes, naming what differs.
    """
    path = config.train.initial_weights
    if path is None:
        return None
    try:
        source = load_network(Path(path))
    except (ValueError, OSError, CheckpointError) as error:
        raise ConfigError(f"train.initial_weights {path}: {error}") from error
    there, here = facts(source.unet_config), facts(config.model)
    different = [name for name in here if name not in FREE and there[name] != here[name]]
    if different:
        named = [f"{name} is {short(there[name])} there and {short(here[name])} here" for name in different[:LISTED]]
        listed = "; ".join(named) + (f"; and {len(different) - LISTED} more" if len(different) > LISTED else "")
        raise ConfigError(f"train.initial_weights {path} is another network than model.* describes: {listed}")
    return source


def load_network(path: Path) -> UNet:
    """Load the U-Net in a folder: of a run or its checkpoint (averaged weights), of `save_pretrained`, of diffusers.

    A pipeline's folder will do for the last two. Raises ValueError, OSError or CheckpointError where there is none.
    """
    if is_run_or_checkpoint(path):
        return load_checkpoint(find_checkpoint(path), "ema")
    folder = path / "unet" if (path / "unet" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        found = "holds no network" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{found}: give the folder of a diffusers pipeline or model, or of a run of ours")
    ours = read_object(folder / "config.json").get("_class_name") == UNet.__name__
    if special := [file for file in folder.iterdir() if file.exists() and not (file.is_file() or file.is_dir())]:
        raise ValueError(f"{special[0]} is no file")  # reading a pipe would wait for ever
    try:
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        unet: UNet = UNet.from_pretrained(folder, **options) if ours else UNet.from_diffusers(folder)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a configuration that is anybody's, diffusers raises anything
        raise ValueError(f"{folder} holds no network that can be read: {reason(error)}") from error
    check_weights(unet.state_dict(), folder)
    return unet


def load_checkpoint(checkpoint: Checkpoint, weights: TensorFile) -> UNet:
    """Load the U-Net of a checkpoint with its weights "ema" or "model"; adapters are merged into those they are for.

    Raises CheckpointError.
    """
    tensors, unet = checkpoint.tensors(weights), described_network(checkpoint)
    if checkpoint.base() is not None:
        return with_adapters(unet, tensors, checkpoint, weights)
    check_tensors(tensors, unet.state_dict(), checkpoint.path / f"{weights}.safetensors")
    unet.load_state_dict(tensors, assign=True)
    return unet


def with_adapters(unet: UNet, tensors: dict[str, Tensor], checkpoint: Checkpoint, weights: TensorFile) -> UNet:
    """Load the weights that a checkpoint's adapters are for into its U-Net, and merge the adapters into them.

    Raises CheckpointError where the network that the run began with has gone, or is another one now.
    """
    try:
        config = load_config(checkpoint.config_file)
        if config.lora is None:
            raise ConfigError("its config.yaml has no lora")
        outline = empty_unet(unet.unet_config)
        add_adapter(outline, config.lora)  # without memory: a stranger's may be of any rank
        check_tensors(tensors, trained_state(outline), checkpoint.path / f"{weights}.safetensors")
        initial = load_initial_weights(config)
        assert initial is not None  # the configuration sees to it
        load_in_float32(unet, initial)
        if (found := base_digest(unet)) != checkpoint.base():
            raise ConfigError(
                f"train.initial_weights {config.train.initial_weights} is another network (sha256 {found})"
            )
        add_adapter(unet, config.lora)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path} has adapters only, and not the network that they are for: {said(error)}"
        ) from error
    unet.load_state_dict(tensors, strict=False)
    return merged(unet)


def described_network(checkpoint: Checkpoint) -> UNet:
    """Build the U-Net that a checkpoint's config.json describes, without memory: it may ask for any size.

    Raises CheckpointError where it describes none.
    """
    try:
        with torch.device("meta"):
            return UNet.from_config(checkpoint.unet_config())
    except (TypeError, ValueError, RuntimeError) as error:  # the last where a size is beyond what torch counts
        raise CheckpointError(f"{checkpoint.path}: its config.json describes no network: {reason(error)}") from error
