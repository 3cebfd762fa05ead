"""Watches a run of a model: the places where a group norm's result reaches SiLU, and the norms that are fused.

There are two watchers, because the first hooks every module, and a hook on a norm makes a fused block run as it was
written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unetgn import ops

norm_silu = importlib.import_module("unetgn.fusion.norm_silu")  # the module: the package has a function of that name
ATEN = torch.ops.aten
CARRIES = {
    ATEN.mul.Tensor,
    ATEN.add.Tensor,
    ATEN.cat.default,
    ATEN.clone.default,
    ATEN._unsafe_view.default,
    ATEN.addcmul.default,
    ATEN._to_copy.default,
}


class PlaceWatcher(TorchDispatchMode):
    """Notes the paths of the modules that computed a group norm whose result reached a SiLU, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, None] = {}
        self._running: list[str] = []
        self._made_by: dict[int, tuple[Tensor, str]] = {}
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}  # from the sigmoid of such a result to itself and the result
        self._hooks = []
        for path, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda _m, _a, path=path: self._running.append(path)))
            self._hooks.append(module.register_forward_hook(lambda _m, _a, _o: self._leave(), always_call=True))

    def _leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (ATEN.mul.Tensor, ATEN.mul_.Tensor):
            self._look_for_gate(*args)
        if func is ATEN.native_group_norm.default:
            self._made_by[id(result[0])] = (result[0], self._running[-1])
        elif func in CARRIES or func.is_view:
            given = args[0] if func is ATEN.cat.default else args
            sources = [self._made_by[id(t)][1] for t in given if isinstance(t, Tensor) and id(t) in self._made_by]
            for made in result if isinstance(result, (list, tuple)) else [result]:
                if sources:
                    self._made_by[id(made)] = (made, sources[0])
        elif func in (ATEN.silu.default, ATEN.silu_.default) and id(args[0]) in self._made_by:
            self.places[self._made_by[id(args[0])][1]] = None
        elif func is ATEN.sigmoid.default and id(args[0]) in self._made_by:
            self._gates[id(result)] = (result, args[0])
        return result

    def _look_for_gate(self, one: Any, other: Any) -> None:
        """Note a place where SiLU is written out, as a product with the sigmoid."""
        for plain, gate in ((one, other), (other, one)):
            if id(gate) in self._gates and self._gates[id(gate)][1] is plain:
                self.places[self._made_by[id(plain)][1]] = None

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()


class OperatorWatcher:
    """Notes the paths of the norms that reach the fused operator, SiLU included, while it is entered.

    A norm is known by its weight; one without a weight by the norm that holds it, which is being fused then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reached: dict[str, None] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._weights = {
            id(module.weight): path
            for path, module in model.named_modules()
            if hasattr(module, "num_groups") and isinstance(getattr(module, "weight", None), Tensor)
        }
        self._fusing: list[str] = []
        self._patches = ExitStack()
        self._operator, self._fused_forward = ops.group_norm_silu, vars(norm_silu)["fused_forward"]

    def __enter__(self) -> OperatorWatcher:
        self._patches.enter_context(mock.patch.object(ops, "group_norm_silu", self._note))
        self._patches.enter_context(mock.patch.object(norm_silu, "fused_forward", self._noting_forward))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()

    def _note(self, x: Tensor, num_groups: int, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        path = self._weights.get(id(weight)) or (self._fusing[-1] if self._fusing else None)
        if path is not None and kwargs.get("activation", "silu") == "silu":
            self.reached[path] = None
        return self._operator(x, num_groups, weight, *args, **kwargs)

    def _noting_forward(self, norm: nn.Module) -> Callable[..., Tensor] | None:
        fused: Callable[..., Tensor] | None = self._fused_forward(norm)
        if fused is None:
            return None

        def noting(norm: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            self._fusing.append(self._paths[id(norm)])
            try:
                return fused(norm, *args, **kwargs)
            finally:
                self._fusing.pop()

        return noting
