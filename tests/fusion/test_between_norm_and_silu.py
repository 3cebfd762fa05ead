"""Puts modules between a norm and its SiLU: those that hand on what they are given are no hindrance, others are."""

import functools
import itertools

import pytest
import torch
from torch import nn

import unetgn
from tests import tensors

pytestmark = pytest.mark.filterwarnings("ignore:dropout")  # of a layer for other axes than the input has
noise = functools.partial(tensors.noise, dtype=torch.float32)

DROPOUTS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]


class DoublingDropout(nn.Dropout):
    """Looks like a dropout that drops nothing, by its class and its p."""

    def forward(self, x):
        return 2 * x


class DropPath(nn.Module):
    """Drops whole samples, as timm has it: by a function, with its probability in an attribute."""

    def __init__(self, p=0.0, *, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = p, scale_by_keep

    def forward(self, x):
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


def drop_path(x, drop_prob, training, scale_by_keep):
    if drop_prob == 0.0 or not training:
        return x
    kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - drop_prob)
    return x * (kept / (1 - drop_prob) if scale_by_keep else kept)


class StochasticDepth(nn.Module):
    """Drops as torchvision has it."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p, self.mode = p, "row"

    def forward(self, input):
        return stochastic_depth(input, self.p, self.mode, self.training)


def stochastic_depth(input, p, mode, training):
    return drop_path(input, p, training, mode == "row")


class CopiedDropout(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return torch.nn.functional.dropout(x, self.p, self.training)


class DropBlock(nn.Module):
    """Drops nothing in evaluation, and in training nothing where its rate is 0."""

    def __init__(self, p=0.0):
        super().__init__()
        self.drop_rate = p

    def forward(self, x):
        return x if not self.training or self.drop_rate == 0 else x * 0


class CopiedIdentity(nn.Module):
    def forward(self, x, *_):
        return x


class NoiseInTraining(nn.Module):
    """Is the identity in evaluation only, whatever its p."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x + 1 if self.training else x


class Gate(nn.Module):
    """Is the identity for as long as it is open."""

    def __init__(self):
        super().__init__()
        self.open = True

    def forward(self, x):
        return x if self.open else 2 * x


class InvertedDropout(nn.Module):
    """Keeps with probability p, so that with p = 0 it drops all."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * self.p


class LearntDropout(nn.Module):
    """Has p in a parameter, which training may move."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return drop_path(x, self.p, self.training, True)


DROPPING = [DropPath, StochasticDepth, CopiedDropout, DropBlock]
try:
    from monai.networks.layers import DropPath as MonaiDropPath

    DROPPING.append(MonaiDropPath)
except ImportError:
    pass


HANDING_ON = {
    "nothing": [],
    "identity": [nn.Identity],
    "several": [nn.Identity, functools.partial(nn.Dropout, 0.0), nn.Identity],
    **{dropout.__name__: [functools.partial(dropout, 0.0)] for dropout in DROPOUTS},
    "in place": [functools.partial(nn.Dropout, 0, inplace=True)],
    **{dropping.__module__ + dropping.__name__: [functools.partial(dropping, 0.0)] for dropping in DROPPING},
    "integer": [functools.partial(DropPath, 0)],
    "unscaled": [functools.partial(DropPath, 0.0, scale_by_keep=False)],
    "a copy of the identity": [CopiedIdentity],
    "no layers": [nn.Sequential],
    "layers": [lambda: nn.Sequential(DropPath(), nn.Sequential(nn.Identity()), nn.Dropout(0.0))],
}
OTHERS = {
    **{dropout.__name__: [functools.partial(dropout, 0.5)] for dropout in DROPOUTS},
    "a subclass": [functools.partial(DoublingDropout, 0.0)],
    "one of two": [nn.Identity, functools.partial(nn.Dropout, 0.1)],
    "a flattening": [nn.Flatten],
    **{dropping.__module__ + dropping.__name__: [functools.partial(dropping, 0.5)] for dropping in DROPPING},
    **{other.__name__: [other] for other in (NoiseInTraining, Gate, InvertedDropout, LearntDropout)},
    "a layer": [lambda: nn.Sequential(nn.Identity(), nn.ReLU())],
}


def chain(between):
    return nn.Sequential(nn.Conv1d(3, 4, 1), nn.GroupNorm(2, 4), *(make() for make in between), nn.SiLU(inplace=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("between", "places"),
    [(between, 1) for between in HANDING_ON.values()] + [(between, 0) for between in OTHERS.values()],
    ids=[*HANDING_ON, *(f"not {name}" for name in OTHERS)],
)
def test_a_norm_is_fused_past_what_hands_on_its_input(between, places, training, calls):
    model, x = chain(between).train(training), noise(2, 3, 5)
    keys = list(model.state_dict())
    torch.manual_seed(0)
    expected, drawn = model(x), torch.rand(1)
    report = unetgn.fuse(model)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch.rand(1), drawn)  # as many random numbers were drawn
    assert len(report.fused) == len(calls) == places
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(("dropping", "name"), [(nn.Dropout, "p"), (DropPath, "drop_prob"), (DropBlock, "drop_rate")])
def test_dropout_that_is_switched_on_later_drops(dropping, name, calls):
    model, x = chain([functools.partial(dropping, 0.0)]).train(), noise(2, 3, 5)
    unetgn.fuse(model)
    setattr(model[2], name, 1 - 1e-9 if dropping is DropPath else 1.0)
    assert not model(x).any()
    assert not calls


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_what_lies_between_runs_and_sees_the_normalized_tensor(kind, calls):
    model, x = chain([nn.Identity]), noise(2, 3, 5)
    unetgn.fuse(model)
    seen = []
    handle = getattr(model[2], kind)(lambda module, args, *result: seen.append(args[0].clone()))
    expected = model[1](model[0](x))
    y = model(x)
    torch.testing.assert_close(seen[0], expected)
    handle.remove()
    assert not calls
    torch.testing.assert_close(model(x), y)
    assert len(calls) == 1


@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
@pytest.mark.parametrize(
    "ordering", sorted({"".join(order) for order in itertools.permutations("NDA")} | {"NA", "NAD"})
)
def test_monais_block_is_fused_in_every_order_in_which_silu_follows_the_norm(ordering, dropout, calls):
    blocks = pytest.importorskip("monai.networks.blocks")

    def block():
        norm = ("GROUP", {"num_groups": 2})
        return blocks.ADN(ordering, in_channels=4, act="SWISH", norm=norm, dropout=dropout, norm_dim=2)

    follows = "NA" in (ordering if dropout else ordering.replace("D", ""))
    model = nn.ModuleDict({"own": block(), "within": blocks.Convolution(2, 3, 4, adn_ordering="")})
    model["within"].add_module("adn", block())
    given = {"own": noise(2, 4, 5, 5), "within": noise(2, 3, 5, 5)}

    def values(model):
        torch.manual_seed(0)
        return [module(given[name]) for name, module in model.items()]

    for training in (False, True):
        model.train(training)
        report = unetgn.fuse(model)
        assert [place.path for place in report.fused] == (["own.N", "within.adn.N"] if follows else [])
        got = values(model)
        assert len(calls) == 2 * follows
        unetgn.unfuse(model)
        torch.testing.assert_close(got, values(model))
        calls.clear()
