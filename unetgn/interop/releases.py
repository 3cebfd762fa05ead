"""Knows of published networks what no file says: numbers of heads, and the order of packed rows.

The facts are those of the authors' configuration files: CompVis' and Stability's v1-inference.yaml, v2-inference.yaml,
sd_xl_base.yaml, sd_xl_refiner.yaml, x4-upscaling.yaml and latent-diffusion's, guided-diffusion's and
improved-diffusion's README.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WIDTH_64 = {"num_head_channels": 64}
ADM = {"out_channels": 6, "resblock_updown": True}  # with a learned variance; consistency models have 3


@dataclass(frozen=True)
class Release:
    """Says by which options a network is known, and what it has besides; `sizes` are width, multipliers, context."""

    name: str
    family: str
    sizes: tuple[int, tuple[float, ...], int | None]
    has: Mapping[str, Any]
    where: Mapping[str, Any]


def _plain(name: str, width: int, mult: tuple[float, ...], has: Mapping[str, Any], **where: Any) -> Release:
    order = {"use_new_attention_order": False}
    return Release(name, "guided-diffusion", (width, mult, None), {**order, **has}, where)


RELEASES = (
    Release("Stable Diffusion 1", "compvis", (320, (1, 2, 4, 4), 768), {"num_heads": 8}, {}),
    Release("Stable Diffusion 2", "compvis", (320, (1, 2, 4, 4), 1024), WIDTH_64, {}),
    Release("Stable Diffusion XL", "sgm", (320, (1, 2, 4), 2048), WIDTH_64, {}),
    Release("Stable Diffusion XL's refiner", "sgm", (384, (1, 2, 4, 4), 1280), WIDTH_64, {}),
    Release("the x4 upscaler", "compvis", (256, (1, 2, 2, 4), 1024), {"num_heads": 8}, {}),
    Release("latent diffusion, text", "compvis", (320, (1, 2, 4, 4), 1280), {"num_heads": 8}, {}),
    Release("latent diffusion, classes", "compvis", (192, (1, 2, 3, 5), 512), {"num_heads": 1}, {}),
    Release("latent diffusion, 256", "compvis", (224, (1, 2, 3, 4), None), {"num_head_channels": 32}, {}),
    _plain("ADM-64", 192, (1, 2, 3, 4), {**WIDTH_64, "use_new_attention_order": True}, **ADM),
    _plain("ADM-128", 256, (1, 1, 2, 3, 4), {"num_heads": 4}, **ADM),
    _plain("ADM-256", 256, (1, 1, 2, 2, 4, 4), WIDTH_64, **ADM),
    _plain("ADM-512", 256, (0.5, 1, 1, 2, 2, 4, 4), WIDTH_64, **ADM),
    _plain("ADM, 64 to 256", 192, (1, 1, 2, 2, 4, 4), {"num_heads": 4}, **ADM, attention_resolutions=[8, 16, 32]),
    _plain("ADM, 128 to 512", 192, (1, 1, 2, 2, 4, 4), WIDTH_64, **ADM, attention_resolutions=[16, 32]),
    _plain("improved-diffusion, 64", 128, (1, 2, 3, 4), {"num_heads": 4}, num_res_blocks=3, resblock_updown=False),
    _plain("improved-diffusion, 32", 128, (1, 2, 2, 2), {"num_heads": 4}, num_res_blocks=3, resblock_updown=False),
)


def released(options: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Name the family that reads these options, and what the published network that has them has besides, if any."""
    sizes = (options["model_channels"], tuple(options["channel_mult"]), options.get("context_dim"))
    for release in RELEASES:
        if release.sizes == sizes and all(options.get(name) == value for name, value in release.where.items()):
            family = _family(options) if release.family == "compvis" else release.family
            return family, dict(release.has)
    return _family(options), None


def _family(options: Mapping[str, Any]) -> str:
    """Name the family: CompVis' where its options say all, Stability's where the middle is of its own."""
    if not options.get("use_spatial_transformer", False):
        return "guided-diffusion"
    return "sgm" if any("_middle_tr" in name or name.endswith("depth_middle") for name in options) else "compvis"
