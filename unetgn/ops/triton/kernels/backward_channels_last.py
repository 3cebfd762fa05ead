"""Backward kernels for the channels_last layout, where x is (N, spatial, C) in memory.

The formulas are those of `backward_contiguous`, the tiles those of `forward_channels_last`. The sums of
each channel go to `sums` (2 or 3, N, slots, C); a slot is a row block; the resident path has one.
"""

import triton
import triton.language as tl

from unetgn.ops.triton.kernels.elements import (
    activation_gradient,
    advance,
    channel_affine,
    load_or,
    pair_of,
    plane_of,
    within,
)
from unetgn.ops.triton.kernels.forward_channels_last import group_channels_of_step, locate_tile, tile_masks


@triton.jit
def resident_backward(
    x, dy, dx, mean_in, rstd_in, sums, group_means, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, plane, bundles, spatial, SILU: tl.constexpr, WITH_XHAT: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dx of a bundle of GROUPS groups; a block holds xhat and gamma' * dz in registers: x and dy are read once.

    Also writes the sums, and (m1, m2) into `group_means` (N*G, 2). dx and sums may be None.
    """
    compute: tl.constexpr = mean_in.dtype.element_ty
    program = tl.program_id(0)
    sample = (program // bundles).to(tl.int64)
    first_group = (program % bundles) * GROUPS
    channels = bundles * (GROUPS * STEPS * VECTOR)
    local = tl.arange(0, ROWS)[:, None, None]
    every = tl.full([GROUPS, VECTOR], True, tl.int1)
    x += sample * spatial * channels
    dy += sample * spatial * channels
    dx = advance(dx, sample * spatial * channels)
    group = program * GROUPS + tl.arange(0, GROUPS)
    mean = tl.load(mean_in + group)
    rstd = tl.load(rstd_in + group)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)

    raw = ()
    for step in tl.static_range(STEPS):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        for t in tl.static_range(TILES):
            offsets = (t * ROWS + local) * channels + channel[None, :, :]
            inside = within(t * ROWS + local, spatial, MASKED and t == TILES - 1)
            raw = raw + ((tl.load(x + offsets, mask=inside, other=0.0), tl.load(dy + offsets, mask=inside, other=0.0)),)

    kept = ()
    m1 = tl.zeros([GROUPS], compute)
    m2 = tl.zeros([GROUPS], compute)
    for step in tl.static_range(STEPS):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, every, compute)
        extra = load_or(pre_bias, channel, every, 0.0, compute)
        centre = (mean[:, None] - extra)[None, :, :]
        s0 = tl.zeros([GROUPS, VECTOR], compute)
        s1 = tl.zeros([GROUPS, VECTOR], compute)
        s2 = tl.zeros([GROUPS, VECTOR], compute)
        for t in tl.static_range(TILES):
            pair = raw[step * TILES + t]
            xhat = (pair[0].to(compute) - centre) * rstd[None, :, None]
            xhat = tl.where(within(t * ROWS + local, spatial, MASKED and t == TILES - 1), xhat, 0.0)
            z = xhat * gamma[None, :, :] + beta[None, :, :]
            dz = activation_gradient(pair[1].to(compute), z, SILU)
            s0 += tl.sum(dz, 0)
            s1 += tl.sum(dz * xhat, 0)
            if WITH_XHAT:
                s2 += tl.sum(xhat, 0)
            kept = kept + ((xhat, dz * gamma[None, :, :]),)
        if sums is not None:
            slot = sample * channels + channel
            tl.store(sums + slot, s0)
            tl.store(plane_of(sums, 1, plane) + slot, s1)
            if WITH_XHAT:
                tl.store(plane_of(sums, 2, plane) + slot, s2)
        m1 += tl.sum(s0 * gamma, 1)
        m2 += tl.sum(s1 * gamma, 1)

    m1 = m1 / (STEPS * VECTOR * spatial)
    m2 = m2 / (STEPS * VECTOR * spatial)
    pair = pair_of(group_means, group)
    tl.store(pair, m1)
    tl.store(pair + 1, m2)
    m1 = (rstd * m1)[None, :, None]
    m2 = (rstd * m2)[None, :, None]
    gain = rstd[None, :, None]
    for step in tl.static_range(STEPS if dx is not None else 0):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        for t in tl.static_range(TILES):
            xhat, direct = kept[step * TILES + t]
            # rstd last, and in this order: others of the same value spilled on one target or another
            result = (direct * gain - (m1 + xhat * m2)).to(dx.dtype.element_ty)
            offsets = (t * ROWS + local) * channels + channel[None, :, :]
            tl.store(dx + offsets, result, mask=within(t * ROWS + local, spatial, MASKED and t == TILES - 1))


@triton.jit
def split_tile(
    x, dy, mean_in, rstd_in, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
    num_groups, group_channels, spatial, channel_vectors, row_blocks, column_blocks, program, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What both passes compute of a tile: its place, h - mean, dz and the gain rstd * gamma'.

    xhat = rstd * (h - mean) is never formed: its factor goes to what there is one of for each channel.
    """
    compute: tl.constexpr = mean_in.dtype.element_ty
    sample, row_block, base, channel, offsets, count = locate_tile(
        program, row_blocks, column_blocks, channel_vectors, spatial, ROWS, COLUMNS, VECTOR
    )
    own, inside = tile_masks(channel, channel_vectors * VECTOR, count, ROWS, MASKED)
    x_tile = tl.load(x + base + offsets, mask=inside, other=0.0)
    dy_tile = tl.load(dy + base + offsets, mask=inside, other=0.0)
    group = sample * num_groups + channel // group_channels
    mean = tl.load(mean_in + group, mask=own, other=0.0)
    rstd = tl.load(rstd_in + group, mask=own, other=0.0)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
    centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
    centred = tl.where(inside, x_tile.to(compute) - centre[None, :], 0.0)
    gain = rstd * gamma
    dz = activation_gradient(dy_tile.to(compute), centred * gain[None, :] + beta[None, :], SILU)
    slot = (sample * row_blocks + row_block) * (channel_vectors * VECTOR) + channel
    return base + offsets, inside, own, slot, group, rstd, gain, centred, dz


@triton.jit
def split_sums(
    x, dy, mean_in, rstd_in, sums, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
    plane, num_groups, group_channels, spatial, channel_vectors, row_blocks, column_blocks, SILU: tl.constexpr,
    WITH_XHAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Pass 1: the sums of each channel of a tile over its rows."""
    offsets, inside, own, slot, group, rstd, gain, centred, dz = split_tile(
        x, dy, mean_in, rstd_in, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
        num_groups, group_channels, spatial, channel_vectors, row_blocks, column_blocks, tl.program_id(0), SILU, ROWS,
        COLUMNS, VECTOR, MASKED,
    )  # fmt: skip
    tl.store(sums + slot, tl.sum(dz, 0), mask=own)
    tl.store(plane_of(sums, 1, plane) + slot, rstd * tl.sum(dz * centred, 0), mask=own)
    if WITH_XHAT:
        tl.store(plane_of(sums, 2, plane) + slot, rstd * tl.sum(centred, 0), mask=own)


@triton.jit
def split_apply(
    x, dy, dx, mean_in, rstd_in, group_means, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, num_groups, group_channels, spatial, channel_vectors, row_blocks, column_blocks, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Pass 2: dx of a tile; programs walk backwards, because what pass 1 read last is still in the L2 cache."""
    offsets, inside, own, slot, group, rstd, gain, centred, dz = split_tile(
        x, dy, mean_in, rstd_in, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
        num_groups, group_channels, spatial, channel_vectors, row_blocks, column_blocks,
        tl.num_programs(0) - 1 - tl.program_id(0), SILU, ROWS, COLUMNS, VECTOR, MASKED,
    )  # fmt: skip
    m1 = rstd * tl.load(pair_of(group_means, group), mask=own, other=0.0)
    m2 = rstd * rstd * tl.load(pair_of(group_means, group) + 1, mask=own, other=0.0)
    result = (dz * gain[None, :] - m1[None, :] - centred * m2[None, :]).to(dx.dtype.element_ty)
    tl.store(dx + offsets, result, mask=inside)
