"""Refuses what a sum or product of a forward refuses, where the operand is handed to the operator instead.

There None stands for an operand that is not there, and a number will do where torch.addcmul takes tensors alone.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import is_tensor_like


def operand(value: Any) -> Any:
    """Return an operand of a sum or product with a tensor. Raises TypeError for None, as these do."""
    if value is None:
        raise TypeError("unsupported operand type(s) for + or *: 'Tensor' and 'NoneType'")
    return value


def tensor(value: Any) -> Any:
    """Return an operand of torch.addcmul. Raises TypeError for what is no tensor, as it does."""
    if not is_tensor_like(value):
        raise TypeError(f"addcmul(): its operands must be Tensor, not {type(value).__name__}")
    return value
