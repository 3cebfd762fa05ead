"""Tells what sampling has to know of a network, of ours or of diffusers' classes, from its configuration.

This file needs diffusers and nothing else of ours: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import as_number, told
from .sampling import plain


@dataclass(frozen=True)
class NetworkFacts:
    """Holds what sampling has to know of a network."""

    ours: bool
    """Says whether it is a unetgn.UNet."""
    channels: int
    sample_size: tuple[int, int] | None
    num_classes: int | None
    """Classes that may be asked for; None where it has none."""
    null_class: int | None
    """Label of no class, for diffusers' classes; None for ours, which take no label for that."""
    unlabelled: bool
    """Says whether it can be asked for no class in particular."""
    reads_text: bool
    captions_only: bool = False
    """Says that it met no empty text in training."""
    text_widths: frozenset[int] = frozenset()
    """Widths of the texts that it reads; none where they are not known."""
    multiple: int = 1
    """Divides height and width of all that it can make."""

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError where the network cannot make what is so many of its pixels high and wide."""
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"diffusers' UNet2DModel with these levels takes heights and widths that are multiples of "
                f"{self.multiple}, and not {height}×{width}, as unetgn.UNet would"
            )

    def check_labels(self, labels: list[Any] | None) -> list[int] | None:
        """Return the labels as integers. Raises ValueError where they are none of the network's, or missing."""
        if labels is None:
            if self.num_classes is not None and not self.unlabelled:
                raise ValueError(
                    "class_labels are missing, and this network was trained with its classes only, so that without one "
                    f"it draws rubbish: give class_labels from 0 to {self.num_classes - 1}"
                )
            return None
        if self.num_classes is None:
            raise ValueError("class_labels were given, but this network was trained without classes: leave them out")
        numbers = [as_number(label) for label in labels]
        wrong = [label for label, number in zip(labels, numbers, strict=True) if number not in range(self.num_classes)]
        if wrong:
            raise ValueError(
                f"class_labels has {told(wrong[0])}; this network's classes are the numbers 0 to {self.num_classes - 1}"
            )
        return [int(number) for number in numbers if number is not None]

    def check_texts(self, prompt: bool, embeds: bool) -> None:
        """Raise ValueError where texts are missing, or given to a network that reads none."""
        if not self.reads_text and (prompt or embeds):
            given = "prompt" if prompt else "prompt_embeds"
            raise ValueError(f"{given} was given, but this network reads no text: leave it out")
        if self.reads_text and prompt == embeds:
            raise ValueError("this network reads text: give prompt=… (or prompt_embeds=…, but not both)")

    def check_width(self, width: int) -> None:
        """Raise ValueError where the network reads no texts that are so wide."""
        if self.text_widths and width not in self.text_widths:
            raise ValueError(
                f"the texts are {width} wide, but the network reads texts {sorted(self.text_widths)} wide: give the "
                "text encoder of its training, or prompt_embeds that it made"
            )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where a prompt is empty, and training met no empty ones."""
        if self.captions_only and not all(prompt.strip() for prompt in prompts):
            raise ValueError(
                "prompt has an empty text, but this network was trained with captions only "
                "(objective.label_dropout was 0), so that it draws rubbish without: say what to draw"
            )

    def check_guidance(self, scale: float, *, labelled: bool, texts: bool) -> None:
        """Raise ValueError where there is nothing that guidance could lead to, or away from."""
        if scale == 1:
            return
        if texts and self.captions_only:
            raise ValueError(
                f"guidance_scale is {scale}: guidance needs a network that was trained with captions and without "
                "(objective.label_dropout above 0), and this one was not: leave it out"
            )
        if not labelled and not texts:
            raise ValueError(f"guidance_scale is {scale}, but no class_labels and no prompt were given to be guided by")
        if labelled and not self.unlabelled:
            raise ValueError(
                f"guidance_scale is {scale}: guidance needs a network that was trained with class_labels and without "
                "(objective.label_dropout above 0), and this one was not: leave it out"
            )


def facts_of(unet: Any, null_class: int | None) -> NetworkFacts:
    """Read a network's configuration. Raises ValueError where it is not one that images are sampled with."""
    config = dict(plain(unet).config)  # its own keys alone, none that it only answers for
    ours = "num_class_embeds" not in config and "num_classes" in config
    if config.get("spatial_dims", 2) != 2:
        raise ValueError(f"spatial_dims is {config['spatial_dims']}, but images have 2 axes")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"the network makes {config['out_channels']} channels of {config['in_channels']}; sampling needs a network "
            "that predicts the noise, the velocity or the image, and nothing beside it, such as a variance "
            "(learned_range)"
        )
    size, multiple = config.get("sample_size"), 1
    if isinstance(size, int):
        size = size, size
    if ours:
        condition, transformer = config["condition"], config.get("transformer")
        num_classes = config["num_classes"]
        unlabelled = (
            condition["null_class_trained"] if condition["null_class"] else condition["missing_class"] == "zeros"
        )
        widths = _numbers(config["attention"].get("context_dim"))
        widths |= _numbers(transformer and transformer["context_dim"])
        reads_text = bool(widths)
        if condition.get("class_embedding", "table") != "table" or condition.get("added_embedding") is not None:
            raise ValueError(
                "the network is told more than this pipeline gives (condition.class_embedding, "
                "condition.added_embedding): call it in a loop of your own"
            )
    else:
        rows, blocks = config.get("num_class_embeds"), (*config.get("down_block_types", ()),
            config.get("mid_block_type") or "", *config.get("up_block_types", ()))  # fmt: skip
        if null_class is not None and null_class + 1 != rows:
            raise ValueError(f"null_class is {null_class}, but it is the last of the network's {rows} classes")
        num_classes = rows if rows is None or null_class is None else rows - 1
        unlabelled = null_class is not None
        reads_text = any("CrossAttn" in block for block in blocks)
        widths = _numbers(config.get("encoder_hid_dim") or config.get("cross_attention_dim")) if reads_text else set()
        if "cross_attention_dim" not in config:  # UNet2DModel, which doubles on the way up whatever it halved before
            multiple = 2 ** max(0, len(config.get("down_block_types", ())) - 1)
    return NetworkFacts(
        ours=ours,
        channels=config["in_channels"],
        sample_size=None if size is None else (size[0], size[1]),
        num_classes=num_classes,
        null_class=None if ours else null_class,
        unlabelled=num_classes is None or unlabelled,
        reads_text=reads_text,
        captions_only=ours and reads_text and not config["condition"].get("null_class_trained", True),
        text_widths=frozenset(widths),
        multiple=multiple,
    )


def _numbers(dims: int | Sequence[int | None] | None) -> set[int]:
    """Return the numbers of one for all levels or one each, None where a level has none."""
    each = dims if isinstance(dims, (list, tuple)) else [dims]
    return {dim for dim in each if isinstance(dim, int)}
