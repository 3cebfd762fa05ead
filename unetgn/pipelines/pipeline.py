"""Defines our pipeline for diffusers: from seeds, classes and texts to pictures.

Folders that it saves carry this file and those that it imports from beside it, so that they work where only diffusers
is installed. They import nothing of ours but each other.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from .arguments import check_texts, told
from .card import write_card
from .inputs import read_seeds
from .levels import EDM
from .networks import NetworkFacts, facts_of
from .pictures import to_picture, to_uint8
from .planning import STEPS, Plan, Settings, make_plan
from .sampling import Start, sample, takes_texts
from .schedulers import class_like, like, training_of

PARTS = (
    "pipeline.py",
    "arguments.py",
    "card.py",
    "inputs.py",
    "levels.py",
    "networks.py",
    "pictures.py",
    "planning.py",
    "sampling.py",
    "schedulers.py",
)
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]


class UNetPipeline(DiffusionPipeline):
    """Draws images with a U-Net, ours or diffusers', that was trained to denoise; image n depends on seed n alone.

    `scheduler` says how the network was trained, and samples: any that `unetgn.pipelines.schedulers` names, with all
    that its config says. Networks with EDM's preconditioning take diffusers' EDM schedulers, and no others do. `vae`
    makes images of latents, `text_encoder` and `tokenizer` (CLIP's) read prompts. `null_class` is the label of no class
    of a network of diffusers' own class; ours know it themselves. The pipeline moves, offloads, saves and loads as
    diffusers' do; saved folders carry this sampler.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers' own way
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    scheduler: Any

    def __init__(
        self,
        unet: object,
        scheduler: object,
        vae: object = None,
        text_encoder: object = None,
        tokenizer: object = None,
        null_class: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(null_class=null_class)
        self._interrupt = False

    def use_scheduler(self, name: str) -> None:
        """Put the scheduler of this name, ours or diffusers', in the place of the one that is there.

        Of that one it takes what the network was trained on, and none of the options of sampling. Raises ValueError for
        one that is unknown or does not fit.
        """
        scheduler_class, extra = class_like(name, self.scheduler)
        self.scheduler = like(scheduler_class, training_of(self.scheduler), **extra)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels in a row or column of what one of the network's makes: 1 without an autoencoder."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def interrupt(self) -> bool:
        """Say whether a callback has asked, by `pipeline._interrupt = True`, to leave out the steps that remain."""
        return self._interrupt

    def facts(self) -> NetworkFacts:
        """Return what this pipeline has to know of its network. Raises ValueError where it cannot sample with it."""
        facts = facts_of(self.unet, self.config.null_class)
        if self.vae is not None:
            config = self.vae.config
            if config.latent_channels != facts.channels:
                raise ValueError(
                    f"the autoencoder makes images of latents with {config.latent_channels} channels, but those of the "
                    f"network have {facts.channels}: give the autoencoder of its training"
                )
            if config.get("latents_mean") is not None or config.get("latents_std") is not None:
                raise ValueError("the autoencoder normalizes each channel (latents_mean), which is not supported")
        return facts

    @torch.no_grad()
    def __call__(
        self,
        seeds: int | Sequence[int] = 0,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt: str | None = None,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        num_inference_steps: int = STEPS,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> Any:
        """Draw one image for each seed.

        seeds: numbers from 0 to 2**63 - 1, one image each. All noise of an image comes from a generator of its own.
        class_labels, prompt: one for all images, or one each. Without a label a network with classes draws any.
        negative_prompt: one for all images, which guidance leads away from (default: the empty one).
        prompt_embeds (N or 1, tokens, width) takes the place of prompt, negative_prompt_embeds (1, tokens, width) that
        of negative_prompt.
        guidance_scale, guidance_interval, guidance_rescale: see `unetgn.pipelines.sampling.Guidance`; scale 1 is off.
        image: what to begin with, one for all or one each: PIL, arrays (H, W, C) or tensors (C, H, W) in [0, 1];
        strength (default 0.8) is the share of the steps that change it. With mask_image, white where to draw,
        the rest stays as it is (and strength is 1 by default).
        latents (N, C, H, W): unit normal noise to begin with in the place of the seeds'.
        height, width: of the images (default: what the network was trained on).
        output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W) in [0, 1]; "latent": as the network has them.
        callback_on_step_end(pipeline, step, timestep, {"latents": …}) may return {"latents": …} to go on with, and set
        pipeline._interrupt to True, which leaves out the steps that remain: the image is as noisy as it is then.
        Returns an object with `.images`, or a tuple of them where return_dict is False.
        Raises ValueError, or TypeError for what is of another kind, before the first step where something does not fit.
        """
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end is {told(callback_on_step_end)}; a function is needed")
        check_texts("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs)
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ()
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; there is 'latents'")
        settings = Settings(
            class_labels=class_labels,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt=negative_prompt,
            negative_prompt_embeds=negative_prompt_embeds,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            num_inference_steps=num_inference_steps,
            image=image,
            strength=strength,
            mask_image=mask_image,
            latents=latents,
            height=height,
            width=width,
            output_type=output_type,
        )
        plan = self.plan(seeds, settings)

        def on_step_end(step: int, timestep: Tensor, noisy: Tensor) -> Tensor:
            bar.update()
            if callback_on_step_end is None:
                return noisy
            given = {"latents": noisy} if "latents" in callback_on_step_end_tensor_inputs else {}
            return (callback_on_step_end(self, step, timestep, given) or {}).get("latents", noisy)

        self._interrupt = False
        with self.progress_bar(total=len(plan.scheduler.timesteps)) as bar:
            made = self._sample(plan, on_step_end)
        images = self._output(made, plan, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def plan(self, seeds: Any, settings: Settings) -> Plan:
        """Check seeds and settings as a call with them does before its first step. Draws and changes nothing.

        Raises ValueError where something does not fit.
        """
        return make_plan(self, read_seeds(seeds), settings)

    def _sample(self, plan: Plan, on_step_end: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """Make (N, C, H, W) as the network has them."""
        return sample(
            self.unet,
            plan.scheduler,
            plan.seeds,
            plan.shape,
            class_labels=plan.class_labels,
            null_class=plan.null_class,
            texts=plan.texts,
            empty_text=plan.empty_text,
            guidance_scale=plan.guidance.scale,
            guidance_interval=plan.guidance.interval,
            guidance_rescale=plan.guidance.rescale,
            clip=self.vae is None and self.scheduler.config.get("clip_sample", True),
            start=None if plan.pixels is None else self._start(plan.pixels, plan.mask),
            noise=plan.noise,
            device=self._execution_device,
            on_step_end=on_step_end,
            interrupted=lambda: self.interrupt,
        )

    def _start(self, pixels: Tensor, mask: Tensor | None) -> Start:
        """Return what to begin with as the network has it: of latents the most likely ones."""
        if self.vae is None:
            return Start(pixels, mask)
        config, vae = self.vae.config, self.vae
        device = self._execution_device
        moments = [vae.encode(one[None].to(device, vae.dtype)).latent_dist.mode().float() for one in pixels]
        latents = (torch.cat(moments) - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        if mask is not None:  # a latent is drawn where any of its pixels is
            mask = torch.nn.functional.max_pool2d(mask, self.vae_scale_factor)
        return Start(latents, mask)

    def _output(self, made: Tensor, plan: Plan, output_type: str) -> Any:
        """Return what the network made in the form that was asked for; what a mask keeps is kept to the pixel."""
        if output_type == "latent":
            return made
        if self.vae is not None:
            made = self.decode(made)
            if plan.pixels is not None:
                made = Start(plan.pixels, plan.mask).keep(made, plan.pixels)
        if output_type == "pil":
            return [to_picture(pixels) for pixels in to_uint8(made)]
        images = (made / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()

    def decode(self, latents: Tensor) -> Tensor:
        """Make images (N, C, H, W) of the network's latents, on the CPU; one at a time, to save memory."""
        config, vae = self.vae.config, self.vae
        moments = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        device = self._execution_device
        return torch.cat([vae.decode(one[None].to(device, vae.dtype)).sample.float().cpu() for one in moments])

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts (N, tokens, width) with CLIP's text encoder; a longer one is cut off."""
        tokens = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        padding = {"padding": "max_length", "max_length": tokens, "truncation": True}
        ids = self.tokenizer(list(prompts), **padding, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self._execution_device))[0]

    def save_pretrained(self, save_directory: Any, *arguments: Any, push_to_hub: bool = False, **more: Any) -> None:
        """Save all parts as diffusers does, with this sampler's files and a README.md that says how to load them."""
        if push_to_hub:
            raise ValueError("save_pretrained does not upload: call pipeline.push_to_hub(NAME)")
        super().save_pretrained(save_directory, *arguments, **more)
        folder = Path(save_directory)
        for name in PARTS:
            source = Path(__file__).with_name(name)
            if source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        index = folder / "model_index.json"
        keys = json.loads(index.read_text(encoding="utf-8"))
        keys["_class_name"] = self.native_class() or ["pipeline", "UNetPipeline"]
        index.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        edm = type(self.scheduler).__name__ in EDM
        write_card(folder, self.facts(), native=self.native_class(), edm=edm)

    def native_class(self) -> str | None:
        """Name diffusers' own pipeline that draws what this one does, of itself; None where there is none."""
        facts = self.facts()
        if facts.ours or facts.num_classes is not None or type(self.scheduler).__name__ in EDM:
            return None
        if self.vae is None:  # of other schedulers it would clip no image
            plain = type(self.scheduler).__name__ == "DDPMScheduler" and not takes_texts(self.unet)
            return "DDPMPipeline" if plain else None
        shifted = self.vae.config.get("shift_factor")
        return "StableDiffusionPipeline" if facts.reads_text and self.tokenizer is not None and not shifted else None

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """Read a configuration; one that names this sampler's copy in the folder means this class."""
        keys = copy.copy(super()._dict_from_json_file(json_file))
        if isinstance(keys.get("_class_name"), list):
            keys["_class_name"] = cls.__name__
        return keys
