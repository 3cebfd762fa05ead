"""Computes the backward pass in the channels_last layout, where x is (N, spatial, C) in memory.

The formulas are those of `backward_contiguous`, the tiles those of `forward_channels_last`. The sums of each channel go
to `sums` (2 or 3, N, slots, C). The split path has a slot for each tile of rows, the resident path has one.
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
    x, dy, dx, mean_of_group, rstd_of_group, sums, m1_m2, weight, bias, pre_bias, scale, shift, pre_bias_stride,
    scale_stride, shift_stride, plane_size, bundles, spatial, SILU: tl.constexpr, WITH_XHAT: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write dx of a bundle; a block holds xhat and gamma' * dz in registers: x and dy are read once.

    Also write the sums, and (m1, m2) to `m1_m2` (N*G, 2). dx and sums may be None.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
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
    mean = tl.load(mean_of_group + group)
    rstd = tl.load(rstd_of_group + group)
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
            tl.store(plane_of(sums, 1, plane_size) + slot, s1)
            if WITH_XHAT:
                tl.store(plane_of(sums, 2, plane_size) + slot, s2)
        m1 += tl.sum(s0 * gamma, 1)
        m2 += tl.sum(s1 * gamma, 1)

    m1 = m1 / (STEPS * VECTOR * spatial)
    m2 = m2 / (STEPS * VECTOR * spatial)
    pair = pair_of(m1_m2, group)
    tl.store(pair, m1)
    tl.store(pair + 1, m2)
    m1 = (rstd * m1)[None, :, None]
    m2 = (rstd * m2)[None, :, None]
    rstd = rstd[None, :, None]
    for step in tl.static_range(STEPS if dx is not None else 0):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        for t in tl.static_range(TILES):
            xhat, direct = kept[step * TILES + t]
            # rstd last, and in this order: others of the same value spilled on one target or another
            result = (direct * rstd - (m1 + xhat * m2)).to(dx.dtype.element_ty)
            offsets = (t * ROWS + local) * channels + channel[None, :, :]
            tl.store(dx + offsets, result, mask=within(t * ROWS + local, spatial, MASKED and t == TILES - 1))


@triton.jit
def split_tile(
    x, dy, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, num_groups, group_channels, spatial, row_vectors, row_tiles, column_tiles, program,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Compute what both passes need of a tile: its place, h - mean, dz and the gain rstd * gamma'.

    xhat = rstd * (h - mean) is never formed: rstd multiplies the sums and the gain of each channel instead.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    sample, row_tile, base, channel, offsets, count = locate_tile(
        program, row_tiles, column_tiles, row_vectors, spatial, ROWS, COLUMNS, VECTOR
    )
    own, inside = tile_masks(channel, row_vectors * VECTOR, count, ROWS, MASKED)
    x_tile = tl.load(x + base + offsets, mask=inside, other=0.0)
    dy_tile = tl.load(dy + base + offsets, mask=inside, other=0.0)
    group = sample * num_groups + channel // group_channels
    mean = tl.load(mean_of_group + group, mask=own, other=0.0)
    rstd = tl.load(rstd_of_group + group, mask=own, other=0.0)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
    centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
    centred = tl.where(inside, x_tile.to(compute) - centre[None, :], 0.0)
    gain = rstd * gamma
    dz = activation_gradient(dy_tile.to(compute), centred * gain[None, :] + beta[None, :], SILU)
    slot = (sample * row_tiles + row_tile) * (row_vectors * VECTOR) + channel
    return base + offsets, inside, own, slot, group, rstd, gain, centred, dz


@triton.jit
def split_sums(
    x, dy, mean_of_group, rstd_of_group, sums, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, plane_size, num_groups, group_channels, spatial, row_vectors, row_tiles, column_tiles,
    SILU: tl.constexpr, WITH_XHAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write the sums of each channel of a tile over its rows: the first pass."""
    offsets, inside, own, slot, group, rstd, gain, centred, dz = split_tile(
        x, dy, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
        shift_stride, num_groups, group_channels, spatial, row_vectors, row_tiles, column_tiles, tl.program_id(0), SILU,
        ROWS, COLUMNS, VECTOR, MASKED,
    )  # fmt: skip
    tl.store(sums + slot, tl.sum(dz, 0), mask=own)
    tl.store(plane_of(sums, 1, plane_size) + slot, rstd * tl.sum(dz * centred, 0), mask=own)
    if WITH_XHAT:
        tl.store(plane_of(sums, 2, plane_size) + slot, rstd * tl.sum(centred, 0), mask=own)


@triton.jit
def split_apply(
    x, dy, dx, mean_of_group, rstd_of_group, m1_m2, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, num_groups, group_channels, spatial, row_vectors, row_tiles, column_tiles, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write dx of a tile: the second pass. Programs walk backwards: what the first read last is still in L2."""
    offsets, inside, own, slot, group, rstd, gain, centred, dz = split_tile(
        x, dy, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
        shift_stride, num_groups, group_channels, spatial, row_vectors, row_tiles, column_tiles,
        tl.num_programs(0) - 1 - tl.program_id(0), SILU, ROWS, COLUMNS, VECTOR, MASKED,
    )  # fmt: skip
    m1 = rstd * tl.load(pair_of(m1_m2, group), mask=own, other=0.0)
    m2 = rstd * rstd * tl.load(pair_of(m1_m2, group) + 1, mask=own, other=0.0)
    result = (dz * gain[None, :] - m1[None, :] - centred * m2[None, :]).to(dx.dtype.element_ty)
    tl.store(dx + offsets, result, mask=inside)
