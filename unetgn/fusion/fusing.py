"""`fuse` and `unfuse`: one walk over a model, one stand-in for each block in which a norm meets SiLU."""

from __future__ import annotations

from torch import nn

from unetgn.fusion import rules
from unetgn.fusion.projections import norm_before_projections, transposed_group_norm
from unetgn.fusion.reading import CannotReadError, find_pairs
from unetgn.fusion.recognition import learn_silu
from unetgn.fusion.report import FusedPlace, LeftPlace, Report
from unetgn.fusion.stand_in import StandIn, install, remove, stand_in_of


class Fuse:
    """Put the fused GroupNorm + SiLU into somebody else's model, in place::

        print(unetgn.fuse(pipeline.unet))
        unetgn.unfuse(pipeline.unet)  # the model as it was, bit for bit

    Every block in which a group norm is followed by SiLU gets a forward, on the instance, that makes one call of the
    two; a time embedding that is added before the norm and a scale-shift after it go into the same call. Nothing else
    changes: classes, parameters, buffers, state dict, children and hooks stay, and so optimizers, LoRA layers, EMA
    copies and `save_pretrained` go on. A norm or activation that carries a hook runs as before for as long as it does.
    The norm before the projections of diffusers' attention, which has no SiLU, lays its result out once for all three.

    Known are `nn.Sequential`, all of diffusers and MONAI, and blocks with the structure of guided-diffusion's and
    CompVis's; `fuse.rule` teaches a block whose forward has to be rewritten, `fuse.read` one in which SiLU directly
    follows the norm. Call it before anything wraps a forward in a way that hides it (`accelerator.prepare` in mixed
    precision does); hooks of accelerate and diffusers are no hindrance. Fusing a fused model changes nothing.

    Returns a Report: what is fused, and which group norms are left and why. Raises TypeError for what is no module.
    """

    rule = staticmethod(rules.rule)
    read = staticmethod(rules.read)

    def __call__(self, model: nn.Module) -> Report:
        if not isinstance(model, nn.Module):
            raise TypeError(f"fuse takes a torch.nn.Module such as pipeline.unet, not {type(model).__name__}")
        fused: list[FusedPlace] = []
        left: list[LeftPlace] = []
        settled: set[nn.Module] = set()
        for path, module in model.named_modules():
            if module in settled:
                continue
            reasons = _fuse_module(module, settled)
            stand_in = stand_in_of(module)
            for norm in stand_in.norms if stand_in is not None else ():
                fused.append(FusedPlace(_join(path, norm), type(module).__name__, norm))
                settled.update(module.get_submodule(norm).modules())
            for norm, reason in reasons.items():
                left.append(LeftPlace(_join(path, norm), type(module).__name__, norm, reason))
                settled.update(module.get_submodule(norm).modules())
        return Report(type(model).__name__, tuple(fused), tuple(left))


fuse = Fuse()


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every block runs the forward of its class again. A model that is not fused stays as it is."""
    for module in model.modules():
        if stand_in_of(module) is not None:
            remove(module)


def _fuse_module(module: nn.Module, settled: set[nn.Module]) -> dict[str, str]:
    """Fuse what can be in this one module; the direct norms that are left, with the reasons."""
    norms = {name: norm for name, norm in module.named_children() if rules.is_norm(norm) and norm not in settled}
    name = norm_before_projections(module)
    if name in norms:
        return {name: _lay_out(module, name)}
    rule = rules.block_rule(type(module))
    if rule is not None:
        return _fuse_by_rule(module, rule, norms, settled)
    return _fuse_by_reading(module, norms) if norms else {}


def _fuse_by_rule(
    module: nn.Module, rule: rules.BlockRule, norms: dict[str, nn.Module], settled: set[nn.Module]
) -> dict[str, str]:
    named = {name: module.get_submodule(name) for name in rule.norms(module)}
    reasons = {name: rules.why_not_folded(norm) for name, norm in named.items() if norm not in settled}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    left |= {name: _no_silu_after(module) for name in norms if name not in named}
    foldable = tuple(name for name, reason in reasons.items() if reason is None)
    if not foldable:
        return left
    unknown = rules.unknown_names(getattr(type(module), rule.method), rule.uses) if rule.uses is not None else None
    if unknown is not None:
        return left | dict.fromkeys(foldable, unknown)
    return left | _install(StandIn(module, rule.method, foldable, function=rule.function))


def _fuse_by_reading(module: nn.Module, norms: dict[str, nn.Module]) -> dict[str, str]:
    reasons = {name: rules.why_not_folded(norm) for name, norm in norms.items()}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    foldable = frozenset(name for name in norms if name not in left)
    if not rules.is_readable(type(module)):
        return left | _why_unread(module, foldable)
    activations = _activations(module)
    try:
        joined = find_pairs(type(module).forward, foldable, activations)
    except CannotReadError as error:
        return left | dict.fromkeys(sorted(foldable), str(error))
    left |= {name: _no_silu_after(module) for name in norms if name in foldable and name not in joined}
    return left | (_install(StandIn(module, "forward", joined, activations=activations)) if joined else {})


def _lay_out(attention: nn.Module, name: str) -> str:
    """Put the stand-in for a norm that feeds projections on the norm itself; what the report says of the norm."""
    stand_in = StandIn(attention.get_submodule(name), "forward", (), function=transposed_group_norm)
    if stand_in_of(stand_in.module) is None and not install(stand_in):
        return _no_silu_after(attention)
    return "no SiLU after it; its result is laid out once, and not copied by each projection"


def _install(stand_in: StandIn) -> dict[str, str]:
    if stand_in_of(stand_in.module) is not None or install(stand_in):
        return {}
    reason = f"its {stand_in.method} is wrapped on the instance by another library: fuse first, wrap then"
    return dict.fromkeys(stand_in.norms, reason)


def _no_silu_after(module: nn.Module) -> str:
    return f"no SiLU comes right after it in the forward of {type(module).__name__}"


def _why_unread(module: nn.Module, norms: frozenset[str]) -> dict[str, str]:
    """Why the norms of a block without a rule are left: it stands in for a block with one, or may only need reading."""
    cls = type(module)
    known = (base for base in cls.__mro__[1:] if issubclass(base, nn.Module) and base is not nn.Module)
    base = next((base for base in known if rules.block_rule(base) or rules.is_readable(base)), None)
    if base is not None:
        return dict.fromkeys(sorted(norms), f"{cls.__name__} has a forward of its own in place of {base.__name__}'s")
    try:
        joined = find_pairs(cls.forward, norms, _activations(module))
    except CannotReadError:
        joined = ()
    advice = f"no rule for {cls.__name__}: unetgn.fuse.read({cls.__name__}) lets fuse read its forward"
    return {name: advice if name in joined else _no_silu_after(module) for name in sorted(norms)}


def _activations(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, child in module.named_children() if learn_silu(child))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
