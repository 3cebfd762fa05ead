"""Backward kernels for the contiguous layout.

With dz = dy * act'(z): S0 = sum dz and S1 = sum dz * xhat of each channel, m1 = sum_c gamma' S0 / L and
m2 = sum_c gamma' S1 / L of each group of L elements, dx = rstd * (dz * gamma' - m1 - xhat * m2).

Tiles are rows of WIDTH elements, each inside one channel, because the sums are wanted by channel. A channel has
`segments` rows. EXACT: they fill the channel, spatial = segments * WIDTH; else the last row of a channel is masked. The
sums go to `sums` (2 or 3, N, segments, C), one slot a row, one writer a slot: S0, S1 and, where pre_bias needs a
gradient, S2 = sum xhat.
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


@triton.jit
def row_starts(row, spatial, segments, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """(offset of each row's first element, number of elements from there to the end of its channel)."""
    if EXACT:
        start = row * WIDTH
        length = tl.full(row.shape, WIDTH, tl.int32)
    else:
        column = (row % segments) * WIDTH
        start = (row // segments).to(tl.int64) * spatial + column
        length = spatial - column
    return start, length


@triton.jit
def inside_rows(row, rows, column, length, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """The mask [ROWS, WIDTH] of elements that lie in one of `rows` rows and in its channel."""
    return within(row, rows, MASKED)[:, None] & within(column, length[:, None], not EXACT)


@triton.jit
def store_sums(sums, index, plane, s0, s1, xhat, mask, WITH_XHAT: tl.constexpr):
    """S0, S1 and, where it is wanted, S2 of rows into the planes of `sums`."""
    tl.store(sums + index, s0, mask=mask)
    tl.store(plane_of(sums, 1, plane) + index, s1, mask=mask)
    if WITH_XHAT:
        tl.store(plane_of(sums, 2, plane) + index, tl.sum(xhat, 1), mask=mask)


@triton.jit
def resident_backward(
    x, dy, dx, mean_in, rstd_in, sums, group_means, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, plane, num_groups, group_channels, spatial, segments, SILU: tl.constexpr, WITH_XHAT: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dx of one group; a block holds xhat and rstd * gamma' * dz in registers: x and dy are read once.

    Also writes the sums, and (m1, m2) into `group_means` (N*G, 2). dx and sums may be None.
    """
    compute: tl.constexpr = mean_in.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    first_channel = (group % num_groups) * group_channels
    channels = num_groups * group_channels
    if EXACT:
        base = group.to(tl.int64) * (group_channels * segments) * WIDTH
    else:
        base = group.to(tl.int64) * group_channels * spatial
    rows = group_channels * segments
    local = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    mean = tl.load(mean_in + group)
    rstd = tl.load(rstd_in + group)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)

    raw = ()
    for t in tl.static_range(TILES):
        row = t * ROWS + local
        start, length = row_starts(row, spatial, segments, WIDTH, EXACT)
        inside = inside_rows(row, rows, column, length, MASKED and t == TILES - 1, EXACT)
        offsets = base + start[:, None] + column
        raw = raw + ((tl.load(x + offsets, mask=inside, other=0.0), tl.load(dy + offsets, mask=inside, other=0.0)),)

    kept = ()
    m1_rows = tl.zeros([ROWS], compute)
    m2_rows = tl.zeros([ROWS], compute)
    for t in tl.static_range(TILES):
        row = t * ROWS + local
        start, length = row_starts(row, spatial, segments, WIDTH, EXACT)
        own = within(row, rows, MASKED and t == TILES - 1)
        channel = first_channel + row // segments
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
        centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
        xhat = (raw[t][0].to(compute) - centre[:, None]) * rstd
        if not EXACT:
            xhat = tl.where(column < length[:, None], xhat, 0.0)
        dz = activation_gradient(raw[t][1].to(compute), xhat * gamma[:, None] + beta[:, None], SILU)
        s0 = tl.sum(dz, 1)
        s1 = tl.sum(dz * xhat, 1)
        if sums is not None:
            slot = (sample * segments + row % segments) * channels + channel
            store_sums(sums, slot, plane, s0, s1, xhat, own, WITH_XHAT)
        m1_rows += tl.where(own, s0 * gamma, 0.0)
        m2_rows += tl.where(own, s1 * gamma, 0.0)
        kept = kept + ((xhat, dz * (rstd * gamma)[:, None]),)

    m1 = tl.sum(m1_rows, 0) / (group_channels * spatial)
    m2 = tl.sum(m2_rows, 0) / (group_channels * spatial)
    pair = pair_of(group_means, group)
    tl.store(pair, m1)
    tl.store(pair + 1, m2)
    for t in tl.static_range(TILES if dx is not None else 0):
        xhat, direct = kept[t]
        result = (direct - rstd * m1 - xhat * (rstd * m2)).to(dx.dtype.element_ty)
        row = t * ROWS + local
        start, length = row_starts(row, spatial, segments, WIDTH, EXACT)
        inside = inside_rows(row, rows, column, length, MASKED and t == TILES - 1, EXACT)
        tl.store(dx + base + start[:, None] + column, result, mask=inside)


@triton.jit
def split_rows(
    x, dy, mean_in, rstd_in, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
    num_groups, group_channels, spatial, segments, row_blocks, program, SILU: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What both passes compute of ROWS rows of a sample: their place, xhat, dz and gamma'."""
    compute: tl.constexpr = mean_in.dtype.element_ty
    sample = (program // row_blocks).to(tl.int64)
    channels = num_groups * group_channels
    first = (program % row_blocks) * ROWS
    row = first + tl.arange(0, ROWS)
    rows = channels * segments
    column = tl.arange(0, WIDTH)[None, :]
    if EXACT:
        base = (sample * channels * segments + first) * WIDTH
        start, length = row_starts(tl.arange(0, ROWS), spatial, segments, WIDTH, EXACT)
    else:
        base = sample * channels * spatial
        start, length = row_starts(row, spatial, segments, WIDTH, EXACT)
    own = within(row, rows, MASKED)
    offsets = base + start[:, None] + column
    inside = inside_rows(row, rows, column, length, MASKED, EXACT)
    x_tile = tl.load(x + offsets, mask=inside, other=0.0)
    dy_tile = tl.load(dy + offsets, mask=inside, other=0.0)
    channel = row // segments
    group = sample * num_groups + channel // group_channels
    mean = tl.load(mean_in + group, mask=own, other=0.0)
    rstd = tl.load(rstd_in + group, mask=own, other=0.0)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
    centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
    xhat = (x_tile.to(compute) - centre[:, None]) * rstd[:, None]
    if not EXACT:
        xhat = tl.where(column < length[:, None], xhat, 0.0)
    dz = activation_gradient(dy_tile.to(compute), xhat * gamma[:, None] + beta[:, None], SILU)
    slot = (sample * segments + row % segments) * channels + channel
    return offsets, inside, own, slot, group, rstd, gamma, xhat, dz


@triton.jit
def split_sums(
    x, dy, mean_in, rstd_in, sums, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
    plane, num_groups, group_channels, spatial, segments, row_blocks, SILU: tl.constexpr, WITH_XHAT: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Pass 1: the sums of ROWS rows."""
    offsets, inside, own, slot, group, rstd, gamma, xhat, dz = split_rows(
        x, dy, mean_in, rstd_in, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
        num_groups, group_channels, spatial, segments, row_blocks, tl.program_id(0), SILU, ROWS, WIDTH, MASKED, EXACT,
    )  # fmt: skip
    store_sums(sums, slot, plane, tl.sum(dz, 1), tl.sum(dz * xhat, 1), xhat, own, WITH_XHAT)


@triton.jit
def split_apply(
    x, dy, dx, mean_in, rstd_in, group_means, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride,
    shift_stride, num_groups, group_channels, spatial, segments, row_blocks, SILU: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Pass 2: dx of ROWS rows; programs walk backwards, because what pass 1 read last is still in the L2 cache."""
    offsets, inside, own, slot, group, rstd, gamma, xhat, dz = split_rows(
        x, dy, mean_in, rstd_in, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
        num_groups, group_channels, spatial, segments, row_blocks, tl.num_programs(0) - 1 - tl.program_id(0), SILU,
        ROWS, WIDTH, MASKED, EXACT,
    )  # fmt: skip
    m1 = rstd * tl.load(pair_of(group_means, group), mask=own, other=0.0)
    m2 = rstd * tl.load(pair_of(group_means, group) + 1, mask=own, other=0.0)
    result = (dz * (rstd * gamma)[:, None] - m1[:, None] - xhat * m2[:, None]).to(dx.dtype.element_ty)
    tl.store(dx + offsets, result, mask=inside)
