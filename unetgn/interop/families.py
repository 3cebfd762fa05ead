"""Lists the families of checkpoints by name, and converts from a state dict or a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from unetgn.interop import compvis, diffusers_condition, diffusers_unet2d, edm, guided_diffusion, monai, sgm
from unetgn.interop.files import read_checkpoint, unpacked
from unetgn.interop.original_configs import class_of_flags, has_flags, read_original
from unetgn.interop.recognition import recognise
from unetgn.messages import short
from unetgn.unet import UNet


class Converter(Protocol):
    """Describes what each family's module offers: its classes, and a function that converts their weights."""

    CLASSES: tuple[str, ...]

    def convert(
        self, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool
    ) -> UNet: ...


FAMILIES: dict[str, Any] = {
    "guided-diffusion": guided_diffusion,
    "improved-diffusion": guided_diffusion,
    "edm": edm,
    "compvis": compvis,
    "sgm": sgm,
    "monai": monai,
    "diffusers-unet2d": diffusers_unet2d,
    "diffusers-unet2d-old": diffusers_unet2d,
    "diffusers-unet2d-condition": diffusers_condition,
}


def convert(family: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UNet:
    """Build our U-Net with the architecture and weights of another project's network, in evaluation mode.

    family: a name in FAMILIES. config: the options of the original constructor, what is left out having its default
    there, and "class", the name of the original class. state_dict: the weights under their original names, with
    prefixes as files have them, or a checkpoint that holds them, as {"model": …}; they are copied. On the meta device
    it works for shapes alone.
    Raises ValueError for an unknown family, class or option, an option that is not supported (naming it), and missing,
    unexpected or misshapen keys (listing them); TypeError for an option of a wrong type. Nothing is loaded halfway.
    """
    return _convert(family, config, unpacked(state_dict), copy=True)


def load(
    family: str | Path,
    path: str | Path | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    class_name: str | None = None,
    ema: bool | None = None,
    **options: Any,
) -> UNet:
    """Read a safetensors file and `convert` it: `load(path)`, or `load(family, path, …)`.

    Without a family the network is recognised by the names and shapes of its tensors (`unetgn.interop.recognition`).
    config: the authors' YAML file, or what is in one, or guided-diffusion's flags; options of the original constructor
    may be given by name, and count before it. class_name: the original class, which may be left out where the family
    has one only, or flags say it. ema: of a file with averaged and trained weights, True takes the former and False the
    latter; None, of a CompVis file, the latter. Prefixes are stripped and other networks in the file left out
    (`unetgn.interop.files.network_of`).
    Raises what `convert` raises; ValueError for a file that is not recognised, naming the candidates and the option
    that decides, for a pickle, with a safe way to convert it, and for a file that is no safetensors file;
    FileNotFoundError where there is none.
    """
    named_family = None if path is None else str(family)
    if path is None:
        if family in FAMILIES:
            raise TypeError(f"load({family!r}) needs the path of a file: load({family!r}, path), or load(path) alone")
        path = family
    if class_name is not None:
        options["class"] = class_name
    read: dict[str, Any] = {}
    if config is not None:
        said, read = read_original(config)
        named_family = named_family or said or ("guided-diffusion" if has_flags(read) else None)
    state = read_checkpoint(path, ema=ema)
    options = {**read, **options}
    if FAMILIES.get(named_family or "") is guided_diffusion and has_flags(options):
        options.setdefault("class", class_of_flags(options))
    if named_family is None:
        named_family, options = recognise(state, str(path), options)
    return _convert(named_family, options, state, copy=False, named="class_name")


def _convert(
    family: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, copy: bool, named: str = "'class'"
) -> UNet:
    if family not in FAMILIES:
        reason = "it has no group norms and no biases, and is another architecture" if family == "edm2" else "unknown"
        raise ValueError(f"family {family!r} is not supported ({reason}); these are: {', '.join(FAMILIES)}")
    converter = FAMILIES[family]
    options = {key: value for key, value in config.items() if key != "class" and not key.startswith("_")}
    classes = converter.CLASSES
    class_name = config.get("class", classes[0] if len(classes) == 1 else None)
    if class_name not in classes:
        raise ValueError(
            f"{family}: class {short(class_name)} is not supported; give {' or '.join(classes)} as {named}"
        )
    return converter.convert(options, state_dict, class_name=class_name, copy=copy)
