"""Holds forwards to rewrite: in FOUND a norm is followed by SiLU, in NOTHING it only looks so."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import tensors

noise = functools.partial(tensors.noise, dtype=torch.float32)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    return 2 * F.silu(x)  # of that name, but not that function


class switched:
    @staticmethod
    def silu(x: Tensor, inplace: bool = False) -> Tensor:
        return x if inplace else x * torch.sigmoid(x)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return an image and an embedding for the forwards below."""
    return noise(2, 4, 3, 3, dtype=dtype), noise(2, 3, seed=1, dtype=dtype)


class Base(nn.Module):
    """Has the parts that the forwards call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.SiLU()
        self.conv, self.proj = nn.Conv2d(4, 4, 1), nn.Linear(3, 8)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


class TwoSteps(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = self.act(x)
        return self.conv(x)


class OneExpression(Base):
    def forward(self, x, emb):
        return self.conv(F.silu(self.norm1(x))) + torch.nn.functional.silu(self.norm2(x))


class FunctionOfTheFile(Base):
    def forward(self, x, emb):
        h = self.norm1(x)
        h = swish(h)
        return h


class InABranchOfALoop(Base):
    def forward(self, x, emb):
        for index in range(3):
            if index % 2:
                x = self.norm1(x)
                x = self.act(x)
            else:
                x = self.conv(x)
        return x


class ActivationAfterTheBranches(Base):
    def forward(self, x, emb):
        if emb.sum() > 0:
            x = self.conv(x)
        elif emb is not None:
            x = self.norm1(x)
        else:
            x = self.norm2(x)
        x = self.act(x)
        return x


class AdditionBefore(Base):
    def forward(self, x, emb):
        h = self.conv(x)
        h = h + self.proj(emb)[:, :4, None, None]
        h = self.norm1(h)
        h = self.act(h)
        return h + x


class AdditionUnderACondition(Base):
    def forward(self, x, emb):
        h = self.conv(x)
        if emb is not None:
            shift = self.act(self.proj(emb))[:, :4, None, None]
            h = h + shift
        h = self.norm1(h)
        h = self.act(h)
        return h


class AdditionThatVariesOverSpace(Base):
    def forward(self, x, emb):
        x = x + self.conv(x)
        x = self.norm1(x)
        x = self.act(x)
        return x


class ScaleShift(Base):
    def forward(self, x, emb):
        scale, shift = self.proj(emb)[:, :, None, None].chunk(2, dim=1)
        x = self.norm1(x)
        x = x * (1 + scale) + shift
        x = self.act(x)
        return x


class ScaleShiftOverSpace(Base):
    def forward(self, x, emb):
        scale, shift = self.conv(x), x.mean(dim=(2, 3), keepdim=True)
        x = self.norm2(x)
        x = x * (scale + 1.0) + shift
        x = self.act(x)
        return x


class LayoutBetween(Base):
    """Lays out as video models do, where each frame is normalized by itself."""

    def forward(self, x, emb):
        samples = x.size(0)
        if emb is not None:
            x = x.transpose(0, 1)
            x = x.transpose(0, 1).contiguous()
            x = self.norm1(x)
            x = x.unflatten(0, (samples, -1)).permute(0, 2, 1, 3, 4)
            x = x.permute(0, 2, 1, 3, 4).flatten(0, 1)
        else:
            x = self.norm1(x)
        x = self.act(x)
        return x


class DefaultOfTheClassBody(Base):
    FACTOR = 3

    def forward(self, x, emb, factor=FACTOR, *, offset=FACTOR):
        return F.silu(self.norm1(x)) * factor + offset


class InputByName(Base):
    def forward(self, x, emb):
        y = self.norm2(input=x)
        y = self.act(input=y)
        return F.silu(input=self.norm1(input=x), inplace=False) + y


class ActivationInPlace(Base):
    def forward(self, x, emb):
        y = self.norm2(x)
        y = F.silu(y, inplace=self.training)
        return F.silu(self.norm1(x), inplace=True) + x + y


class SiluWrittenOut(Base):
    def forward(self, x, emb):
        y = self.norm1(x)
        y *= torch.sigmoid(y)
        x = self.norm2(x)
        x = x * torch.sigmoid(x)
        return x + y


FOUND = {
    TwoSteps: ("norm1",),
    OneExpression: ("norm1", "norm2"),
    FunctionOfTheFile: ("norm1",),
    InABranchOfALoop: ("norm1",),
    ActivationAfterTheBranches: ("norm1", "norm2"),
    AdditionBefore: ("norm1",),
    AdditionUnderACondition: ("norm1",),
    AdditionThatVariesOverSpace: ("norm1",),
    ScaleShift: ("norm1",),
    ScaleShiftOverSpace: ("norm2",),
    LayoutBetween: ("norm1",),
    DefaultOfTheClassBody: ("norm1",),
    InputByName: ("norm2", "norm1"),
    ActivationInPlace: ("norm2", "norm1"),
    SiluWrittenOut: ("norm1", "norm2"),
}


class ResidualBetween(Base):
    def forward(self, x, emb):
        h = self.norm1(x)
        h = self.act(h + x)
        return h


class NormKept(Base):
    def forward(self, x, emb):
        normed = self.norm1(x)
        h = self.act(normed)
        return h + normed


class AnotherActivation(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = F.relu(x)
        return x


class AnotherFunctionOfThatName(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = silu(x)
        return x


class AnotherTensor(Base):
    def forward(self, x, emb):
        h = self.norm1(x)
        x = self.act(x)
        return h + x


class ScaleOfTheNormedTensor(Base):
    """Scales as squeeze-and-excitation does: what scales is made of what is scaled."""

    def forward(self, x, emb):
        x = self.norm1(x)
        x = x * (1 + self.conv(x)) + emb.mean()
        x = self.act(x)
        return x


class ShiftOfTheNormedTensor(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = x * (1 + emb.mean()) + x.mean(dim=(2, 3), keepdim=True)
        x = self.act(x)
        return x


class ScaleSeenByAnInnerFunction(Base):
    def forward(self, x, emb):
        def gate():
            return self.conv(x)

        x = self.norm1(x)
        x = x * (1 + gate()) + emb.mean()
        x = self.act(x)
        return x


class LayoutOfItsOwnValues(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = x.transpose(2 if x.sum() > 0 else 3, 2)
        x = self.act(x)
        return x


class AnotherGate(Base):
    def forward(self, x, emb):
        y = self.norm1(x)
        y *= torch.sigmoid(x)
        z = self.norm2(x)
        z += torch.sigmoid(z)
        return y + z


class InPlaceOfWhatIsKept(Base):
    def forward(self, x, emb):
        normed = self.norm1(x)
        h = F.silu(normed, inplace=True)
        return h + normed


class InPlaceByACall(Base):
    def forward(self, x, emb):
        return F.silu(self.norm1(x), inplace=bool(self.act))


class SwishWithASwitch(Base):
    def forward(self, x, emb):
        return switched.silu(self.norm1(x), inplace=True)


class ParameterOfAFunctionsName(Base):
    def forward(self, x, emb, swish=F.relu):
        return swish(self.norm1(x))


NOTHING = (
    *(ResidualBetween, NormKept, AnotherActivation, AnotherFunctionOfThatName, AnotherTensor),
    *(ScaleOfTheNormedTensor, ShiftOfTheNormedTensor, ScaleSeenByAnInnerFunction, LayoutOfItsOwnValues),
    AnotherGate,
    *(InPlaceOfWhatIsKept, InPlaceByACall, SwishWithASwitch, ParameterOfAFunctionsName),
)
