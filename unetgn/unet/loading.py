"""Loads networks and adapters as diffusers does, but for pickles: none is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from unetgn.pickles import refuse_pickle, refuse_pickles


class Loading(ModelMixin, PeftAdapterMixin):
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
            f"weight_name={name!r} is no safetensors file, and others, which may be pickles, are not opened"
        )
    options["use_safetensors"] = True
