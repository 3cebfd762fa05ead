"""Computes the forward pass in the channels_last layout, where x is (N, spatial, C) in memory.

A group that fits the registers of a block (or of a cluster) is read once, as tiles [BLOCKS, ROWS, GROUPS, VECTOR]:
STEPS vectors side by side are the channels of a group, so that no sum has to be sorted into groups. Larger groups are
split: per-channel statistics of strips of ROWS rows and COLUMNS channels, a tiny merge into groups, and a second pass
that writes y. Both passes go along a strip in a loop, some tiles [TILE_ROWS, COLUMNS] at a time.
"""

import triton
import triton.language as tl

from unetgn.ops.triton.kernels.elements import (
    activate,
    advance,
    channel_affine,
    cluster_barrier,
    divide,
    hold,
    load_or,
    modulate,
    number,
    reciprocal_deviation,
    widen,
    within,
)


@triton.jit
def group_channels_of_step(
    first_group, step: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    RANGE: tl.constexpr = 1,
):  # fmt: skip
    """Return the channels that step `step` holds of a bundle, [GROUPS, VECTOR].

    A bundle is GROUPS neighbouring groups of STEPS * VECTOR channels. The ranges do not begin at zero because the
    compiler makes equal ranges one value, which cannot be split over the blocks of a cluster in one place and not in
    another; RANGE says which of several such values it is.
    """
    groups = first_group + (tl.arange(RANGE * GROUPS, RANGE * GROUPS + GROUPS) - RANGE * GROUPS)
    vector = tl.arange(RANGE * VECTOR, RANGE * VECTOR + VECTOR) - RANGE * VECTOR
    return groups[:, None] * (STEPS * VECTOR) + step * VECTOR + vector[None, :]


@triton.jit
def centred_moments(
    tiles, pre_bias, first_group, share, BLOCKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr,
    PTX: tl.constexpr, compute: tl.constexpr,
):  # fmt: skip
    """Return (tiles, mean, M2 [BLOCKS, GROUPS]); M2 is summed about the mean, in a second pass over registers."""
    local = (tl.arange(ROWS, 2 * ROWS) - ROWS)[None, :, None, None]
    every = tl.full([GROUPS, VECTOR], True, tl.int1)
    count = number(share * (STEPS * VECTOR), compute)
    total = tl.zeros([BLOCKS, ROWS, GROUPS], compute)
    bias_total = tl.zeros([BLOCKS, GROUPS], compute)
    for step in tl.static_range(STEPS):
        for t in tl.static_range(TILES):
            total += tl.sum(widen(tiles[step * TILES + t], compute, PTX), 3)
        if pre_bias is not None:
            # Of several steps, Triton's planner of clusters needs another range than the tiles have; of one, theirs.
            channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR, 1 if STEPS == 1 else 2)
            # As rows of the blocks, which share it: the planner would split [GROUPS, VECTOR] over them before it sums.
            extra = load_or(pre_bias, channel, every, 0.0, compute)[None, :, :]
            bias_total += tl.sum(tl.broadcast_to(extra, [BLOCKS, GROUPS, VECTOR]), 2)
    mean = divide(tl.sum(total, 1) + bias_total * share, count)

    held = ()
    residual = tl.zeros([BLOCKS, ROWS, GROUPS], compute)
    squares = tl.zeros([BLOCKS, ROWS, GROUPS], compute)
    for step in tl.static_range(STEPS):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        extra = load_or(pre_bias, channel, every, 0.0, compute)
        centre = mean[:, :, None] - extra[None, :, :]
        for t in tl.static_range(TILES):
            tile = hold(tiles[step * TILES + t], HOLD)
            inside = within(t * ROWS + local, share, MASKED and t == TILES - 1)
            d = tl.where(inside, widen(tile, compute, PTX) - centre[:, None, :, :], 0.0)
            residual += tl.sum(d, 3)
            squares += tl.sum(d * d, 3)
            held = held + (tile,)
    # The deviations measure by how much the first mean was rounded: take that back.
    correction = divide(tl.sum(residual, 1), count)
    return held, mean + correction, tl.sum(squares, 1) - correction * correction * count


@triton.jit
def merge_blocks(
    partials, program, means, m2s, count, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, CLUSTER_SYNC: tl.constexpr,
    compute: tl.constexpr,
):  # fmt: skip
    """Merge the (mean, M2 [GROUPS]) of all blocks, each with `count` elements a group, in a fixed order."""
    if BLOCKS == 1:
        mean = tl.sum(means, 0)
        m2 = tl.sum(m2s, 0)
    else:
        group = tl.arange(0, GROUPS)
        slots = partials + program * (2 * BLOCKS * GROUPS)
        slot = tl.arange(0, BLOCKS)[:, None] * GROUPS + group[None, :]
        tl.store(slots + slot, means)
        tl.store(slots + BLOCKS * GROUPS + slot, m2s)
        slots = partials + cluster_barrier(program, CLUSTER_SYNC) * (2 * BLOCKS * GROUPS) + group
        pivot = tl.load(slots, volatile=True)
        mean = pivot
        for k in tl.static_range(1, BLOCKS):
            mean += (tl.load(slots + k * GROUPS, volatile=True) - pivot) / BLOCKS
        m2 = tl.zeros([GROUPS], compute)
        for k in tl.static_range(BLOCKS):
            d = tl.load(slots + k * GROUPS, volatile=True) - mean
            m2 += tl.load(slots + (BLOCKS + k) * GROUPS, volatile=True) + d * d * count
    return mean, m2


@triton.jit
def resident_forward(
    x, y, mean_of_group, rstd_of_group, partials, weight, bias, pre_bias, scale, shift, scale_map, shift_map,
    pre_bias_stride, scale_stride, shift_stride, bundles, spatial, eps: tl.constexpr, SILU: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr,
    VECTOR: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr, PTX: tl.constexpr, CLUSTER_SYNC: tl.constexpr,
):  # fmt: skip
    """Normalize one bundle a program, held in the registers of BLOCKS blocks: x is read once.

    Block k holds the rows [k * share, (k + 1) * share) of the sample. The blocks exchange (mean, M2) through `partials`
    (programs, 2, BLOCKS, GROUPS). Each merges them in the same order.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    program = tl.program_id(0)
    sample = (program // bundles).to(tl.int64)
    first_group = (program % bundles) * GROUPS
    channels = bundles * (GROUPS * STEPS * VECTOR)
    share = spatial // BLOCKS
    block = tl.arange(0, BLOCKS)[:, None, None, None]
    local = (tl.arange(ROWS, 2 * ROWS) - ROWS)[None, :, None, None]
    every = tl.full([GROUPS, VECTOR], True, tl.int1)
    x += sample * spatial * channels
    y += sample * spatial * channels
    scale_map = advance(scale_map, sample * spatial * channels)
    shift_map = advance(shift_map, sample * spatial * channels)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)

    tiles = ()
    for step in tl.static_range(STEPS):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)[None, None, :, :]
        for t in tl.static_range(TILES):
            offsets = (block * share + t * ROWS + local) * channels + channel
            inside = within(t * ROWS + local, share, MASKED and t == TILES - 1)
            tiles = tiles + (tl.load(x + offsets, mask=inside, other=0.0),)
    tiles, means, m2s = centred_moments(
        tiles, pre_bias, first_group, share, BLOCKS, TILES, ROWS, GROUPS, STEPS, VECTOR, MASKED, HOLD, PTX, compute
    )
    count = number(share * (STEPS * VECTOR), compute)
    mean, m2 = merge_blocks(partials, program, means, m2s, count, BLOCKS, GROUPS, CLUSTER_SYNC, compute)
    rstd = reciprocal_deviation(divide(m2, tl.zeros([GROUPS], compute) + count * BLOCKS), eps)
    group = program * GROUPS + tl.arange(0, GROUPS)
    tl.store(mean_of_group + group, mean)
    tl.store(rstd_of_group + group, rstd)

    for step in tl.static_range(STEPS):
        channel = group_channels_of_step(first_group, step, STEPS, GROUPS, VECTOR)
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, every, compute)
        extra = load_or(pre_bias, channel, every, 0.0, compute)
        centre = (mean[:, None] - extra)[None, None, :, :]
        gamma = (gamma * rstd[:, None])[None, None, :, :]
        for t in tl.static_range(TILES):
            tile = widen(hold(tiles[step * TILES + t], HOLD), compute, PTX)
            z = (tile - centre) * gamma + beta[None, None, :, :]
            offsets = (block * share + t * ROWS + local) * channels + channel[None, None, :, :]
            inside = within(t * ROWS + local, share, MASKED and t == TILES - 1)
            z = modulate(z, scale_map, shift_map, offsets, inside, compute, PTX)
            tl.store(y + offsets, activate(z, SILU, PTX).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rows_of_part(part, spatial, ROWS: tl.constexpr):
    """Return (first row, number of rows) of a part of at most ROWS rows, in 64 bits, which `spatial` may need."""
    first = part.to(tl.int64) * ROWS
    return first, tl.minimum(spatial - first, ROWS).to(tl.int32)


@triton.jit
def locate_strip(
    program, strips, column_tiles, row_vectors, spatial, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return (sample, strip, base, channel [COLUMNS], offsets [TILE_ROWS, COLUMNS], row count) of a program's strip.

    A strip is ROWS rows of COLUMNS channels; `base` is where its first row begins, `offsets` are those of a tile.
    """
    sample = (program // (strips * column_tiles)).to(tl.int64)
    strip = program // column_tiles % strips
    channel = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    channels = row_vectors * VECTOR
    first_row, count = rows_of_part(strip, spatial, ROWS)
    base = (sample * spatial + first_row) * channels
    offsets = tl.arange(0, TILE_ROWS)[:, None] * channels + channel[None, :]
    return sample, strip, base, channel, offsets, count


@triton.jit
def in_tile(tile, own, count, TILE_ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Return the mask [TILE_ROWS, COLUMNS] of a strip's tile: of its own channels, in the `count` rows of the strip."""
    return within(tile * TILE_ROWS + tl.arange(0, TILE_ROWS), count, MASKED)[:, None] & own[None, :]


@triton.jit
def start_of_tile(base, tile, channels, TILE_ROWS: tl.constexpr):
    """Return where a strip's tile begins, in maps and in their gradients: elements from the tensor's first."""
    return base + number(tile, tl.int64) * TILE_ROWS * channels


@triton.jit
def split_statistics(
    x, partials, spatial, row_vectors, strips, column_tiles, PTX: tl.constexpr, ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write (mean, M2) of each channel of a strip of ROWS rows to `partials` (N, chunks, 2, C), without pre_bias.

    A loop down the strip, TILES tiles at a time. Sums are about the channel's mean over the first tile: so M2 is at
    least TILE_ROWS² / ROWS of the squares that are subtracted, however far off one element is.
    """
    compute: tl.constexpr = partials.dtype.element_ty
    sample, strip, base, channel, offsets, count = locate_strip(
        tl.program_id(0), strips, column_tiles, row_vectors, spatial, ROWS, TILE_ROWS, COLUMNS, VECTOR
    )
    channels = row_vectors * VECTOR
    own = within(channel, channels, MASKED)
    x += base
    origin = tl.load(x + channel, mask=own, other=0.0).to(compute)
    inside = in_tile(0, own, count, TILE_ROWS, MASKED)
    tile = widen(tl.load(x + offsets, mask=inside, other=0.0), compute, PTX)
    rows = number(tl.minimum(count, TILE_ROWS), compute)
    pivot = origin + divide(tl.sum(tl.where(inside, tile - origin[None, :], 0.0), 0), rows)
    total = tl.zeros([TILE_ROWS, COLUMNS], compute)
    squares = tl.zeros([TILE_ROWS, COLUMNS], compute)
    for turn in range(ROWS // (TILES * TILE_ROWS)):
        tiles = ()
        for t in tl.static_range(TILES):
            inside = in_tile(turn * TILES + t, own, count, TILE_ROWS, MASKED)
            tiles = tiles + (tl.load(x + t * TILE_ROWS * channels + offsets, mask=inside, other=0.0),)
        for t in tl.static_range(TILES):
            inside = in_tile(turn * TILES + t, own, count, TILE_ROWS, MASKED)
            d = tl.where(inside, widen(tiles[t], compute, PTX) - pivot[None, :], 0.0)
            total += d
            squares += d * d
        x += TILES * TILE_ROWS * channels
    rows = number(count, compute)
    deviation = tl.sum(total, 0)
    correction = divide(deviation, rows)
    slot = partials + (sample * strips + strip) * 2 * channels + channel
    tl.store(slot, pivot + correction, mask=own)
    tl.store(slot + channels, tl.sum(squares, 0) - correction * deviation, mask=own)


@triton.jit
def merge_statistics(
    partials, mean_of_group, rstd_of_group, pre_bias, pre_bias_stride, num_groups, group_channels, spatial, chunks,
    eps: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Merge (mean, M2) of chunks and channels into mean and rstd of a group, in a fixed order, SLOTS chunks at a time.

    PADDED is a power of two >= group_channels. Chan, Golub & LeVeque 1983, with the first channel's mean as the origin.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    channels = num_groups * group_channels
    channel = (group % num_groups) * group_channels + tl.arange(0, PADDED)[None, :]
    own = tl.arange(0, PADDED)[None, :] < group_channels
    extra = load_or(advance(pre_bias, sample * pre_bias_stride), channel, own, 0.0, compute)
    slots = partials + sample * chunks * 2 * channels + channel
    length = number(number(spatial, tl.int64) * group_channels, compute)

    pivot = tl.sum(
        tl.sum(tl.where(tl.arange(0, PADDED)[None, :] == 0, tl.load(slots, mask=own, other=0.0) + extra, 0.0), 1), 0
    )
    mean = pivot
    first = 0
    while first < chunks:
        k = first + tl.arange(0, SLOTS)[:, None]
        _first_row, count = rows_of_part(k, spatial, ROWS)
        d = tl.load(slots + k * 2 * channels, mask=(k < chunks) & own, other=0.0) + extra - pivot
        mean += tl.sum(tl.sum(tl.where((k < chunks) & own, d * count.to(compute), 0.0), 1), 0) / length
        first += SLOTS
    m2 = tl.zeros([], compute)
    first = 0
    while first < chunks:
        k = first + tl.arange(0, SLOTS)[:, None]
        _first_row, count = rows_of_part(k, spatial, ROWS)
        d = tl.load(slots + k * 2 * channels, mask=(k < chunks) & own, other=0.0) + extra - mean
        channel_m2 = tl.load(slots + (k * 2 + 1) * channels, mask=(k < chunks) & own, other=0.0)
        m2 += tl.sum(tl.sum(tl.where((k < chunks) & own, channel_m2 + d * d * count.to(compute), 0.0), 1), 0)
        first += SLOTS
    tl.store(mean_of_group + group, mean)
    tl.store(rstd_of_group + group, reciprocal_deviation(divide(m2, length), eps))


@triton.jit
def strip_affine(
    mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, pre_bias_stride, scale_stride, shift_stride,
    num_groups, group_channels, sample, channel, own,
):  # fmt: skip
    """Return what a strip needs of each of its channels, [COLUMNS]: group, rstd, centre, gain and beta'.

    z = (x - centre) * gain + beta', where centre = mean - pre_bias and gain = rstd * gamma'.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = sample * num_groups + channel // group_channels
    mean = tl.load(mean_of_group + group, mask=own, other=0.0)
    rstd = tl.load(rstd_of_group + group, mask=own, other=0.0)
    pre_bias = advance(pre_bias, sample * pre_bias_stride)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    gamma, beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
    centre = mean - load_or(pre_bias, channel, own, 0.0, compute)
    return group, rstd, centre, rstd * gamma, beta


@triton.jit
def split_apply(
    x, y, mean_of_group, rstd_of_group, weight, bias, pre_bias, scale, shift, scale_map, shift_map, pre_bias_stride,
    scale_stride, shift_stride, num_groups, group_channels, spatial, row_vectors, strips, column_tiles,
    SILU: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, TILES: tl.constexpr,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write y of one strip. Programs and loops walk backwards: what the statistics read last is still in the L2 cache.

    What belongs to a channel is read once a strip.
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
    last: tl.constexpr = ROWS - TILES * TILE_ROWS
    x += base + number(last, tl.int64) * channels
    y += base + number(last, tl.int64) * channels
    for turn in range(ROWS // (TILES * TILE_ROWS)):
        first = last // TILE_ROWS - turn * TILES
        tiles = ()
        for t in tl.static_range(TILES):
            inside = in_tile(first + t, own, count, TILE_ROWS, MASKED)
            tiles = tiles + (tl.load(x + t * TILE_ROWS * channels + offsets, mask=inside, other=0.0),)
        for t in tl.static_range(TILES):
            inside = in_tile(first + t, own, count, TILE_ROWS, MASKED)
            z = (widen(tiles[t], compute, PTX) - centre[None, :]) * gain[None, :] + beta[None, :]
            start = start_of_tile(base, first + t, channels, TILE_ROWS)
            scale_tile = advance(scale_map, start)
            shift_tile = advance(shift_map, start)
            z = modulate(z, scale_tile, shift_tile, offsets, inside, compute, PTX)
            result = activate(z, SILU, PTX).to(y.dtype.element_ty)
            tl.store(y + t * TILE_ROWS * channels + offsets, result, mask=inside)
        x -= TILES * TILE_ROWS * channels
        y -= TILES * TILE_ROWS * channels
