"""Writes the README.md of a saved pipeline: what it is, and how it is loaded with diffusers alone or with unetgn.

This file needs nothing of ours but the files beside it: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

from pathlib import Path

from .networks import NetworkFacts

NAME = "README.md"
OURS = """---
library_name: diffusers
tags: [unetgn]
"""  # how ours begin; what the hub shows of a model follows, up to the next ---
# The folder as the lines of a card name it, and what is said of that; on the hub there is a name, and nothing to say.
HERE = '"."'
WHERE = "These lines are for a Python that was started in this folder; from elsewhere write its path for `.`. "
HEADER = f"{OURS}license: unknown\n---\n"


def write_card(folder: Path, facts: NetworkFacts, *, native: str | None, edm: bool = False) -> None:
    """Write README.md, unless somebody has written one there."""
    file = folder / NAME
    if not file.exists() or file.read_text(encoding="utf-8").startswith(OURS):
        file.write_text(HEADER + model_card(facts, native=native, edm=edm), encoding="utf-8")


def model_card(facts: NetworkFacts, *, native: str | None, edm: bool = False) -> str:
    """Write the text of the card; `edm` says that the network has EDM's preconditioning."""
    call = "seeds=range(8)"
    if facts.num_classes is not None:
        call += f", class_labels={min(3, facts.num_classes - 1)}"
    if facts.reads_text:
        call += ', prompt="a cat"'
    if facts.unlabelled and not facts.captions_only and (facts.num_classes is not None or facts.reads_text):
        call += ", guidance_scale=2"
    what = ["A U-Net that draws images, with the sampler that belongs to it."]
    if facts.num_classes is not None:
        what.append(f"Its classes are the numbers 0 to {facts.num_classes - 1}.")
    if facts.reads_text:
        what.append("It reads prompts.")
    if facts.ours:
        need = "Its network is `unetgn.UNet`, which diffusers cannot express: `pip install unetgn`."
        lines = ["from unetgn.pipelines import UNetPipeline", "", f"pipeline = UNetPipeline.from_pretrained({HERE})"]
    else:
        need = (
            "With diffusers alone (the sampler is in this folder, in plain Python: read it, since `trust_remote_code` "
            "runs it):"
        )
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({HERE}, custom_pipeline={HERE}, trust_remote_code=True)",
        ]
    code = "\n".join([*lines, f'pipeline({call}).images[0].save("image.png")'])
    parts = [
        "# A diffusion U-Net\n",
        " ".join(what) + "\n",
        need + "\n",
        f"```python\n{code}\n```\n",
        f"{WHERE}Image n depends on the weights, the settings and seed n alone. "
        "`help(pipeline.__call__)` lists what else it does: guidance in an interval of noise levels, schedulers "
        f'(`pipeline.use_scheduler("{"edm_euler" if edm else "dpmsolver++"}")`), image to image, inpainting.\n',
    ]
    if edm:
        parts.append(
            "The network is F of EDM's preconditioning (Karras et al. 2022): it sees c_in·(image + sigma·noise) and, "
            "as its timestep, ln(sigma)/4; c_skip·x + c_out·F is the image. The scheduler in this folder has these "
            "factors. Schedulers of other kinds, and pipelines that do not call `scale_model_input` (`DDPMPipeline`), "
            "draw rubbish with it.\n"
        )
    if not facts.ours:
        parts.append(
            f"With unetgn installed, `unetgn.pipelines.UNetPipeline.from_pretrained({HERE})` runs no code from here.\n"
        )
    if native is not None:
        parts.append(f"diffusers' own `{native}.from_pretrained({HERE})` draws with this network, too.\n")
    return "\n".join(parts)
