"""Every argument of the pipeline, given what it cannot be: refused by its name, before the first step."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.pipelines.test_pipeline import PHOTO, WRONG, digits
from unetgn import UNet
from unetgn.pipelines import UNetPipeline
from unetgn.training.objective import ObjectiveConfig, make_scheduler

ARGUMENTS = [name for name in inspect.signature(UNetPipeline.__call__).parameters if name != "self"]
VALUES: dict[str, Any] = {
    "a text": "x",
    "no text": "",
    "below 0": -1,
    "0": 0,
    "2": 2,
    "a half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "true": True,
    "a list": [],
    "a dictionary": {},
    "an object": object(),
    "a list of None": [None],
    "one number": (1,),
    "two": (0.5, 900.0),
    "two of none": (float("nan"), float("nan")),
    "zeros": torch.zeros(1, 1, 8, 8),
    "nans": torch.full((1, 1, 8, 8), float("nan")),
    "whole numbers": torch.zeros(1, 1, 8, 8, dtype=torch.long),
    "complex numbers": torch.zeros(1, 1, 8, 8, dtype=torch.complex64),
    "a tensor's number": torch.tensor(2.0),
    "NumPy's 2": np.int64(2),
    "NumPy's 2.0": np.float64(2),
    "beyond": 10**30,
    "a function": lambda *_: None,
}
# What each may be, of these; a second argument that it needs.
FINE = {
    "seeds": {"0", "2", "one number", "NumPy's 2"},
    "class_labels": {"0", "2", "one number", "NumPy's 2", "NumPy's 2.0", "a tensor's number"},
    "guidance_scale": {"below 0", "0", "2", "a half", "NumPy's 2", "NumPy's 2.0", "a tensor's number", "beyond"},
    "guidance_interval": {"two"},
    "guidance_rescale": {"0", "a half"},
    "num_inference_steps": {"2", "NumPy's 2"},
    "image": {"zeros", "whole numbers"},
    "strength": {"a half"},
    "latents": {"zeros"},
    "height": {"2", "NumPy's 2"},
    "width": {"2", "NumPy's 2"},
    "callback_on_step_end": {"a function"},
    "callback_on_step_end_tensor_inputs": {"no text", "a list"},
    "return_dict": set(VALUES),  # as in diffusers
}
BESIDE = {
    "strength": {"image": PHOTO},
    "mask_image": {"image": PHOTO},
    "guidance_interval": {"guidance_scale": 2},
    "guidance_rescale": {"guidance_scale": 2},
}


class SteppedError(Exception):
    """Says that the network was asked."""


def step(*_: Any, **__: Any) -> None:
    raise SteppedError


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_an_argument_cannot_be_is_refused_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = digits()
    monkeypatch.setattr(type(pipeline.unet), "forward", step)
    for kind, value in VALUES.items():
        given = {"seeds": 0, "class_labels": 1, "num_inference_steps": 2} | BESIDE.get(name, {}) | {name: value}
        wanted = SteppedError if kind in FINE.get(name, ()) else (ValueError, TypeError)
        with pytest.raises(wanted) as refused:
            pipeline(**given)
        said = str(refused.value)
        assert wanted is SteppedError or ("steps" if name == "num_inference_steps" else name) in said, (kind, said)


def test_of_every_argument_a_contradiction_is_refused() -> None:
    named = {name for arguments, _ in WRONG.values() for name in arguments}
    assert named == set(ARGUMENTS) - {"return_dict", "callback_on_step_end"}  # which no other contradicts


def of_texts(kind: str) -> UNetPipeline:
    """Make a pipeline of a network that reads texts 24 wide, and that nothing trained."""
    if kind == "ours":
        unet: Any = UNet(sample_size=8, in_channels=1, out_channels=1, channels=[32, 32], depth=1, attention_levels=[1],
                         attention={"context_dim": 24})  # fmt: skip
    else:
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
            attention_head_dim=4, cross_attention_dim=24, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    pipeline = UNetPipeline(unet.eval(), make_scheduler(ObjectiveConfig(schedule="squared_cosine")))
    pipeline.use_scheduler("ddim")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TEXT = torch.zeros(1, 7, 24)
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "give prompt="),
    ({"prompt": "a cat"}, "needs the pipeline's text_encoder"),
    ({"prompt_embeds": TEXT, "prompt": "a cat"}, "but not both"),
    ({"prompt_embeds": TEXT[..., :23]}, r"the texts are 23 wide, but the network reads texts \[24\] wide"),
    ({"prompt_embeds": TEXT[0]}, r"prompt_embeds are \(7, 24\)"),
    ({"prompt_embeds": TEXT.expand(2, -1, -1)}, "1 images take 1 or 1"),
    ({"prompt_embeds": TEXT, "guidance_scale": 2}, "guidance needs negative_prompt_embeds"),
    ({"prompt_embeds": TEXT, "guidance_scale": 2, "negative_prompt": "a dog"}, "guidance needs negative_prompt_embeds"),
    ({"prompt_embeds": TEXT, "negative_prompt": "a dog"}, "guidance_scale is 1, which is no guidance"),
    ({"prompt_embeds": TEXT, "negative_prompt_embeds": TEXT}, "guidance_scale is 1, which is no guidance"),
    ({"prompt_embeds": TEXT, "guidance_scale": 2, "negative_prompt": "a dog", "negative_prompt_embeds": TEXT}, "both"),
    ({"prompt_embeds": TEXT, "guidance_scale": 2, "negative_prompt_embeds": TEXT[:, :5]}, "one text like the others"),
    ({"prompt_embeds": TEXT, "class_labels": 1}, "class_labels were given"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "diffusers'"])
def test_texts_that_contradict_the_network_or_each_other_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = of_texts(kind)
    assert pipeline(0, prompt_embeds=TEXT, guidance_scale=2, negative_prompt_embeds=TEXT, num_inference_steps=1).images
    monkeypatch.setattr(type(pipeline.unet), "forward", step)
    for given, message in CONTRADICTIONS:
        with pytest.raises(ValueError, match=message):
            pipeline(0, **given)


@pytest.mark.parametrize("name", ["ddpm", "heun", "kdpm2", "euler", "unipc"])
def test_an_interval_is_refused_where_no_step_lies_in_it_and_not_where_one_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = digits(name)
    settings = {"class_labels": 1, "guidance_scale": 2, "num_inference_steps": 10}
    with pytest.raises(ValueError, match="none of them in it"):
        pipeline(0, guidance_interval=(1e6, 1e7), **settings)
    scales: list[float] = []
    plain = type(pipeline.unet).forward
    monkeypatch.setattr(type(pipeline.unet), "forward", lambda *a, **k: (scales.append(1), plain(*a, **k))[1])
    pipeline(0, guidance_interval=(0.5, 5), **settings)
    guided = len(scales)
    scales.clear()
    pipeline(0, **settings | {"guidance_scale": 1})
    assert len(scales) < guided < 2 * len(scales)
