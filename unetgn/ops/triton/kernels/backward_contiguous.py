"""Computes the backward pass in the contiguous layout.

With dz = dy * act'(z): S0 = sum dz and S1 = sum dz * xhat of each channel, m1 = sum_c gamma' S0 / L and
m2 = sum_c gamma' S1 / L of each group of L elements, dx = rstd * (dz * gamma' - m1 - xhat * m2).

The sums are wanted by channel, so a tile is SEGMENTS segments of WIDTH elements, each inside one channel. A channel has
`channel_segments` of them. EXACT: they fill the channel, spatial = channel_segments * WIDTH; else the last segment of a
channel is masked. The sums go to `sums` (2 or 3, N, channel_segments, C), one slot a segment, one writer a slot: S0, S1
and, where pre_bias needs a gradient, S2 = sum xhat.
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
    pair_of,
    plane_of,
    range_of_use,
    widen,
    within,
)


@triton.jit
def segment_starts(segment, spatial, channel_segments, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Return each segment's (offset of its first element, number of elements from there to the end of its channel)."""
    if EXACT:
        start = segment * WIDTH
        length = tl.full(segment.shape, WIDTH, tl.int32)
    else:
        offset = (segment % channel_segments) * WIDTH
        start = (segment // channel_segments).to(tl.int64) * spatial + offset
        length = spatial - offset
    return start, length


@triton.jit
def inside_segments(segment, limit, element, length, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Return the mask [SEGMENTS, WIDTH] of elements in one of the first `limit` segments and in its channel."""
    return within(segment, limit, MASKED)[:, None] & within(element, length[:, None], not EXACT)


@triton.jit
def store_sums(sums, index, plane_size, s0, s1, xhat, mask, WITH_XHAT: tl.constexpr):
    """Store S0, S1 and, where it is wanted, S2 of segments in the planes of `sums`."""
    tl.store(sums + index, s0, mask=mask)
    tl.store(plane_of(sums, 1, plane_size) + index, s1, mask=mask)
    if WITH_XHAT:
        tl.store(plane_of(sums, 2, plane_size) + index, tl.sum(xhat, 1), mask=mask)


@triton.jit
def resident_backward(
    x, dy, dshortcut, dx, mean_of_group, rstd_of_group, sums, m1_m2, weight, bias, pre_bias, scale, shift, scale_map,
    shift_map, dscale_map, dshift_map, pre_bias_stride, scale_stride, shift_stride, plane_size, num_groups,
    group_channels, spatial, channel_segments, SILU: tl.constexpr, PTX: tl.constexpr, WITH_XHAT: tl.constexpr,
    TILES: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write dx of one group; a block holds xhat and rstd * gamma' * dz in registers: x and dy are read once.

    dshortcut, where x has one, is added to dx.

    Also write the sums, and (m1, m2) to `m1_m2` (N*G, 2). dx and sums may be None.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    first_channel = (group % num_groups) * group_channels
    channels = num_groups * group_channels
    if EXACT:
        base = group.to(tl.int64) * (group_channels * channel_segments) * WIDTH
    else:
        base = group.to(tl.int64) * group_channels * spatial
    group_segments = group_channels * channel_segments
    local = tl.arange(0, SEGMENTS)
    element = tl.arange(0, WIDTH)[None, :]
    mean = tl.load(mean_of_group + group)
    rstd = tl.load(rstd_of_group + group)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)

    raw = ()
    for t in tl.static_range(TILES):
        segment = t * SEGMENTS + local
        start, length = segment_starts(segment, spatial, channel_segments, WIDTH, EXACT)
        inside = inside_segments(segment, group_segments, element, length, MASKED and t == TILES - 1, EXACT)
        offsets = base + start[:, None] + element
        raw = raw + ((tl.load(x + offsets, mask=inside, other=0.0), tl.load(dy + offsets, mask=inside, other=0.0)),)

    kept = ()
    m1_segments = tl.zeros([SEGMENTS], compute)
    m2_segments = tl.zeros([SEGMENTS], compute)
    for t in tl.static_range(TILES):
        segment = t * SEGMENTS + local
        start, length = segment_starts(segment, spatial, channel_segments, WIDTH, EXACT)
        own = within(segment, group_segments, MASKED and t == TILES - 1)
        channel = first_channel + segment // channel_segments
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
        centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
        xhat = (widen(raw[t][0], compute, PTX) - centre[:, None]) * rstd
        if not EXACT:
            xhat = tl.where(element < length[:, None], xhat, 0.0)
        z = xhat * gamma[:, None] + beta[:, None]
        inside = inside_segments(segment, group_segments, element, length, MASKED and t == TILES - 1, EXACT)
        dz = gradient_of_z(
            widen(raw[t][1], compute, PTX), z, scale_map, shift_map, dscale_map, dshift_map,
            base + start[:, None] + element, inside, SILU, PTX, compute,
        )  # fmt: skip
        s0 = tl.sum(dz, 1)
        s1 = tl.sum(dz * xhat, 1)
        if sums is not None:
            slot = (sample * channel_segments + segment % channel_segments) * channels + channel
            store_sums(sums, slot, plane_size, s0, s1, xhat, own, WITH_XHAT)
        m1_segments += tl.where(own, s0 * gamma, 0.0)
        m2_segments += tl.where(own, s1 * gamma, 0.0)
        kept = kept + ((xhat, dz * (rstd * gamma)[:, None]),)

    m1 = tl.sum(m1_segments, 0) / (group_channels * spatial)
    m2 = tl.sum(m2_segments, 0) / (group_channels * spatial)
    pair = pair_of(m1_m2, group)
    tl.store(pair, m1)
    tl.store(pair + 1, m2)
    added = ()  # loaded late, for registers, but all at once: no load passes a store
    for t in tl.static_range(TILES if dshortcut is not None else 0):
        segment = t * SEGMENTS + local
        start, length = segment_starts(segment, spatial, channel_segments, WIDTH, EXACT)
        inside = inside_segments(segment, group_segments, element, length, MASKED and t == TILES - 1, EXACT)
        added = added + (tl.load(dshortcut + base + start[:, None] + element, mask=inside, other=0.0),)
    for t in tl.static_range(TILES if dx is not None else 0):
        xhat, direct = kept[t]
        result = direct - rstd * m1 - xhat * (rstd * m2)
        segment = t * SEGMENTS + local
        start, length = segment_starts(segment, spatial, channel_segments, WIDTH, EXACT)
        inside = inside_segments(segment, group_segments, element, length, MASKED and t == TILES - 1, EXACT)
        if dshortcut is not None:
            result += widen(added[t], compute, PTX)
        tl.store(dx + base + start[:, None] + element, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def first_tile(TILES: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, USE: tl.constexpr):
    """Return where in a group the elements of each block's first tile lie, [BLOCKS, WIDTH]; the next are WIDTH on."""
    return range_of_use(BLOCKS, USE)[:, None] * (TILES * WIDTH) + range_of_use(WIDTH, USE)[None, :]


@triton.jit
def cluster_backward(
    x, dy, dshortcut, dx, mean_of_group, rstd_of_group, sums, m1_m2, partials, weight, bias, pre_bias, scale, shift,
    pre_bias_stride, scale_stride, shift_stride, plane_size, num_groups, group_channels, spatial, channel_segments,
    SILU: tl.constexpr, PTX: tl.constexpr, WITH_XHAT: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    WIDTH: tl.constexpr, CLUSTER_SYNC: tl.constexpr,
):  # fmt: skip
    """Do what `resident_backward` does where the BLOCKS blocks of a cluster hold a group, each TILES of its segments.

    The blocks exchange their parts of m1 and m2 through `partials` (N*G, 2, BLOCKS). A tile is one segment of each
    block, [BLOCKS, WIDTH]: with more, Triton 3.7.1's planner of clusters gives up.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    first_channel = (group % num_groups) * group_channels
    channels = num_groups * group_channels
    base = group.to(tl.int64) * (group_channels * channel_segments) * WIDTH
    every = tl.full([BLOCKS], True, tl.int1)
    mean = tl.load(mean_of_group + group)
    rstd = tl.load(rstd_of_group + group)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)

    raw = ()
    for t in tl.static_range(TILES):
        offsets = first_tile(TILES, WIDTH, BLOCKS, 1)
        raw = raw + ((tl.load(x + base + t * WIDTH + offsets), tl.load(dy + base + t * WIDTH + offsets)),)

    kept = ()
    m1_blocks = tl.zeros([BLOCKS], compute)
    m2_blocks = tl.zeros([BLOCKS], compute)
    for t in tl.static_range(TILES):
        channel = first_channel + (range_of_use(BLOCKS, 2) * TILES + t) // channel_segments
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, every, compute)
        centre = mean - load_or(pre_bias, channel, every, 0.0, compute)
        xhat = (widen(raw[t][0], compute, PTX) - centre[:, None]) * rstd
        z = xhat * gamma[:, None] + beta[:, None]
        dz = activation_gradient(widen(raw[t][1], compute, PTX), z, SILU, PTX)
        s0, s1 = tl.reduce((dz, dz * xhat), 1, add_pairs)  # at once: half as many barriers as two sums
        if sums is not None:
            segment = range_of_use(BLOCKS, 3) * TILES + t
            slot = (sample * channel_segments + segment % channel_segments) * channels
            slot += first_channel + segment // channel_segments
            store_sums(sums, slot, plane_size, s0, s1, xhat, every, WITH_XHAT)
        m1_blocks += s0 * gamma
        m2_blocks += s1 * gamma
        kept = kept + ((xhat, dz * (rstd * gamma)[:, None]),)

    m1, m2 = merge_sums(partials, group, m1_blocks, m2_blocks, BLOCKS, CLUSTER_SYNC, compute)
    m1 = m1 / (group_channels * spatial)
    m2 = m2 / (group_channels * spatial)
    pair = pair_of(m1_m2, group)
    tl.store(pair, m1)
    tl.store(pair + 1, m2)
    for t in tl.static_range(TILES if dx is not None else 0):
        xhat, direct = kept[t]
        result = direct - rstd * m1 - xhat * (rstd * m2)
        offsets = first_tile(TILES, WIDTH, BLOCKS, 4)
        if dshortcut is not None:
            result += widen(tl.load(dshortcut + base + t * WIDTH + offsets), compute, PTX)
        tl.store(dx + base + t * WIDTH + offsets, result.to(dx.dtype.element_ty))


@triton.jit
def split_tile(
    x, dy, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, scale_map, shift_map, dscale_map,
    dshift_map, pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, spatial, channel_segments,
    sample_tiles, program, SILU: tl.constexpr, PTX: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute what both passes need of a tile: its place, xhat, dz and gamma'. Write the maps' gradients, if asked."""
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    sample = (program // sample_tiles).to(tl.int64)
    channels = num_groups * group_channels
    first = (program % sample_tiles) * SEGMENTS
    segment = first + tl.arange(0, SEGMENTS)
    sample_segments = channels * channel_segments
    element = tl.arange(0, WIDTH)[None, :]
    if EXACT:
        base = (sample * channels * channel_segments + first) * WIDTH
        start, length = segment_starts(tl.arange(0, SEGMENTS), spatial, channel_segments, WIDTH, EXACT)
    else:
        base = sample * channels * spatial
        start, length = segment_starts(segment, spatial, channel_segments, WIDTH, EXACT)
    own = within(segment, sample_segments, MASKED)
    offsets = base + start[:, None] + element
    inside = inside_segments(segment, sample_segments, element, length, MASKED, EXACT)
    x_tile = tl.load(x + offsets, mask=inside, other=0.0)
    dy_tile = tl.load(dy + offsets, mask=inside, other=0.0)
    channel = segment // channel_segments
    group = sample * num_groups + channel // group_channels
    mean = tl.load(mean_of_group + group, mask=own, other=0.0)
    rstd = tl.load(rstd_of_group + group, mask=own, other=0.0)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
    centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
    xhat = (widen(x_tile, compute, PTX) - centre[:, None]) * rstd[:, None]
    if not EXACT:
        xhat = tl.where(element < length[:, None], xhat, 0.0)
    z = xhat * gamma[:, None] + beta[:, None]
    dz = gradient_of_z(
        widen(dy_tile, compute, PTX), z, scale_map, shift_map, dscale_map, dshift_map, offsets, inside, SILU, PTX,
        compute,
    )  # fmt: skip
    slot = (sample * channel_segments + segment % channel_segments) * channels + channel
    return offsets, inside, own, slot, group, rstd, gamma, xhat, dz


@triton.jit
def split_sums(
    x, dy, mean_of_group, rstd_of_group, sums, weight, bias, pre_bias, scale, shift, scale_map, shift_map, dscale_map,
    dshift_map, pre_bias_stride, scale_stride, shift_stride, plane_size, num_groups, group_channels, spatial,
    channel_segments, sample_tiles, SILU: tl.constexpr, PTX: tl.constexpr, WITH_XHAT: tl.constexpr,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the sums of each segment of a tile: the first pass."""
    offsets, inside, own, slot, group, rstd, gamma, xhat, dz = split_tile(
        x, dy, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, scale_map, shift_map, dscale_map,
        dshift_map, pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, spatial, channel_segments,
        sample_tiles, tl.program_id(0), SILU, PTX, SEGMENTS, WIDTH, MASKED, EXACT,
    )  # fmt: skip
    store_sums(sums, slot, plane_size, tl.sum(dz, 1), tl.sum(dz * xhat, 1), xhat, own, WITH_XHAT)


@triton.jit
def split_apply(
    x, dy, dshortcut, dx, mean_of_group, rstd_of_group, m1_m2, weight, bias, pre_bias, scale, shift, scale_map,
    shift_map, pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, spatial, channel_segments,
    sample_tiles, SILU: tl.constexpr, PTX: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write dx of a tile: the second pass. Programs walk backwards: what the first read last is still in L2."""
    offsets, inside, own, slot, group, rstd, gamma, xhat, dz = split_tile(
        x, dy, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, scale_map, shift_map, None, None,
        pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, spatial, channel_segments,
        sample_tiles, tl.num_programs(0) - 1 - tl.program_id(0), SILU, PTX, SEGMENTS, WIDTH, MASKED, EXACT,
    )  # fmt: skip
    m1 = rstd * tl.load(pair_of(m1_m2, group), mask=own, other=0.0)
    m2 = rstd * tl.load(pair_of(m1_m2, group) + 1, mask=own, other=0.0)
    result = dz * (rstd * gamma)[:, None] - m1[:, None] - xhat * m2[:, None]
    if dshortcut is not None:
        result += widen(tl.load(dshortcut + offsets, mask=inside, other=0.0), rstd_of_group.dtype.element_ty, PTX)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)
