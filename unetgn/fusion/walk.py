"""Walks over a model, and gives a stand-in to each block in which a norm meets SiLU: `fuse` and `unfuse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from unetgn.fusion import rules
from unetgn.fusion.activations import is_silu_module, register_activation, register_silu_functions
from unetgn.fusion.classes import forward_of
from unetgn.fusion.identities import hands_on, register_identity
from unetgn.fusion.norms import (
    calls_group_norm,
    child_norms,
    children,
    held_norms,
    is_other_norm,
    register_norm,
    register_norm_with_settings,
    why_not_fused,
)
from unetgn.fusion.projections import norm_before_projections, transposed_group_norm
from unetgn.fusion.report import FusedPlace, LeftPlace, Report
from unetgn.fusion.rewriting.forward import find_pairs
from unetgn.fusion.rewriting.names import OWN, Parts
from unetgn.fusion.source import CannotRewriteError, why_source_is_in_doubt
from unetgn.fusion.stand_in import StandIn, install, remove, stand_in_of
from unetgn.fusion.wrappers import CannotWrapError


class Fuse:
    """Put the fused GroupNorm + SiLU into somebody else's model, in place::

        print(unetgn.fuse(pipeline.unet))
        unetgn.unfuse(pipeline.unet)  # the model as it was, bit for bit

    Every block in which a group norm is followed by SiLU gets a forward, on the instance, that makes one call of the
    two. A time embedding that is added before the norm, and a scale-shift after it, go into the same call. Nothing else
    changes: classes, parameters, buffers, state dict, children and hooks stay, and so optimizers, LoRA layers, EMA
    copies and `save_pretrained` go on. A norm or activation that carries a hook runs as before for as long as it does.
    The norm before the projections of diffusers' attention, which has no SiLU, lays its result out once for all three.

    `fuse` knows modules by what they compute. A forward in which SiLU follows a group norm is rewritten, whoever wrote
    it; a class of norm or activation is recognised by its code and a trial. What is not proven equal is left, and the
    report says why. `fuse.rule` gives a block a forward that is written by hand. `fuse.read` lets fuse take the source
    of a class for what runs where that cannot be shown. Fusing a fused model changes nothing.

    Call it before anything wraps a forward in a way that hides it (`accelerator.prepare` in mixed precision does);
    hooks of accelerate and diffusers are no hindrance. `torch.compile`, `torch.export`, `torch.fx` and
    `torch.jit.trace` take a fused model where they take the model; unfuse it before `torch.jit.script`.

    Results lie in memory as the original's do, so seeded noise that is drawn like them is the same. On a GPU this holds
    for contiguous tensors alone: PyTorch's group norm makes channels_last contiguous there, and the operator keeps it.

    Returns a Report: what is fused, and which group norms are left and why. Raises TypeError for what is no module, and
    leaves the model as it was where anything is raised.
    """

    rule = staticmethod(rules.rule)
    read = staticmethod(rules.read)

    def __call__(self, model: nn.Module) -> Report:
        _check_is_module(model, "fuse")
        before = [(module, stand_in_of(module)) for module in model.modules()]
        try:
            return self._walk(model)
        except BaseException:
            for module, stand_in in before:
                _put_back(module, stand_in)
            raise

    def _walk(self, model: nn.Module) -> Report:
        _register_classes(model)
        fused: list[FusedPlace] = []
        left: list[LeftPlace] = []
        settled: set[str] = set()  # the paths of norms that are in the report: what is within them is no place
        for path, module in model.named_modules():
            if _is_within(path, settled):
                continue
            name = type(module).__name__
            known = (*child_norms(module), *held_norms(module))
            done = _fuse_module(module, {norm for norm in known if _join(path, norm) in settled})
            fused += [FusedPlace(_join(path, norm), name, norm, only) for norm, only in done.fused.items()]
            if OWN in done.fused:
                continue
            left += [LeftPlace(_join(path, norm), name, norm, reason) for norm, reason in done.left.items()]
            settled.update(_join(path, norm) for norm in (*done.fused, *done.left))
            if is_other_norm(module) and path and not done.fused:
                block, _, norm = path.rpartition(".")
                left.append(
                    LeftPlace(path, type(model.get_submodule(block)).__name__, norm, why_not_fused(module) or "")
                )
        return Report(type(model).__name__, tuple(fused), tuple(left))


fuse = Fuse()


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every block runs the forward of its class again. A model that is not fused stays as it is.

    Raises TypeError for what is no module.
    """
    _check_is_module(model, "unfuse")
    for module in model.modules():
        if stand_in_of(module) is not None:
            remove(module)


@dataclass(frozen=True)
class _Done:
    """Holds the norms of one block by their paths in it: fused, with what limits it, and left, with the reason."""

    fused: dict[str, str]
    left: dict[str, str]


def _register_classes(model: nn.Module) -> None:
    """Register the classes of the model that compute SiLU, nothing, or a norm that can take in SiLU; the walk asks."""
    modules = list(model.modules())
    for cls in {type(module): None for module in modules}:
        register_activation(cls)
        register_norm(cls)
    for module in modules:
        register_identity(module)
        register_norm_with_settings(module)


def _fuse_module(module: nn.Module, settled: set[str]) -> _Done:
    """Fuse what can be fused in this one module; `settled` are norms of it that a block around it has dealt with."""
    norms = {name: norm for name, norm in child_norms(module).items() if name not in settled and not _own_pairs(norm)}
    name = norm_before_projections(module)
    if name in norms:
        return _Done({}, {name: _lay_out(module, name)})
    rule = rules.block_rule(type(module))
    if rule is not None:
        return _fuse_by_rule(module, rule, norms, settled)
    own = _own_pairs(module)
    if own is not None:
        return _settle(module, own, {})
    if forward_of(module) not in (None, nn.Module.forward):
        held = {name: norm for name, norm in held_norms(module).items() if not _own_pairs(norm)}
        norms |= {name: norm for name, norm in held.items() if name not in settled}
    return _fuse_by_rewriting(module, norms)


def _fuse_by_rule(module: nn.Module, rule: rules.BlockRule, norms: dict[str, nn.Module], settled: set[str]) -> _Done:
    named = {name: _named_norm(module, name) for name in rule.norms(module) if name not in settled}
    named = {name: norm for name, norm in named.items() if not _own_pairs(norm)}
    reasons = {name: why_not_fused(norm) for name, norm in named.items()}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    left |= {name: _no_silu_after(module, name) for name in norms if name not in named}
    fusable = tuple(name for name, reason in reasons.items() if reason is None)
    refusal = rule.why_not(module) if fusable else None
    if refusal is not None:
        return _settle(module, None, left | dict.fromkeys(fusable, refusal))
    return _settle(module, StandIn(rule.method, fusable, function=rule.function, off=rule.off(module)), left)


def _fuse_by_rewriting(module: nn.Module, norms: dict[str, nn.Module]) -> _Done:
    reasons = {name: why_not_fused(norm) for name, norm in norms.items()}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    fusable = frozenset(name for name in norms if name not in left)
    if not fusable:
        return _settle(module, None, left)
    parts = _parts(module, fusable)
    try:
        pairs = find_pairs(type(module).forward, parts)
    except CannotRewriteError as error:
        return _settle(module, None, left | dict.fromkeys(sorted(fusable), str(error)))
    doubt = None if rules.is_readable(type(module)) else why_source_is_in_doubt(type(module).forward)
    if doubt is not None and pairs.norms:
        advice = f"{doubt}: unetgn.fuse.read({type(module).__name__}) lets fuse take it for what runs"
        left |= dict.fromkeys(pairs.norms, advice)
        return _settle(module, None, left | {name: _no_silu_after(module, name) for name in fusable - set(left)})
    instead = dict(pairs.instead)
    rest = (name for name in norms if name in fusable and name not in pairs.norms)
    left |= {name: instead.get(name) or _no_silu_after(module, name) for name in rest}
    return _settle(module, StandIn("forward", pairs.norms, parts=parts, only=pairs.only), left)


def _own_pairs(module: nn.Module) -> StandIn | None:
    """Return the stand-in of a module whose own forward calls the function group_norm and takes SiLU of the result."""
    cls: Any = type(module)
    if not calls_group_norm(module) or child_norms(module) or rules.block_rule(cls) is not None:
        return None
    parts = _parts(module, frozenset({OWN}))
    try:
        pairs = find_pairs(cls.forward, parts)
    except CannotRewriteError:
        return None
    doubt = None if rules.is_readable(cls) else why_source_is_in_doubt(cls.forward)
    if not pairs.norms or doubt is not None:
        return None
    only = ((OWN, "where its own forward takes SiLU of it"),)
    return StandIn("forward", pairs.norms, parts=parts, only=only)


def _settle(module: nn.Module, wanted: StandIn | None, left: dict[str, str]) -> _Done:
    """Give the module the stand-in that is wanted now, in the place of one that an earlier call gave it."""
    standing = stand_in_of(module)
    if wanted is None or not wanted.norms:
        if standing is not None and standing.norms:  # without norms it is that of `_lay_out`
            remove(module)
        return _Done({}, left)
    if standing != wanted:
        if standing is not None:
            remove(module)
        reason = _install(module, wanted)
        if reason is not None:
            return _Done({}, left | dict.fromkeys(wanted.norms, reason))
    for holder in {name.rpartition(".")[0] for name in wanted.norms} - {""}:
        if stand_in_of(module.get_submodule(holder)) is not None:
            remove(module.get_submodule(holder))  # it was fused by itself: now the block around it does
    only = dict(wanted.only)
    return _Done({name: only.get(name, "") for name in wanted.norms}, left)


def _install(module: nn.Module, stand_in: StandIn) -> str | None:
    """Put the stand-in in its place, or return why that cannot be."""
    try:
        if install(module, stand_in):
            return None
    except CannotWrapError as error:
        return str(error)
    return f"its {stand_in.method} is wrapped on the instance by another library: fuse first, wrap then"


def _put_back(module: nn.Module, stand_in: StandIn | None) -> None:
    """Give the module the stand-in that it had, or none."""
    standing = stand_in_of(module)
    if standing != stand_in:
        if standing is not None:
            remove(module)
        if stand_in is not None:
            install(module, stand_in)


def _lay_out(attention: nn.Module, name: str) -> str:
    """Put the stand-in for a norm that feeds projections on the norm itself; return what the report says of it."""
    norm = attention.get_submodule(name)
    if stand_in_of(norm) is None and not install(norm, StandIn("forward", (), function=transposed_group_norm)):
        return _no_silu_after(attention, name)
    return "no SiLU after it; its result is laid out once, and not copied by each projection"


def _no_silu_after(module: nn.Module, norm: str) -> str:
    """Return why a norm is left that could be fused: what comes after it, where `fuse` looks for SiLU."""
    cls: Any = type(module)
    known = (base for base in cls.__mro__[1:] if issubclass(base, nn.Module) and base is not nn.Module)
    base = next((base for base in known if rules.block_rule(base) or rules.is_readable(base)), None)
    if base is not None and not rules.is_readable(cls) and rules.block_rule(cls) is None:
        return f"{cls.__name__} has a forward of its own in place of {base.__name__}'s"
    if cls.forward is nn.Module.forward:
        return f"{cls.__name__} has no forward, and SiLU is looked for in that of the module that holds the norm"
    if cls.forward is not nn.Sequential.forward:
        return f"no SiLU comes right after it in the forward of {cls.__name__}"
    layers = children(module)
    after = [type(layer).__name__ for _, layer in layers[1 + [name for name, _ in layers].index(norm) :]]
    if not after:
        return f"it is the last layer of its {cls.__name__}, and what comes after that is not looked at"
    return f"no SiLU that fuse knows comes right after it in {cls.__name__}, but {after[0]}"


def _named_norm(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        name = type(module).__name__
        raise ValueError(f"the rule for {name} lists the norm {path!r}, which this {name} does not have") from None


def _parts(module: nn.Module, norms: frozenset[str]) -> Parts:
    """Return what counts of a module when its forward is rewritten."""
    activations = frozenset(name for name, child in children(module) if is_silu_module(child))
    identities = frozenset(name for name, child in children(module) if hands_on(child))
    return Parts(norms, activations | register_silu_functions(module), identities, type(module))


def _check_is_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module such as pipeline.unet, not {type(model).__name__}")


def _is_within(path: str, paths: set[str]) -> bool:
    """Return True where a path is one of these or leads further from one of them."""
    parts = path.split(".")
    return any(".".join(parts[:length]) in paths for length in range(1, len(parts) + 1))


def _join(path: str, name: str) -> str:
    if name == OWN:
        return path
    return f"{path}.{name}" if path else name
