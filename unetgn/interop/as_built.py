"""Refuses a model that is not what its configuration builds: converting copies the configuration and the weights alone.

Tools change a model after it is built. They put weights elsewhere (offloading, quantization), wrap layers (adapters,
parametrizations) or forwards (compilers, hooks), and switch what is computed (FreeU, processors, any attribute). The
model is compared with a new one of its configuration, module by module, and each difference is refused by name, with
what undoes it. What changes no number is left out with a warning.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models import attention_processor
from torch import nn

from unetgn.interop.transfer import weight_faults
from unetgn.messages import short

_TORCHS = frozenset(vars(nn.Module()))
# These may differ: they come along, follow from another option, or are there for pipelines.
_FREE = {"gradient_checkpointing", "checkpointing", "checkpoint", "recompute", "fused_projections", "sample_size"}
_FREE |= {"inplace"}
_PLAIN = (bool, int, float, str, tuple, list, type(None))
_FREEU = ("s1", "s2", "b1", "b2")
_STAND_IN = "_unetgn_stand_in"  # of a fused module, whose forward computes the same
_SAME_ATTENTION = ({"AttnProcessor", "AttnProcessor2_0"}, {"AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"})
_LEAN_ATTENTION = ("SlicedAttnProcessor", "XFormersAttnProcessor", "XLAFlashAttnProcessor2_0", "AttnProcessorNPU")
_ACCELERATES = "accelerate.hooks.remove_hook_from_module(model, recurse=True) first, or load it without device_map"
_HOOKS = {
    "group_offloading": "convert it before enable_group_offload, and call that on the result",
    "layerwise_casting": "convert it before enable_layerwise_casting, and call that on the result",
}


def check_whole(model: nn.Module) -> None:
    """Raise ValueError, saying what to do first, where a model is wrapped or its weights are not plainly there.

    One without any weights, on the meta device, stands for names and shapes: a warning says so.
    """
    name = type(model).__name__
    for is_so, what, advice in _wholes(model):
        if is_so:
            raise ValueError(f"{name} {what}: {advice}")
    if all(parameter.is_meta for parameter in model.parameters()):
        warnings.warn(
            f"{name} is on the meta device, without weights, and so is what it is converted to: load its weights first "
            "(load_state_dict(weights, assign=True)), unless names and shapes will do",
            stacklevel=4,
        )


def _wholes(model: nn.Module) -> Iterator[tuple[bool, str, str]]:
    """Yield what may be the matter with a whole model, in the order in which it has to be undone."""
    modules = dict(model.named_modules())
    holds = {name: [path for path, module in modules.items() if vars(module).get(name) is not None] for name in _MARKS}
    yield hasattr(model, "_orig_mod"), "is compiled", "convert model._orig_mod, and compile the result"
    yield isinstance(getattr(model, "module", None), nn.Module), "wraps a model", "convert model.module"
    images = getattr(model, "encoder_hid_proj", None)
    ip_adapters = hasattr(images, "image_projection_layers")
    yield ip_adapters, "has IP-Adapters", "pipeline.unload_ip_adapter() first, and load them with the result"
    yield hasattr(model, "merge_and_unload"), "has adapters of PEFT", "convert model.merge_and_unload()"
    adapted = [path for path, module in modules.items() if hasattr(module, "base_layer")]
    unload = "model.fuse_lora() and model.unload_lora() first"
    if not hasattr(model, "unload_lora"):
        unload = "convert it before peft.inject_adapter_in_model, and call that on the result"
    yield bool(adapted), f"has adapters of PEFT at {_some(adapted)}", unload
    compiled = holds["_compiled_call_impl"]
    in_place = "convert it before .compile(), and compile the result (_compiled_call_impl = None takes it back)"
    yield bool(compiled), f"is compiled in place at {_some(compiled)}", in_place
    offloaded = holds["_hf_hook"]
    yield bool(offloaded), f"is offloaded or dispatched by accelerate (at {_some(offloaded)})", _ACCELERATES
    for path in holds["_diffusers_hook"]:
        for hook in vars(modules[path])["_diffusers_hook"].hooks:
            advice = _HOOKS.get(hook, "convert it before that is enabled, or disable it")
            yield True, f"has diffusers' hook {hook!r} at {_some([path])}", advice
    quantized = bool(getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None))
    yield quantized, "is quantized", "load it without quantization_config (or model.dequantize() where there is that)"
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mapped = hasattr(model, "hf_device_map") and any(tensor.is_meta for tensor in tensors.values())
    yield mapped, "has weights on the meta device", "load all of its weights first, without device_map"
    yield from weight_faults(tensors)


_MARKS = ("_compiled_call_impl", "_hf_hook", "_diffusers_hook")


def check_as_built(model: nn.Module, reference: nn.Module) -> None:
    """Raise ValueError where a model differs from `reference`, which its configuration builds.

    Warns where it differs in options that change no number and do not come along.
    """
    modules = dict(model.named_modules())
    left_out: list[str] = []
    for path, built in reference.named_modules():
        where = path or type(model).__name__
        module = modules.get(path)
        if module is None:
            raise ValueError(f"{where} is not there, where the configuration builds {type(built).__name__}")
        for difference in _differences(module, built, is_root=not path):
            if not difference.startswith(_LEAN):
                raise ValueError(f"{where} {difference}")
            left_out.append(difference.removeprefix(_LEAN))
    if left_out:
        text = f"not in the converted network, since they change no number: {', '.join(sorted(set(left_out)))}"
        warnings.warn(text, stacklevel=2)


_LEAN = "is leaner by "


def _differences(module: nn.Module, built: nn.Module, *, is_root: bool) -> Iterator[str]:
    """Say how a module differs from the one that was built."""
    kind, expected = type(module), type(built)
    if kind is not expected and not (is_root and getattr(kind, "forward", None) is expected.forward):
        advice = "undo what replaced it"
        if torch.nn.utils.parametrize.is_parametrized(module):
            advice = "torch.nn.utils.parametrize.remove_parametrizations(module, name) first"
        given = kind.__name__ if kind.__name__ != expected.__name__ else f"{kind.__module__}.{kind.__name__}"
        yield f"is {given}, where the configuration builds {expected.__name__}: {advice}"
        return
    attributes = vars(module)
    hooks = [name for name in _TORCHS if name.endswith("_hooks") and _runs(name) and attributes.get(name)]
    if hooks:
        yield f"has {', '.join(sorted(hooks))}, which do not come along: remove them first (handle.remove())"
    forward = attributes.get("forward", module.forward)
    if getattr(forward, "__func__", None) not in _own_forwards(kind) and _STAND_IN not in attributes:
        unwrap = "undo that first (accelerator.unwrap_model(model, keep_fp32_wrapper=False), if it was prepare)"
        yield f"has a forward of its own on the instance: {unwrap}"
    if any(attributes.get(name) is not None for name in _FREEU):
        yield "has FreeU (s1, s2, b1, b2): model.disable_freeu() first"
    for name, value in vars(built).items():
        if name == "processor":
            yield from _attention(module, value)
        elif name == "_chunk_size" and attributes.get(name) != value:
            yield f"{_LEAN}enable_forward_chunking"
        elif name in _TORCHS or name in _FREE or name.startswith("_") or not isinstance(value, _PLAIN):
            continue
        elif getattr(module, name, None) != value:
            found = short(getattr(module, name, None))
            yield (
                f"has {name}={found}, where the configuration builds {name}={short(value)}: set it back, or say it in "
                "the configuration (model.register_to_config)"
            )


def _own_forwards(kind: Any) -> list[Any]:
    """Return the forward of a class and what it decorates: accelerate binds the innermost when it takes itself off."""
    forwards = [kind.forward]
    while hasattr(forwards[-1], "__wrapped__"):
        forwards.append(forwards[-1].__wrapped__)
    return forwards


def _runs(name: str) -> bool:
    """Return True for the hooks that run with a forward or backward pass, and not with loading and saving."""
    return name.startswith(("_forward", "_backward"))


def _attention(module: Any, built: Any) -> Iterator[str]:
    kind = type(module.processor)
    known = kind.__module__ == attention_processor.__name__
    if known and kind.__name__ in _LEAN_ATTENTION:
        yield f"{_LEAN}{kind.__name__}"
    elif known and kind.__name__.startswith("Fused"):
        yield f"attends by {kind.__name__}: model.unfuse_qkv_projections() first"
    elif kind is not type(built) and not any({kind.__name__, type(built).__name__} <= same for same in _SAME_ATTENTION):
        plain = f"diffusers.models.attention_processor.{type(built).__name__}()"
        yield f"attends by {kind.__name__}, which may compute something else: .set_processor({plain}) there first"


def _some(paths: Iterable[str]) -> str:
    first, *rest = [path or "the model itself" for path in paths] or [""]
    return f"{first} and {len(rest)} more" if rest else first
