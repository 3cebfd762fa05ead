"""Names our tensors as guided-diffusion does; latent diffusion and Stable Diffusion inherited its names.

Blocks are numbered through: `input_blocks.k.0` is a residual block, `.1` the attention behind it; so are
`output_blocks`, where the upsampling stands last. Both count resampling without parameters.
"""

from collections.abc import Iterator
from typing import cast

from torch import nn

from unetgn.interop.qkv import Order, as_matrix, unpack
from unetgn.interop.transfer import Source
from unetgn.nn.attention import SelfAttention
from unetgn.nn.resblock import ResBlock
from unetgn.unet import UNet
from unetgn.unet.levels import DecoderLevel, EncoderLevel, Level

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
RESBLOCK_RESAMPLES = "resblock_updown=True resamples inside residual blocks, without a convolution of its own"
SKELETON = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def openai_sources(unet: UNet, order: Order) -> dict[str, Source]:
    """Map our keys to guided-diffusion's; `order` is that of the packed rows of its attention."""
    modules = dict(unet.named_modules())
    places = {**SKELETON, **dict(_places(unet))}
    sources = {}
    for ours in unet.state_dict():
        prefix = max((place for place in places if ours.startswith(place + ".")), key=len)
        rest = ours[len(prefix) + 1 :]
        sources[ours] = _source(places[prefix], rest, modules[prefix], order)
    return sources


def _source(theirs: str, rest: str, module: nn.Module, order: Order) -> Source:
    """Find the foreign key of parameter `rest` of one of our modules, which they call `theirs`."""
    part, _, leaf = rest.rpartition(".")
    if isinstance(module, ResBlock):
        return Source(f"{theirs}.{RES_BLOCK[part]}.{leaf}")
    if isinstance(module, SelfAttention):
        if part == "group_norm":
            return Source(f"{theirs}.norm.{leaf}")
        if part == "to_out.0":
            return Source(f"{theirs}.proj_out.{leaf}", as_matrix)
        index = {"to_q": 0, "to_k": 1, "to_v": 2}[part]
        return Source(f"{theirs}.qkv.{leaf}", unpack(order, module.heads, index))  # type: ignore[arg-type]
    return Source(f"{theirs}.{rest}")  # the spatial transformer and the skeleton have our names


def _places(unet: UNet) -> Iterator[tuple[str, str]]:
    """Name our modules inside the levels as they are called there."""
    count = 1
    for i, level in enumerate(cast("list[EncoderLevel]", list(unet.down_blocks))):
        for j in range(len(level.resnets)):
            yield from _block(level, f"down_blocks.{i}", j, f"input_blocks.{count}")
            count += 1
        for downsample in level.downsamplers:
            inner = isinstance(downsample, ResBlock)
            ours = f"down_blocks.{i}.downsamplers.0"
            yield (ours, f"input_blocks.{count}.0") if inner else (f"{ours}.conv", f"input_blocks.{count}.0.op")
            count += 1
    yield from _middle(unet)
    count = 0
    for i, up_level in enumerate(cast("list[DecoderLevel]", list(unet.up_blocks))):
        last = len(up_level.resnets) - 1
        for j in range(len(up_level.resnets)):
            yield from _block(up_level, f"up_blocks.{i}", j, f"output_blocks.{count}")
            if j == last and len(up_level.upsamplers):
                inner = isinstance(up_level.upsamplers[0], ResBlock)
                ours, slot = f"up_blocks.{i}.upsamplers.0", 2 if up_level.attends(j) else 1
                theirs = f"output_blocks.{count}.{slot}"
                yield (ours, theirs) if inner else (f"{ours}.conv", f"{theirs}.conv")
            count += 1


def _block(level: Level, ours: str, index: int, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.resnets.{index}", f"{theirs}.0"
    if level.attends(index):
        yield f"{ours}.attentions.{index}", f"{theirs}.1"


def _middle(unet: UNet) -> Iterator[tuple[str, str]]:
    for index in range(len(unet.mid_block.resnets)):
        yield f"mid_block.resnets.{index}", f"middle_block.{2 * index}"
        if unet.mid_block.attends(index):  # its place stays empty where there is none
            yield f"mid_block.attentions.{index}", f"middle_block.{2 * index + 1}"
