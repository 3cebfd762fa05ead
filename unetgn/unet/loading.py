"""Loads networks and adapters as diffusers does, but for pickles: none is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from unetgn.messages import short
from unetgn.pickles import refuse_pickle, refuse_pickles
from unetgn.unet.adapters import block_scales
from unetgn.unet.ip_adapter import IPAdapters


class Loading(ModelMixin, PeftAdapterMixin, IPAdapters):
    """Loads as diffusers' ModelMixin does, but reads safetensors files only, networks and adapters."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, **kwargs: Any) -> Any:
        """Load a network that `save_pretrained` wrote: diffusers' own function, with its arguments, but for pickles.

        With low_cpu_mem_usage=False and ignore_mismatched_sizes=True, tensors of another shape than the file's are
        those of a new network. Raises ValueError for a pickle, with lines that convert it.
        """
        place = pretrained_model_name_or_path
        if place is not None and (folder := Path(place) / (kwargs.get("subfolder") or "")).is_dir():
            refuse_pickles(folder, variant=kwargs.get("variant"))
        only_safetensors(kwargs)
        if kwargs.get("low_cpu_mem_usage", True) is not False:
            return super().from_pretrained(place, **kwargs)
        # diffusers refuses to combine the two; without its reading into empty weights FourierFeatures is float32 anyway
        switches = {"_keep_in_fp32_modules": None, "_supports_param_buffer_assignment": False}  # copied: in torch_dtype
        plain = type(cls.__name__, (cls,), switches)
        with_info = kwargs.pop("output_loading_info", False)
        load = super(Loading, plain).from_pretrained  # type: ignore[misc]
        model, info = load(place, **kwargs, output_loading_info=True)
        model.__class__ = cls
        model._initialize([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        return (model, info) if with_info else model

    @classmethod
    def _load_pretrained_model(
        cls, model: nn.Module, state_dict: Any, resolved_model_file: Sequence[str] | None, *more: Any, **options: Any
    ) -> Any:
        """Raise ValueError for a pickle that an index on the hub names: diffusers calls this before it reads one."""
        pickles = [file for file in resolved_model_file or [] if not str(file).endswith(".safetensors")]
        if pickles:
            raise ValueError(f"{pickles[0]} may be a pickle, and none is opened here: give safetensors files")
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *more, **options)

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, original_config: str | Path | dict[str, Any] | None = None, **options: Any
    ) -> Any:
        """Load a network from one safetensors file of its authors: `unetgn.interop.load`, by diffusers' name.

        original_config: the authors' YAML file. torch_dtype is that of the result; None keeps the file's. Other options
        are those of the original constructor.
        """
        from unetgn.interop.families import load  # interop stands above this file

        dtype = options.pop("torch_dtype", options.pop("dtype", None))
        unet = load(path, config=original_config, **options)
        return unet if dtype is None else unet.to(dtype)

    def save_pretrained(self, save_directory: str | Path, *more: Any, **kwargs: Any) -> None:
        """Save the network: diffusers' own method. Raises ValueError where it has IP-Adapters."""
        if self.has_ip_adapters:
            raise ValueError(
                "the network has IP-Adapters, which from_pretrained would not load: pipeline.unload_ip_adapter() first"
            )
        super().save_pretrained(save_directory, *more, **kwargs)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Set the active adapters and their weights: numbers, or dicts of blocks as `block_scales` says."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = weights if isinstance(weights, list) else [weights] * len(names)
        attending = self._attending_layers()
        scales = [one if one is None else block_scales(one, attending) for one in given]
        super().set_adapters(names, scales)

    def _attending_layers(self) -> dict[str, dict[int, list[str]]]:
        """List the attention layers of each block that has any, by side."""
        sides = {"down": self.down_blocks, "mid": [self.mid_block], "up": self.up_blocks}
        return {
            side: {index: list(level.attending) for index, level in enumerate(levels) if level.attending}
            for side, levels in sides.items()
        }

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *more: Any, **kwargs: Any) -> None:
        """Load an adapter: diffusers' own method, with its arguments, but for pickles. Raises ValueError for one."""
        place, name = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        if not isinstance(place, dict):
            folder = Path(place) / (kwargs.get("subfolder") or "")
            if name is not None:
                refuse_pickle(folder / name)
            elif Path(place).is_file():
                refuse_pickle(Path(place))
            elif not any(folder.glob("*.safetensors")):
                for file in sorted(folder.glob("*.bin")):
                    refuse_pickle(file)
            only_safetensors(kwargs)
        super().load_lora_adapter(place, *more, **kwargs)


def only_safetensors(options: dict[str, Any]) -> None:
    """Have diffusers read safetensors files alone. Raises ValueError where the options ask for another."""
    if options.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False asks for a pickle, and none is opened here: leave it out")
    name = options.get("weight_name")
    if name is not None and not str(name).endswith(".safetensors"):
        raise ValueError(
            f"weight_name={short(name)} is no safetensors file, and others, which may be pickles, are not opened"
        )
    options["use_safetensors"] = True
