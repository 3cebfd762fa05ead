"""Reads the configurations that authors publish beside their weights: YAML files, and guided-diffusion's flags."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from unetgn.messages import plain, said, short

LIMIT = 2**20  # bytes of a YAML file
TARGET, ARGUMENTS = ("target", "_target_", "class_path"), ("params", "init_args")
MODULES = {  # whose classes are of which family, by the beginning of their dotted names
    "sgm": "sgm",
    "ldm": "compvis",
    "cldm": "compvis",
    "guided_diffusion": "guided-diffusion",
    "improved_diffusion": "improved-diffusion",
    "training.networks": "edm",
    "monai": "monai",
    "generative": "monai",
}
NETWORKS = ("UNetModel", "SuperResModel", "SongUNet", "DhariwalUNet", "DiffusionModelUNet")
CLASSES = {"ControlledUnetModel": "UNetModel"}  # the same network, with an argument of its own
DIFFUSION_FLAGS = {  # of guided-diffusion, which do not concern the network
    *("diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl", "predict_xstart", "rescale_timesteps"),
    *("sigma_small", "rescale_learned_sigmas", "data_dir", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps"),
    *("batch_size", "microbatch", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "clip_denoised"),
    *("fp16_scale_growth", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale"),
}
MULTIPLIERS = {  # of guided-diffusion and improved-diffusion, by the size of the image
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
CLASS_COUNT = 1000  # of class_cond


def read_original(config: str | Path | Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Read the U-Net's family, where it is said, and options, "class" among them, of a YAML file or what was in one.

    Raises ValueError where there is none or several, and for a file that is no YAML, or too large.
    """
    where = "the configuration" if isinstance(config, Mapping) else str(config)
    tree = config if isinstance(config, Mapping) else _read_yaml(Path(config))
    found = list(_networks(tree, set()))
    if len(found) > 1:
        names = ", ".join(f"{family} {plain(str(options['class']))}" for family, options in found)
        raise ValueError(f"{where} describes several U-Nets ({names}): give the part of the one that is meant")
    if found:
        return found[0]
    if any(isinstance(value, Mapping) for value in tree.values()):
        others = ", ".join(dict.fromkeys(plain(name) for name in _targets(tree, set()) if "unet" in name.lower()))
        raise ValueError(
            f"{where} describes no U-Net that is known here{f' ({others} is none)' if others else ''}: "
            f"no {', '.join(NETWORKS)} of {', '.join(MODULES)}"
        )
    return None, dict(tree)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {LIMIT} are read")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {said(error)}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds no keys: give the authors' configuration, as v1-inference.yaml")
    return tree


def _networks(tree: Any, seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find the U-Nets of known families in a tree of mappings and lists; what aliases share is looked at once."""
    if id(tree) in seen or not isinstance(tree, (Mapping, list)):
        return
    seen.add(id(tree))
    if isinstance(tree, Mapping):
        target = next((tree[key] for key in TARGET if isinstance(tree.get(key), str)), "")
        module, _, name = target.rpartition(".")
        family = next((family for start, family in MODULES.items() if f"{module}.".startswith(f"{start}.")), None)
        name = CLASSES.get(name, name)
        if family is not None and name in NETWORKS:
            inner = next((tree[key] for key in ARGUMENTS if isinstance(tree.get(key), Mapping)), None)
            own = {key: value for key, value in tree.items() if key not in TARGET} if inner is None else inner
            yield family, {**own, "class": name}
            return
    for value in tree.values() if isinstance(tree, Mapping) else tree:
        yield from _networks(value, seen)


def _targets(tree: Any, seen: set[int]) -> Iterator[str]:
    """Yield the names of all classes in a tree of mappings and lists; what aliases share is looked at once."""
    if id(tree) in seen or not isinstance(tree, (Mapping, list)):
        return
    seen.add(id(tree))
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if key in TARGET and isinstance(value, str):
            yield value.rpartition(".")[2]
        yield from _targets(value, seen)


def has_flags(options: Mapping[str, Any]) -> bool:
    """Say whether these are the flags of guided-diffusion's scripts, and not its constructor's options."""
    return isinstance(options.get("num_channels"), (int, str)) or isinstance(options.get("attention_resolutions"), str)


def class_of_flags(options: Mapping[str, Any]) -> str:
    """Say whose flags these are: its scripts for super-resolution alone have a large_size."""
    return "SuperResModel" if "large_size" in options else "UNetModel"


def read_flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn guided-diffusion's flags into its constructor's options, as its `create_model` does.

    Resolutions count pixels there, and may stand in one text, "32,16,8". What is left out has the scripts' default.
    large_size and small_size are those of the SuperResModel.
    Raises ValueError for a flag that is not known, and for one whose value cannot be read.
    """
    given = {key: _value(value) for key, value in options.items() if key not in DIFFUSION_FLAGS}
    given.pop("small_size", None)
    larger = given.pop("large_size", None)
    size = given.pop("image_size", None) if larger is None else larger
    given.pop("image_size", None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            "the flags of guided-diffusion need image_size (or large_size), of which resolutions are parts"
        )
    mult = _numbers(given.pop("channel_mult", None), "channel_mult", float) or MULTIPLIERS.get(
        256 if larger == 512 else size
    )
    if mult is None:
        raise ValueError(
            f"channel_mult is not given, and image_size={size} has none of its own: {list(MULTIPLIERS)} have"
        )
    resolutions = _numbers(given.pop("attention_resolutions", "16,8"), "attention_resolutions", int)
    given.pop("class", None)
    learned, labelled = given.pop("learn_sigma", False), given.pop("class_cond", False)
    return {
        "image_size": size,
        "in_channels": given.pop("in_channels", 3),
        "model_channels": given.pop("num_channels", 128),
        "out_channels": given.pop("out_channels", 6 if learned else 3),
        "num_res_blocks": given.pop("num_res_blocks", 2),
        "attention_resolutions": [size // resolution for resolution in resolutions],
        "channel_mult": list(mult),
        "num_classes": CLASS_COUNT if labelled else None,
        "num_heads": 4,
        "use_scale_shift_norm": True,
        **given,
    }


def _value(value: Any) -> Any:
    """Read what a command line may have left as text."""
    words = {"true": True, "yes": True, "false": False, "no": False, "none": None}
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else value


def _numbers(value: Any, name: str, kind: type) -> list[Any]:
    if value in (None, ""):
        return []
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = [kind(item) for item in items]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={short(value)} must be numbers with commas between them, as '32,16,8'") from None
    if any(number <= 0 for number in numbers):
        raise ValueError(f"{name}={short(value)} must be numbers above 0")
    return [int(number) if number == int(number) else number for number in numbers]
