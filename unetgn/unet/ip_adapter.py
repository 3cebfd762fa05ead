"""Takes IP-Adapters as diffusers' pipelines give them, and what these ask of attention processors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from diffusers import ModelMixin
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

from unetgn.messages import said, short
from unetgn.nn.attention import AddedKVAttention, MultiHeadAttention, SelfAttention
from unetgn.nn.image_prompts import ImagePrompts
from unetgn.unet.adapters import THE_WAY
from unetgn.unet.config import UNetConfig

_PLAIN = (AttnProcessor, AttnProcessor2_0, AttnAddedKVProcessor, AttnAddedKVProcessor2_0)  # what is computed anyway
_LORA = tuple(f".to_{name}_lora.{part}.weight" for name in ("q", "k", "v", "out") for part in ("down", "up"))
Attention = AddedKVAttention | MultiHeadAttention | SelfAttention


class ImageProcessor(IPAdapterAttnProcessor2_0):
    """Gives diffusers, which looks for a processor, the scales of an attention with image prompts, to be set."""

    def __init__(self, scale: list[float]) -> None:
        nn.Module.__init__(self)
        self.scale = scale


class IPAdapters:
    """Gives `UNet`, which is a module, what `load_ip_adapter` and its companions call in diffusers' pipelines.

    An adapter's layers join the network: `image_prompts` of the attention to text (`unetgn.nn.image_prompts`), and
    `encoder_hid_proj`, diffusers' own, which makes tokens of the image's embedding. They are taken out again by
    `unload_ip_adapter`.
    """

    unet_config: UNetConfig
    encoder_hid_proj: Any
    text_encoder_hid_proj: Any

    @property
    def has_ip_adapters(self) -> bool:
        """Return True from `load_ip_adapter` to `unload_ip_adapter`."""
        return isinstance(self.encoder_hid_proj, MultiIPAdapterImageProjection)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Name a processor for each attention, as diffusers does and in its order: plain ones, and IP-Adapters'."""
        return {name: _processor(attention) for name, attention in self._attentions()}

    def set_attn_processor(self, processor: Any) -> None:
        """Take processors that compute what is computed without any; IP-Adapters are left out where they stood.

        processor: one for all, or a dictionary of one for each name of `attn_processors`. Raises ValueError for others.
        """
        attentions = dict(self._attentions())
        given = processor if isinstance(processor, dict) else dict.fromkeys(attentions, processor)
        if given.keys() != attentions.keys():
            unknown, missing = (sorted(a.keys() - b.keys()) for a, b in ((given, attentions), (attentions, given)))
            raise ValueError(
                f"set_attn_processor needs the names of attn_processors: {short(unknown)} are none, and {len(missing)} "
                "are missing"
            )
        for name, one in given.items():
            own = attentions[name].image_prompts
            kept = isinstance(one, ImageProcessor) and own is not None and one.scale is own.scales
            if not kept and type(one) not in _PLAIN:
                raise ValueError(
                    f"UNet has no place for {type(one).__name__}: attention is computed in one way. {THE_WAY}"
                )
        for name, one in given.items():
            if not isinstance(one, ImageProcessor):
                attentions[name].image_prompts = None

    def _attentions(self) -> Iterator[tuple[str, Attention]]:
        network = cast(nn.Module, self)
        for side in ("down_blocks", "up_blocks", "mid_block"):  # diffusers' order, by which files number layers
            for name, module in network.get_submodule(side).named_modules(prefix=side):
                if isinstance(module, Attention):
                    yield f"{name}.processor", module

    def _load_ip_adapter_weights(self, state_dicts: Any, low_cpu_mem_usage: bool = True) -> None:
        """Take the adapters of state_dicts, {"image_proj": …, "ip_adapter": …} each, in the place of earlier ones.

        Nothing is changed where one does not fit: ValueError says which tensor.
        """
        states = state_dicts if isinstance(state_dicts, list) else [state_dicts]
        network, config = cast(ModelMixin, self), self.unet_config
        attentions = list(self._attentions())
        layers = [(name, layer) for name, layer in attentions if name.endswith(".attn2.processor")]
        _check_network(config, alone=len(attentions) == 2 * len(layers))
        weights = [_read(state, layers) for state in states]
        projections = [self._projection(state["image_proj"]) for state in states]
        for position, (_, layer) in enumerate(layers):
            prompts = ImagePrompts(layer.to_k.in_features, layer.to_k.out_features, count=len(states))
            prompts.load_state_dict(
                {
                    f"{part}.{index}.weight": own[position][part]
                    for index, own in enumerate(weights)
                    for part in ("to_k_ip", "to_v_ip")
                }
            )
            layer.image_prompts = prompts.requires_grad_(False)
        if config.condition.context_dim is not None and self.text_encoder_hid_proj is None:
            self.text_encoder_hid_proj = self.encoder_hid_proj  # diffusers' name, from which unloading takes it back
        self.encoder_hid_proj = MultiIPAdapterImageProjection(projections).requires_grad_(False)
        network.to(dtype=network.dtype, device=network.device)

    _load_ip_adapter_loras = UNet2DConditionLoadersMixin._load_ip_adapter_loras  # of FaceID

    def _projection(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Build diffusers' layer that makes tokens of an image's embedding. Raises ValueError where tensors differ."""
        convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
        try:
            projection: nn.Module = convert(self, dict(state), low_cpu_mem_usage=False)
        except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"an IP-Adapter's image_proj is damaged, or of no kind that diffusers knows: {said(error)}"
            ) from error
        norm: Any = projection.norm if hasattr(projection, "norm") else projection.norm_out
        width, expected = norm.normalized_shape[0], self.unet_config.context_dims
        if width != expected:
            raise ValueError(
                f"an IP-Adapter's image_proj makes tokens of width {width}, and this network reads {expected}: it is "
                "for another network"
            )
        return projection

    def read_images(self, added: Mapping[str, Any] | None, batch: int) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """Take "image_embeds" out of added_cond_kwargs: return the others, and tokens (N, T, width) for each adapter.

        Raises ValueError where embeddings are missing, or not (N, images, …) for each adapter.
        """
        adapters = cast(MultiIPAdapterImageProjection, self.encoder_hid_proj)
        others = dict(added or {})
        given = others.pop("image_embeds", None)
        count = adapters.num_ip_adapters
        if not isinstance(given, (list, tuple)) or len(given) != count or not all(_has_images(i, batch) for i in given):
            raise ValueError(
                f"{count} IP-Adapter{'s read' if count > 1 else ' reads'} added_cond_kwargs['image_embeds'] (of a "
                f"pipeline: ip_adapter_image_embeds), a list of one tensor ({batch}, images, …) for each; got "
                f"{_shapes(given)}. pipeline.unload_ip_adapter() takes adapters out"
            )
        dtype = next(adapters.parameters()).dtype
        tokens = tuple(image.flatten(1, 2) for image in adapters([image.to(dtype) for image in given]))
        return others, tokens


def _processor(attention: Attention) -> Any:
    if attention.image_prompts is not None:
        return ImageProcessor(attention.image_prompts.scales)
    return AttnAddedKVProcessor2_0() if isinstance(attention, AddedKVAttention) else AttnProcessor2_0()


def _check_network(config: UNetConfig, *, alone: bool) -> None:
    """Raise ValueError where a network has no place for IP-Adapters: `alone` if all its attention is transformers'."""
    transformer = config.transformer
    if transformer is None or transformer.context_dim is None or not alone:
        raise ValueError(
            "an IP-Adapter needs a network all of whose attention is transformers that read a context "
            "(transformer.context_dim), and this is another"
        )
    reasons = {
        "transformer.grounding": transformer.grounding is not None,
        "attention.qk_norm": config.attention.qk_norm,
        f"condition.context_projection={config.condition.context_projection!r}": (
            config.condition.context_dim is not None and config.condition.context_projection != "text"
        ),
    }
    for reason, there in reasons.items():
        if there:
            raise ValueError(f"an IP-Adapter does not go together with {reason}")


def _read(state: Any, layers: Sequence[tuple[str, Attention]]) -> list[dict[str, Tensor]]:
    """Take to_k_ip and to_v_ip of each layer from an adapter's state, which numbers layers 1, 3, 5 and so on.

    Raises ValueError, naming the first, for tensors that are missing, of another shape, or of no layer.
    """
    parts = ("image_proj", "ip_adapter")
    if not isinstance(state, Mapping) or not all(isinstance(state.get(part), Mapping) for part in parts):
        keys = short(sorted(state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"an IP-Adapter is {{'image_proj': {{…}}, 'ip_adapter': {{…}}}}, two state dicts; got {keys}")
    given, taken = dict(state["ip_adapter"]), []
    for position, (name, layer) in enumerate(layers):
        shape, own = tuple(layer.to_k.weight.shape), {}
        for part in ("to_k_ip", "to_v_ip"):
            key = f"{2 * position + 1}.{part}.weight"
            tensor = given.pop(key, None)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                found = "is missing" if tensor is None else f"is {_shapes(tensor)}"
                raise ValueError(
                    f"the IP-Adapter's {key} {found}, and {name.removesuffix('.processor')} needs {shape}: the adapter "
                    "is damaged, or for another network"
                )
            own[part] = tensor
        taken.append(own)
    others = [key for key in given if not key.endswith(_LORA)]
    if others:
        raise ValueError(
            f"the IP-Adapter has {short(others[0])} and {len(others) - 1} more that this network, with {len(layers)} "
            "layers, has no place for: it is for another network"
        )
    return taken


def _has_images(image: Any, batch: int) -> bool:
    return isinstance(image, Tensor) and image.ndim >= 3 and image.shape[0] == batch


def _shapes(given: Any) -> str:
    if isinstance(given, (list, tuple)):
        return f"[{', '.join(_shapes(one) for one in given)}]"
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__
