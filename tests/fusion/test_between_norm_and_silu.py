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


HANDING_ON = {
    "nothing": [],
    "identity": [nn.Identity],
    "several": [nn.Identity, functools.partial(nn.Dropout, 0.0), nn.Identity],
    **{dropout.__name__: [functools.partial(dropout, 0.0)] for dropout in DROPOUTS},
    "in place": [functools.partial(nn.Dropout, 0, inplace=True)],
}
OTHERS = {
    **{dropout.__name__: [functools.partial(dropout, 0.5)] for dropout in DROPOUTS},
    "a subclass": [functools.partial(DoublingDropout, 0.0)],
    "one of two": [nn.Identity, functools.partial(nn.Dropout, 0.1)],
    "a flattening": [nn.Flatten],
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


def test_dropout_that_is_switched_on_later_drops(calls):
    model, x = chain([functools.partial(nn.Dropout, 0.0)]).train(), noise(2, 3, 5)
    unetgn.fuse(model)
    model[2].p = 1.0
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
