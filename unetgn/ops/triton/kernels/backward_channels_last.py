"""Computes the backward pass in the channels_last layout, where x is (N, spatial, C) in memory.

The formulas are those of `backward_contiguous`, the tiles those of `forward_channels_last`. The sums of each channel go
to `sums` (2 or 3, N, slots, C): a slot for each strip on the split path, for each block on the cluster path, one on the
resident path.
"""

import triton
import triton.language as tl

from unetgn.ops.triton.kernels.elements import (
    activation_gradient,
    add_pairs,
    advance,
    channel_affine,
    gradient_of_z,
    load_or,
    merge_sums,
    number,
    pair_of,
    plane_of,
    range_of_use,
    widen,
    within,
)
from unetgn.ops.triton.kernels.forward_channels_last import (
    group_channels_of_step,
    in_tile,
    locate_strip,
    start_of_tile,
    strip_affine,
)


@triton.jit
def resident_backward(
    x, dy, dshortcut, dx, mean_of_group, rstd_of_group, sums, m1_m2, weight, bias, pre_bias, scale, shift, scale_map,
    shift_map, dscale_map, dshift_map, pre_bias_stride, scale_stride, shift_stride, plane_size, bundles, spatial,
    SILU: tl.constexpr, PTX: tl.constexpr, WITH_XHAT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write dx of a bundle; a block holds xhat and gamma' * dz in registers: x and dy are read once.

    dshortcut, where x has one, is added to dx.

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
    dshortcut = advance(dshortcut, sample * spatial * channels)
    scale_map = advance(scale_map, sample * spatial * channels)
    shift_map = advance(shift_map, sample * spatial * channels)
    dscale_map = advance(dscale_map, sample * spatial * channels)
    dshift_map = advance(dshift_map, sample * spatial * channels)
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
        for t in tl.static_range(TILES):
            pair = raw[step * TILES + t]
            xhat = (widen(pair[0], compute, PTX) - centre) * rstd[None, :, None]
            inside = within(t * ROWS + local, spatial, MASKED and t == TILES - 1)
            xhat = tl.where(inside, xhat, 0.0)
            z = xhat * gamma[None, :, :] + beta[None, :, :]
            dz = gradient_of_z(
                widen(pair[1], compute, PTX), z, scale_map, shift_map, dscale_map, dshift_map,
                (t * ROWS + local) * channels + channel[None, :, :], inside, SILU, PTX, compute,
            )  # fmt: skip
            if t == 0:  # of all tiles, to be summed over rows once
                s0_rows = dz
                s1_rows = dz * xhat
                s2_rows = xhat
            else:
                s0_rows += dz
                s1_rows += dz * xhat
                s2_rows += xhat
            kept = kept + ((xhat, dz * gamma[None, :, :]),)
        s0 = tl.sum(s0_rows, 0)
        s1 = tl.sum(s1_rows, 0)
        if sums is not None:
            slot = sample * channels + channel
            tl.store(sums + slot, s0)
            tl.store(plane_of(sums, 1, plane_size) + slot, s1)
            if WITH_XHAT:
                tl.store(plane_of(sums, 2, plane_size) + slot, tl.sum(s2_rows, 0))
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
    added = ()  # loaded late, for registers, but all at once: no load passes a store
    for step in tl.static_range(STEPS if dshortcut is not None else 0):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        for t in tl.static_range(TILES):
            offsets = (t * ROWS + local) * channels + channel[None, :, :]
            inside = within(t * ROWS + local, spatial, MASKED and t == TILES - 1)
            added = added + (tl.load(dshortcut + offsets, mask=inside, other=0.0),)
    for step in tl.static_range(STEPS if dx is not None else 0):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        for t in tl.static_range(TILES):
            xhat, direct = kept[step * TILES + t]
            # rstd last, and in this order: others of the same value spilled on one target or another
            result = direct * rstd - (m1 + xhat * m2)
            offsets = (t * ROWS + local) * channels + channel[None, :, :]
            inside = within(t * ROWS + local, spatial, MASKED and t == TILES - 1)
            if dshortcut is not None:
                result += widen(added[step * TILES + t], compute, PTX)
            tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def cluster_backward(
    x, dy, dshortcut, dx, mean_of_group, rstd_of_group, sums, m1_m2, partials, weight, bias, pre_bias, scale, shift,
    pre_bias_stride, scale_stride, shift_stride, plane_size, num_groups, spatial, SILU: tl.constexpr, PTX: tl.constexpr,
    WITH_XHAT: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    VECTOR: tl.constexpr, CLUSTER_SYNC: tl.constexpr,
):  # fmt: skip
    """Do what `resident_backward` does where the BLOCKS blocks of a cluster hold a group.

    Block k has TILES * ROWS rows of the sample, from k * TILES * ROWS on, in STEPS * TILES tiles
    [BLOCKS, ROWS * VECTOR]. The sums have a slot for each block. The blocks exchange their parts of m1 and m2 through
    `partials` (N*G, 2, BLOCKS).
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    first_channel = (group % num_groups) * (STEPS * VECTOR)
    channels = num_groups * (STEPS * VECTOR)
    base = sample * spatial * channels + first_channel
    mean = tl.load(mean_of_group + group)
    rstd = tl.load(rstd_of_group + group)
    x += base
    dy += base
    dx = advance(dx, base)
    dshortcut = advance(dshortcut, base)
    pre_bias = advance(pre_bias, sample * pre_bias_stride + first_channel)
    scale = advance(scale, sample * scale_stride + first_channel)
    shift = advance(shift, sample * shift_stride + first_channel)
    weight = advance(weight, first_channel)
    bias = advance(bias, first_channel)

    # `element` numbers those of a whole tile, and rows and channels follow from that. Not from the second range alone:
    # of such a tensor, [1, ROWS * VECTOR], Triton's planner splits the second axis, and then that of the addresses.
    block = tl.arange(0, BLOCKS)[:, None]
    element = block * (ROWS * VECTOR) + tl.arange(0, ROWS * VECTOR)[None, :]
    first = (element // VECTOR + block * ((TILES - 1) * ROWS)) * channels + element % VECTOR

    raw = ()
    for step in tl.static_range(STEPS):
        for t in tl.static_range(TILES):
            offsets = first + t * ROWS * channels + step * VECTOR
            raw = raw + ((tl.load(x + offsets), tl.load(dy + offsets)),)

    kept = ()
    m1_blocks = tl.zeros([BLOCKS], compute)
    m2_blocks = tl.zeros([BLOCKS], compute)
    for step in tl.static_range(STEPS):
        # Parameters do not depend on the block: read so, they take fewer instructions, and the planner copes with it
        # where 16 bits are widened on the way to what they are multiplied with. Of float32 it gave up on some builds.
        channel = (step * VECTOR + range_of_use(ROWS * VECTOR, 1) % VECTOR)[None, :]
        every = tl.full(channel.shape, True, tl.int1)
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, every, compute)
        centre = mean - load_or(pre_bias, channel, every, 0.0, compute)
        for t in tl.static_range(TILES):
            xhat = (widen(raw[step * TILES + t][0], compute, PTX) - centre) * rstd
            dz = activation_gradient(widen(raw[step * TILES + t][1], compute, PTX), xhat * gamma + beta, SILU, PTX)
            if t == 0:  # of all tiles, to be summed over rows once
                s0_rows = dz
                s1_rows = dz * xhat
                s2_rows = xhat
            else:
                s0_rows += dz
                s1_rows += dz * xhat
                s2_rows += xhat
            kept = kept + ((xhat, dz * gamma),)
        s0_rows = tl.reshape(s0_rows, [BLOCKS, ROWS, VECTOR])
        s1_rows = tl.reshape(s1_rows, [BLOCKS, ROWS, VECTOR])
        s0, s1 = tl.reduce((s0_rows, s1_rows), 1, add_pairs)  # at once: half as many barriers as two sums
        # Each step has ranges of its own: equal ones are one value to the compiler, and the planner gives up where too
        # much hangs together.
        channel = step * VECTOR + range_of_use(VECTOR, 1 + step)
        if sums is not None:
            slot = (sample * BLOCKS + range_of_use(BLOCKS, 1 + step))[:, None] * channels + first_channel
            slot += channel[None, :]
            tl.store(sums + slot, s0)
            tl.store(plane_of(sums, 1, plane_size) + slot, s1)
            if WITH_XHAT:
                s2 = tl.sum(tl.reshape(s2_rows, [BLOCKS, ROWS, VECTOR]), 1)
                tl.store(plane_of(sums, 2, plane_size) + slot, s2)
        gamma, _ = channel_affine(weight, None, scale, None, channel, tl.full([VECTOR], True, tl.int1), compute)
        m1, m2 = tl.reduce((s0 * gamma[None, :], s1 * gamma[None, :]), 1, add_pairs)
        m1_blocks += m1
        m2_blocks += m2

    m1, m2 = merge_sums(partials, group, m1_blocks, m2_blocks, BLOCKS, CLUSTER_SYNC, compute)
    m1 = m1 / (STEPS * VECTOR * spatial)
    m2 = m2 / (STEPS * VECTOR * spatial)
    pair = pair_of(m1_m2, group)
    tl.store(pair, m1)
    tl.store(pair + 1, m2)
    for step in tl.static_range(STEPS if dx is not None else 0):
        for t in tl.static_range(TILES):
            xhat, direct = kept[step * TILES + t]
            result = rstd * (direct - m1 - xhat * m2)
            offsets = first + t * ROWS * channels + step * VECTOR
            if dshortcut is not None:
                result += widen(tl.load(dshortcut + offsets), compute, PTX)
            tl.store(dx + offsets, result.to(dx.dtype.element_ty))


@triton.jit
def split_sums(
    x, dy, mean_of_group, rstd_of_group, sums, weight, bias, pre_bias, scale, shift, scale_map, shift_map, dscale_map,
    dshift_map, pre_bias_stride, scale_stride, shift_stride, plane_size, num_groups, group_channels, spatial,
    row_vectors, strips, column_tiles, SILU: tl.constexpr, PTX: tl.constexpr, WITH_XHAT: tl.constexpr,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write the sums of each channel of a strip over its rows: the first pass.

    xhat = rstd * (h - mean) is never formed: rstd multiplies the sums and the gain of each channel instead.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    sample, strip, base, channel, offsets, count = locate_strip(
        tl.program_id(0), strips, column_tiles, row_vectors, spatial, ROWS, TILE_ROWS, COLUMNS, VECTOR
    )
    channels = row_vectors * VECTOR
    own = within(channel, channels, MASKED)
    group, rstd, centre, gain, beta = strip_affine(
        mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
        num_groups, group_channels, sample, channel, own,
    )  # fmt: skip
    x += base
    dy += base
    s0 = tl.zeros([TILE_ROWS, COLUMNS], compute)
    s1 = tl.zeros([TILE_ROWS, COLUMNS], compute)
    s2 = tl.zeros([TILE_ROWS, COLUMNS], compute)
    for turn in range(ROWS // (TILES * TILE_ROWS)):
        first = turn * TILES
        tiles = load_pairs(x, dy, offsets, channels, first, own, count, TILE_ROWS, TILES, MASKED)
        for t in tl.static_range(TILES):
            inside = in_tile(first + t, own, count, TILE_ROWS, MASKED)
            centred = tl.where(inside, widen(tiles[t][0], compute, PTX) - centre[None, :], 0.0)
            z = centred * gain[None, :] + beta[None, :]
            start = start_of_tile(base, first + t, channels, TILE_ROWS)
            scale_tile = advance(scale_map, start)
            shift_tile = advance(shift_map, start)
            dscale_tile = advance(dscale_map, start)
            dshift_tile = advance(dshift_map, start)
            dz = gradient_of_z(
                widen(tiles[t][1], compute, PTX), z, scale_tile, shift_tile, dscale_tile, dshift_tile, offsets, inside,
                SILU, PTX, compute,
            )  # fmt: skip
            s0 += dz
            s1 += dz * centred
            if WITH_XHAT:
                s2 += centred
        x += TILES * TILE_ROWS * channels
        dy += TILES * TILE_ROWS * channels
    slot = (sample * strips + strip) * channels + channel
    tl.store(sums + slot, tl.sum(s0, 0), mask=own)
    tl.store(plane_of(sums, 1, plane_size) + slot, rstd * tl.sum(s1, 0), mask=own)
    if WITH_XHAT:
        tl.store(plane_of(sums, 2, plane_size) + slot, rstd * tl.sum(s2, 0), mask=own)


@triton.jit
def load_pairs(
    x, dy, offsets, channels, first, own, count, TILE_ROWS: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr
):
    """Load TILES tiles of x and dy, from tile `first` of the strip on."""
    tiles = ()
    for t in tl.static_range(TILES):
        inside = in_tile(first + t, own, count, TILE_ROWS, MASKED)
        x_tile = tl.load(x + t * TILE_ROWS * channels + offsets, mask=inside, other=0.0)
        tiles = tiles + ((x_tile, tl.load(dy + t * TILE_ROWS * channels + offsets, mask=inside, other=0.0)),)
    return tiles


@triton.jit
def split_apply(
    x, dy, dshortcut, dx, mean_of_group, rstd_of_group, m1_m2, weight, bias, pre_bias, scale, shift, scale_map,
    shift_map, pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, spatial, row_vectors, strips,
    column_tiles, SILU: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write dx of a strip, with dshortcut added where x has one: the second pass.

    Programs and loops walk backwards: what the first pass read last is still in L2.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    sample, strip, base, channel, offsets, count = locate_strip(
        tl.num_programs(0) - 1 - tl.program_id(0), strips, column_tiles, row_vectors, spatial, ROWS, TILE_ROWS, COLUMNS,
        VECTOR,
    )  # fmt: skip
    channels = row_vectors * VECTOR
    own = within(channel, channels, MASKED)
    group, rstd, centre, gain, beta = strip_affine(
        mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
        num_groups, group_channels, sample, channel, own,
    )  # fmt: skip
    m1 = rstd * tl.load(pair_of(m1_m2, group), mask=own, other=0.0)
    m2 = rstd * rstd * tl.load(pair_of(m1_m2, group) + 1, mask=own, other=0.0)
    last: tl.constexpr = ROWS - TILES * TILE_ROWS
    x += base + number(last, tl.int64) * channels
    dy += base + number(last, tl.int64) * channels
    dx += base + number(last, tl.int64) * channels
    dshortcut = advance(dshortcut, base + number(last, tl.int64) * channels)
    for turn in range(ROWS // (TILES * TILE_ROWS)):
        first = last // TILE_ROWS - turn * TILES
        tiles = load_pairs(x, dy, offsets, channels, first, own, count, TILE_ROWS, TILES, MASKED)
        added = ()
        for t in tl.static_range(TILES if dshortcut is not None else 0):
            inside = in_tile(first + t, own, count, TILE_ROWS, MASKED)
            added = added + (tl.load(dshortcut + t * TILE_ROWS * channels + offsets, mask=inside, other=0.0),)
        for t in tl.static_range(TILES):
            inside = in_tile(first + t, own, count, TILE_ROWS, MASKED)
            centred = widen(tiles[t][0], compute, PTX) - centre[None, :]
            z = centred * gain[None, :] + beta[None, :]
            start = start_of_tile(base, first + t, channels, TILE_ROWS)
            scale_tile = advance(scale_map, start)
            shift_tile = advance(shift_map, start)
            dz = gradient_of_z(
                widen(tiles[t][1], compute, PTX), z, scale_tile, shift_tile, None, None, offsets, inside, SILU, PTX,
                compute,
            )  # fmt: skip
            at = t * TILE_ROWS * channels + offsets
            result = dz * gain[None, :] - m1[None, :] - centred * m2[None, :]
            if dshortcut is not None:
                result += widen(added[t], compute, PTX)
            tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        x -= TILES * TILE_ROWS * channels
        dy -= TILES * TILE_ROWS * channels
        dx -= TILES * TILE_ROWS * channels
        if dshortcut is not None:
            dshortcut -= TILES * TILE_ROWS * channels
