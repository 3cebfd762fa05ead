"""Makes optimizers by name, and says what each keeps of a parameter: a checkpoint has to hold that, and no more.

torch has AdamW, Adam, SGD and Muon. AdamW of 8-bit state (Dettmers et al. 2022, arXiv 2110.02861) is bitsandbytes', and
Prodigy, which finds its step size itself (Mishchenko & Defazio 2024, arXiv 2306.06101), is prodigyopt's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unetgn.training.lora import trained_parameters

Name = Literal["adamw", "adam", "sgd", "adamw_8bit", "prodigy", "muon"]

# Where each comes from: the package to install, its module, the class.
CLASSES: dict[Name, tuple[str, str, str]] = {
    "adamw": ("torch", "torch.optim", "AdamW"),
    "adam": ("torch", "torch.optim", "Adam"),
    "sgd": ("torch", "torch.optim", "SGD"),
    "adamw_8bit": ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy"),
    "muon": ("torch>=2.9", "torch.optim", "Muon"),
}
FUSED = ("adamw", "adam")  # these step in one pass, and leave a step out by a flag on the device
ELEMENTWISE = ("adamw", "adam", "sgd")  # what these do to a part of a parameter does not depend on its other parts
BETAS_READ_BY = ("adamw", "adam", "adamw_8bit", "prodigy", "muon")

# By the key of OptimizerConfig: which optimizers read it.
READ_BY: dict[str, tuple[Name, ...]] = {
    "eps": ("adamw", "adam", "adamw_8bit", "prodigy"),
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd", "muon"),
    "adjust_lr_fn": ("muon",),
    "beta3": ("prodigy",),
    "d0": ("prodigy",),
    "d_coef": ("prodigy",),
    "growth_rate": ("prodigy",),
    "use_bias_correction": ("prodigy",),
    "safeguard_warmup": ("prodigy",),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Configures the optimizer. The learning rate, its schedule, weight decay and betas are keys of train.

    A key that is null takes the optimizer's own default; one that the optimizer does not read is refused.
    """

    name: Name = "adamw"
    """Optimizer: torch's adamw, adam (its weight decay is an L2 penalty), sgd or muon, bitsandbytes' adamw_8bit,
    prodigyopt's prodigy. Muon takes the matrices of linear layers; convolutions, classes, biases and norms go to AdamW,
    with train.betas."""
    eps: float | None = None
    """Added to the root of the second moment; not of sgd and muon."""
    momentum: float | None = None
    """Momentum of sgd (null: 0.9) and of muon (null: 0.95)."""
    nesterov: bool | None = None
    """Nesterov's momentum, in sgd (null: no) and muon (null: yes)."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    """Scale of muon's steps by a matrix's shape; null is match_rms_adamw, whose learning rates are those of AdamW."""
    beta3: float | None = None
    """Decay of prodigy's estimate of the step size; null: the root of the second beta."""
    d0: float | None = None
    """First estimate of prodigy's step size (null: 1e-6)."""
    d_coef: float | None = None
    """Factor of prodigy's step size (null: 1)."""
    growth_rate: float | None = None
    """Most that prodigy's step size grows by in a step, at least 1 (null: any)."""
    use_bias_correction: bool | None = None
    """Correct prodigy's moments for their start, as Adam does (null: no)."""
    safeguard_warmup: bool | None = None
    """Keep a warm-up out of prodigy's estimate (null: no)."""

    def __post_init__(self) -> None:
        given = self.given()
        wrong = [
            f"optimizer.{key} is {value}, which {' and '.join(READ_BY[key])} alone read{'s' * (len(READ_BY[key]) == 1)}"
            for key, value in given.items()
            if self.name not in READ_BY[key]
        ]
        if wrong:
            raise ValueError(f"optimizer.name is {self.name}, but {'; '.join(wrong)}: leave out what it does not read")
        for key in ("momentum", "beta3"):
            if key in given and not 0 <= given[key] < 1:
                raise ValueError(f"optimizer.{key} is {given[key]}; it must be at least 0 and below 1")
        for key in ("eps", "d0", "d_coef"):
            if key in given and given[key] <= 0:
                raise ValueError(f"optimizer.{key} is {given[key]}; it must be above 0")
        if self.growth_rate is not None and self.growth_rate < 1:
            raise ValueError(f"optimizer.growth_rate is {self.growth_rate}; it must be at least 1")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov is true and optimizer.momentum 0: it needs momentum")

    def given(self) -> dict[str, Any]:
        """Return the keys that were set, beside the name."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        return {key: value for key, value in values.items() if value is not None}

    def has_momentum(self) -> bool:
        """Return True where sgd keeps a momentum."""
        return self.momentum != 0


def load_class(name: Name) -> Callable[..., Optimizer]:
    """Import the class of an optimizer. Raises ValueError, which says what to install."""
    package, module, found = CLASSES[name]
    try:
        return getattr(importlib.import_module(module), found)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"optimizer.name is {name}, which is not installed: pip install '{package}', or take optimizer.name=adamw"
        ) from error


def split(network: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split the parameters into those that Muon takes, the matrices of linear layers, and others.

    A table of classes has two axes, too, but its rows stand alone: torch's description leaves it to another optimizer.
    """
    linear = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear)}
    matrices = {name: value for name, value in network.named_parameters() if id(value) in linear}
    return matrices, {name: value for name, value in network.named_parameters() if name not in matrices}


def make_optimizer(
    config: OptimizerConfig,
    network: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> Optimizer:
    """Make the optimizer of a network's parameters. Raises ValueError where its package is not installed."""
    of_all: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    make, own = load_class(config.name), config.given()
    if config.name == "muon":
        own.setdefault("adjust_lr_fn", "match_rms_adamw")
        matrices, others = split(network)
        return MuonAndAdamW(
            make(matrices.values(), **of_all, **own),
            torch.optim.AdamW(others.values(), **of_all, betas=betas, fused=True),
        )
    if config.name == "sgd":
        own.setdefault("momentum", 0.9)
    else:
        own["betas"] = betas
    if config.name in FUSED:
        own["fused"] = True
    return make(trained_parameters(network).values(), **of_all, **own)


class MuonAndAdamW(Optimizer):
    """Takes steps of Muon for matrices and of AdamW for everything else, as one optimizer of two groups.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon).
    """

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = muon, adamw

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make a step of both."""
        assert closure is None
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # which others may have replaced
            part.step()


def describe_optimizer(config: OptimizerConfig, network: nn.Module) -> str:
    """Name the optimizer for the first lines of the log; of Muon, what it takes."""
    if config.name == "prodigy":
        return "optimizer prodigy: train.learning_rate is a factor of the step size that it finds, and usually 1"
    if config.name != "muon":
        return f"optimizer {config.name}"
    taken, left = (f"{len(part)} ({sum(value.numel() for value in part.values()):,})" for part in split(network))
    return f"optimizer muon: matrices {taken} by Muon, other tensors {left} by AdamW"


# What optimizers keep of a parameter, as empty tensors on no device, by the names of the libraries.


def like(parameter: Tensor, dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    """Make a tensor without numbers, of a parameter's shape where none is given."""
    return torch.empty(shape or parameter.shape, dtype=dtype, device="meta")


def number(dtype: torch.dtype) -> Tensor:
    """Make a tensor of one number, without it."""
    return torch.empty((), dtype=dtype, device="meta")


def kept_of_adam(parameter: Tensor) -> dict[str, Tensor]:
    """Return what AdamW and Adam keep."""
    return {"step": number(torch.float32), "exp_avg": like(parameter), "exp_avg_sq": like(parameter)}


def kept_in_8_bit(parameter: Tensor) -> dict[str, Tensor]:
    """Return what bitsandbytes' AdamW8bit keeps: from 4,096 elements on moments in 8 bits, with a scale for 256."""
    counted = {"step": number(torch.int64)}
    if parameter.numel() < 4096:
        return {**counted, "state1": like(parameter), "state2": like(parameter)}
    blocks = -(-parameter.numel() // 256)
    return counted | {
        f"{name}{moment}": tensor
        for moment in (1, 2)
        for name, tensor in (("state", like(parameter, torch.uint8)), ("qmap", like(parameter, torch.float32, 256)),
                             ("absmax", like(parameter, torch.float32, blocks)))
    }  # fmt: skip


def kept_by_prodigy(parameter: Tensor, *, begins_at_zero: bool, moment: bool) -> dict[str, Tensor]:
    """Return what Prodigy keeps: of a parameter that began at 0 one 0, and the first moment where its beta is not 0."""
    flat = like(parameter, torch.float32, parameter.numel())
    kept = {"step": number(torch.int64), "s": flat, "p0": number(torch.float32) if begins_at_zero else flat}
    return kept | {"exp_avg_sq": like(parameter)} | ({"exp_avg": like(parameter)} if moment else {})


def kept_of_groups(config: OptimizerConfig) -> dict[str, Tensor]:
    """Return what an optimizer keeps of all parameters together."""
    names = OF_GROUPS if config.name == "prodigy" else ()
    return {name: number(torch.int64 if name == "k" else torch.float64) for name in names}


OF_GROUPS = ("d", "d_max", "d_numerator", "k")  # what changes in Prodigy's groups, and decides steps: they are alike
NEVER_NEGATIVE = ("step", "exp_avg_sq", "state2", "absmax1", "absmax2", "d", "d_max", "k")


def state_of(
    config: OptimizerConfig, network: nn.Module, betas: tuple[float, float], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state of a network's optimizer, {parameter name/state name: tensor without numbers}.

    `found` is a state of that optimizer: which parameters began at 0 is seen in it alone.
    """
    matrices = split(network)[0] if config.name == "muon" else {}

    def kept(name: str, parameter: Tensor) -> dict[str, Tensor]:
        if config.name == "sgd" or name in matrices:
            return {"momentum_buffer": like(parameter)} if config.has_momentum() or name in matrices else {}
        if config.name == "adamw_8bit":
            return kept_in_8_bit(parameter)
        if config.name == "prodigy":
            first = found.get(f"{name}/p0")
            return kept_by_prodigy(parameter, begins_at_zero=first is not None and first.ndim == 0, moment=betas[0] > 0)
        return kept_of_adam(parameter)

    return {
        f"{name}/{kind}": tensor
        for name, parameter in trained_parameters(network).items()
        for kind, tensor in kept(name, parameter).items()
    }
