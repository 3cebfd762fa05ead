"""Defines the operator's arguments, once. Its schema, its differentiable arguments and what it saves follow from here.

An argument is added in this order: here; in `functional` and `checks`, for those who call; in `reference`, `aten` and
`triton`, which compute with it. docs/kernels.md has the list.
"""

from operator import itemgetter
from typing import NamedTuple, get_type_hints

from torch import Tensor

UNKNOWN_EPS = -1.0  # in a backward pass that was not told: it has rstd


# Named tuples, not dataclasses: one is made in each call, and a tuple takes a fifth of the time.
class Arguments(NamedTuple):
    """Holds the arguments of one call, in the order of the registered operator. `functional` says what they mean."""

    x: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: bool  # True for SiLU, False for none
    pre_bias: Tensor | None
    scale: Tensor | None  # (N, C), or a map: of x's own shape, with spatial axes
    shift: Tensor | None  # as scale
    implementation: str


class Needs(NamedTuple):
    """Says of each differentiable argument whether its gradient is asked for."""

    x: bool
    weight: bool
    bias: bool
    pre_bias: bool
    scale: bool
    shift: bool


class Gradients(NamedTuple):
    """Holds the gradient of each differentiable argument, in that argument's dtype; None where it is not asked for."""

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dpre_bias: Tensor | None
    dscale: Tensor | None
    dshift: Tensor | None


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}
_kinds = get_type_hints(Arguments)

SCHEMA = {name: f"{_SCHEMA_TYPES[_kinds[name]]} {name}" for name in Arguments._fields}  # as torch.library writes it
DIFFERENTIABLE = tuple(name for name in Arguments._fields if _SCHEMA_TYPES[_kinds[name]].startswith("Tensor"))
if Needs._fields != DIFFERENTIABLE or Gradients._fields != tuple(f"d{name}" for name in DIFFERENTIABLE):
    raise TypeError(f"Needs and Gradients must have a field for each tensor among Arguments: {DIFFERENTIABLE}")

_tensors = [Arguments._fields.index(name) for name in DIFFERENTIABLE]
_others = [place for place in range(len(Arguments._fields)) if place not in _tensors]
_places = [*_tensors, *_others]
_found = [_places.index(place) for place in range(len(_places))]

tensors_of = itemgetter(*_tensors)  # Arguments, or one value for each argument -> those of DIFFERENTIABLE
constants_of = itemgetter(*_others)  # the others
in_order = itemgetter(*_found)  # (*tensors_of(values), *constants_of(values)) -> values
spread = itemgetter(*(min(place, len(_tensors)) for place in _found))  # (*Gradients, None) -> one for each argument
