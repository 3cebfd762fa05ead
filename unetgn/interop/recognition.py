"""Recognises the network in a file by the names and shapes of its tensors.

What they say is read: widths, depths, where there is attention, what conditions it. What they do not say, as numbers of
heads, is known of published networks (`releases.py`); for another one it is asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.recognition_openai import is_openai, read_openai
from unetgn.interop.releases import released
from unetgn.messages import plain

FOREIGN = {  # what a file may hold beside the families here, by a part of a name, and what is to be done with it
    "emb_fourier.freqs": "a network of EDM2, which has no group norms and is another architecture",
    "transformer_blocks.0.norm1.linear.weight": "a diffusion transformer, which is no U-Net",
    "joint_blocks.": "a diffusion transformer, which is no U-Net",
    "double_blocks.": "a diffusion transformer, which is no U-Net",
    "lora_": "an adapter: load it into a network, with load_lora_adapter",
    "first_stage_model.": "an autoencoder without a U-Net",
    "decoder.up.0.block.0.norm1.weight": "an autoencoder",
    "temporal_transformer.": "a video network",
    "time_stack.": "a video network",
    "down_blocks.0.motion_modules.": "a video network",
    "temp_convs.": "a video network",
}
ASKS = {
    "heads": (
        "num_heads or num_head_channels",
        "num_heads=8 (Stable Diffusion 1), num_head_channels=64 (2, XL, guided-diffusion's) or num_heads=4 "
        "(improved-diffusion's, guided-diffusion's ImageNet-128)",
    ),
    "rows": (
        "use_new_attention_order",
        "True (guided-diffusion's ImageNet-64) or False (its others, improved-diffusion, latent diffusion)",
    ),
    "monai": ("num_head_channels", "MONAI's is 8, unless the training said another"),
    "monai's norms": (
        "norm_num_groups",
        "MONAI's is 32 (with norm_eps=1e-6, which the file does not say either), unless the training said another",
    ),
}


HEADS = {"num_heads", "num_head_channels"}


@dataclass(frozen=True)
class Found:
    """Holds what a file is: family, class and options; `asks` names what it does not say, as in ASKS."""

    family: str
    options: dict[str, Any]
    class_name: str
    asks: tuple[str, ...] = ()


def recognise(state: Mapping[str, Tensor], where: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name the family of a state dict and its options, those that are `given` among them.

    Raises ValueError, naming what the file does look like, the candidates and the option that decides between them.
    """
    found = _find(state, where)
    said = {name: value for name, value in found.options.items() if name not in HEADS or not HEADS & given.keys()}
    options = {**said, **given}  # of the two ways to say how many heads there are, the given one
    for ask in found.asks:
        names, candidates = ASKS[ask]
        if not any(name in given for name in re.split(" or ", names)):
            raise ValueError(
                f"{where} is a network of the family {found.family!r} by its names and shapes, but they do not say "
                f"{names}, and no published network has these widths; candidates: {candidates}. Give it: "
                f"load(path, {names.split(' or ')[0]}=…)"
            )
    return found.family, {**options, "class": given.get("class", found.class_name)}


def _find(state: Mapping[str, Tensor], where: str) -> Found:
    reason = next((what for part, what in FOREIGN.items() if any(part in key for key in state)), None)
    if reason is None and is_openai(state):
        options = read_openai(state)
        family, known = released(options)
        if known is not None:
            return Found(family, {**options, **known}, "UNetModel")
        spatial = options.get("use_spatial_transformer", False)
        attends = spatial or "middle_block.1.qkv.weight" in state
        return Found(family, options, "UNetModel", () if not attends else ("heads",) if spatial else ("heads", "rows"))
    if reason is None and "map_layer0.weight" in state and "map_layer1.weight" in state:
        return _edm(state)
    if reason is None and "middle_block.resnet_1.conv1.conv.weight" in state:
        return _monai(state)
    if reason is None and "conv_in.weight" in state and "time_embedding.linear_1.weight" in state:
        reason = (
            "a network of diffusers or of this package, which its config.json describes: "
            "UNet.from_diffusers(folder) or UNet.from_pretrained(folder)"
        )
    some = ", ".join(map(plain, sorted(state)[:3]))
    raise ValueError(
        f"{where} is {reason or 'no network that is known here'} (its tensors begin with {some}); recognised are files "
        "of CompVis, Stability, guided-diffusion, EDM and MONAI. load(family, path, …) takes options by name"
    )


def _edm(state: Mapping[str, Tensor]) -> Found:
    stem = next(key for key in state if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", key))
    resolution = int(re.findall(r"\d+", stem)[0])
    width = state[stem].shape[0]
    song = "out_conv.weight" not in state
    levels: dict[int, list[int]] = {}
    for key in state:
        match = re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv1\.weight", key)
        if match:
            levels.setdefault(int(match[1]), []).append(state[key].shape[0])
    sizes = sorted(levels, reverse=True)
    first = f"enc.{sizes[0]}x{sizes[0]}_block0.affine.weight"
    options: dict[str, Any] = {
        "img_resolution": resolution,
        "in_channels": state[stem].shape[1],
        "out_channels": next(v for k, v in state.items() if re.search(r"(out_conv|_aux_conv)\.weight$", k)).shape[0],
        "model_channels": width,
        "channel_mult": [_ratio(levels[size][0], width) for size in sizes],
        "channel_mult_emb": _ratio(state[first].shape[1], width),
        "num_blocks": len(levels[sizes[0]]),
        "attn_resolutions": [s for s in sizes if any(f"enc.{s}x{s}_block{i}.qkv.weight" in state for i in range(99))],
        "label_dim": state["map_label.weight"].shape[1] if "map_label.weight" in state else 0,
        "augment_dim": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
    }
    if song:
        taps = next((v for k, v in state.items() if k.endswith("conv0.resample_filter")), None)
        options |= {
            "embedding_type": "fourier" if "map_noise.freqs" in state else "positional",
            "channel_mult_noise": _ratio(state["map_layer0.weight"].shape[1], width),
            "encoder_type": "residual" if any("_aux_residual." in key for key in state) else "standard",
            "resample_filter": [1, 3, 3, 1] if taps is not None and taps.shape[-1] == 4 else [1, 1],
        }
    return Found("edm", options, "SongUNet" if song else "DhariwalUNet")


def _monai(state: Mapping[str, Tensor]) -> Found:
    levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("down_blocks."))
    stem = state["conv_in.conv.weight"]
    blocks = [[key for key in state if re.fullmatch(rf"down_blocks\.{i}\.resnets\.\d+\.conv2\.conv\.weight", key)]
              for i in range(levels)]  # fmt: skip
    cross = [key for key in state if key.endswith("attn2.to_k.weight")]
    depth = len({key for key in cross if key.startswith("middle_block.")})
    options: dict[str, Any] = {
        "spatial_dims": stem.ndim - 2,
        "in_channels": stem.shape[1],
        "out_channels": state["out.2.conv.weight"].shape[0],
        "num_res_blocks": [len(level) for level in blocks],
        "channels": [state[level[0]].shape[0] for level in blocks],
        "attention_levels": [
            any(key.startswith(f"down_blocks.{i}.attentions.") for key in state) for i in range(levels)
        ],
        "resblock_updown": any(".downsampler.conv1." in key for key in state),
        "use_combined_linear": any(key.endswith(".qkv.weight") for key in state),
        "with_conditioning": bool(cross),
    }
    if cross:
        options |= {"cross_attention_dim": state[cross[0]].shape[1], "transformer_num_layers": depth}
    if "class_embedding.weight" in state:
        options["num_class_embeds"] = state["class_embedding.weight"].shape[0]
    return Found("monai", options, "DiffusionModelUNet", ("monai", "monai's norms"))


def _ratio(width: int, unit: int) -> int | float:
    return width // unit if width % unit == 0 else width / unit
