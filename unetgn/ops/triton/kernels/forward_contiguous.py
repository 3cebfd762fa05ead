"""Computes the forward pass in the contiguous layout, where a group is one stretch of memory.

A block works on TILES flat tiles [BLOCKS, VECTORS, VECTOR], of TILE = VECTORS * VECTOR elements. BLOCKS is 1 except in
a cluster. WIDTH is a power of two that divides the spatial size: a channel has spatial = channel_segments * WIDTH
elements. VECTOR divides WIDTH, so each vector lies inside one channel and needs one pair (gamma', beta'). The channel
of element e is (e // WIDTH) // channel_segments, a mere shift where the spatial size is a power of two.
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
def vector_starts(TILE: tl.constexpr, VECTOR: tl.constexpr, RANGE: tl.constexpr = 1):
    """Return where the vectors of a tile start, [1, VECTORS].

    The range does not start at zero: the compiler makes equal ranges one value, and one value cannot be split over the
    blocks of a cluster in one place and whole in another.
    """
    VECTORS: tl.constexpr = TILE // VECTOR
    return ((tl.arange(RANGE * VECTORS, RANGE * VECTORS + VECTORS) - RANGE * VECTORS) * VECTOR)[None, :]


@triton.jit
def affine_positions(TILE: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, RANGE: tl.constexpr = 1):
    """Return where in a tile to look up channels: at each vector, or once where a tile never leaves its channel."""
    if WIDTH % TILE == 0:
        positions = tl.zeros([1, 1], tl.int32)
    else:
        positions = vector_starts(TILE, VECTOR, RANGE)
    return positions


@triton.jit
def lanes(VECTOR: tl.constexpr):
    """Return the elements of a vector, [1, 1, VECTOR]."""
    return (tl.arange(VECTOR, 2 * VECTOR) - VECTOR)[None, None, :]


@triton.jit
def read_tiles(x, start, limit, TILES: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr):
    """Load TILES tiles from x[start], zero from element `limit` on, which may lie in the last tile only.

    The tile moves the pointer, not the offsets: the loads of all tiles share an address and differ by a constant, which
    the assembler writes into the instruction.
    """
    vector = vector_starts(TILE, VECTOR)
    offsets = (start + vector)[:, :, None] + lanes(VECTOR)
    tiles = ()
    for t in tl.static_range(TILES):
        inside = within((t * TILE + vector)[:, :, None], limit, MASKED and t == TILES - 1)
        tiles = tiles + (tl.load(x + t * TILE + offsets, mask=inside, other=0.0),)
    return tiles


@triton.jit
def centred_moments(
    tiles, pre_bias, start, limit, channel_segments, BLOCKS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr, PTX: tl.constexpr,
    compute: tl.constexpr,
):  # fmt: skip
    """Return (tiles, mean [BLOCKS], M2 [BLOCKS]); M2 is the sum of squares about the mean, in a second pass.

    Both passes are over registers.

    `pre_bias` points to the channel of element 0.
    """
    VECTORS: tl.constexpr = TILE // VECTOR
    vector = vector_starts(TILE, VECTOR)
    position = affine_positions(TILE, VECTOR, WIDTH)
    count = number(limit, compute)
    total = tl.zeros([BLOCKS, VECTORS], compute)
    for t in tl.static_range(TILES):
        total += tl.sum(widen(tiles[t], compute, PTX), 2)
        if pre_bias is not None:
            channel = (start + t * TILE + position) // WIDTH // channel_segments
            inside = within(t * TILE + position, limit, MASKED and t == TILES - 1)
            total += load_or(pre_bias, channel, inside, 0.0, compute) * VECTOR
    mean = divide(tl.sum(total, 1), count)

    held = ()
    residual = tl.zeros([BLOCKS, VECTORS], compute)
    squares = tl.zeros([BLOCKS, VECTORS], compute)
    for t in tl.static_range(TILES):
        tile = hold(tiles[t], HOLD)
        channel = (start + t * TILE + position) // WIDTH // channel_segments
        inside = within(t * TILE + position, limit, MASKED and t == TILES - 1)
        centre = mean[:, None] - load_or(pre_bias, channel, inside, 0.0, compute)
        inside = within((t * TILE + vector)[:, :, None], limit, MASKED and t == TILES - 1)
        d = tl.where(inside, widen(tile, compute, PTX) - centre[:, :, None], 0.0)
        squares += tl.sum(d * d, 2)  # before the residual: the other order needs more registers
        residual += tl.sum(d, 2)
        held = held + (tile,)
    # The deviations measure by how much the first mean was rounded: take that back.
    correction = divide(tl.sum(residual, 1), count)
    return held, mean + correction, tl.sum(squares, 1) - correction * correction * count


@triton.jit
def write_normalized(
    y, tiles, mean, rstd, weight, bias, pre_bias, scale, shift, scale_map, shift_map, start, limit, channel_segments,
    TILES: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    HOLD: tl.constexpr, PTX: tl.constexpr, SILU: tl.constexpr, compute: tl.constexpr,
):  # fmt: skip
    """Write y[start ...] = act((x + pre_bias - mean) * rstd * gamma' + beta'), with maps between the two.

    mean and rstd are scalars; maps point to element 0, as y does, the other tensors to its channel.
    """
    vector = vector_starts(TILE, VECTOR)
    # A range of its own, as Triton's planner of clusters needs it where pre_bias comes without an affine.
    position = affine_positions(TILE, VECTOR, WIDTH, RANGE=2)
    offsets = (start + vector)[:, :, None] + lanes(VECTOR)
    for t in tl.static_range(TILES):
        inside = within(t * TILE + position, limit, MASKED and t == TILES - 1)
        channel = (start + t * TILE + position) // WIDTH // channel_segments
        gamma, beta = channel_affine(weight, bias, scale, shift, channel, inside, compute)
        centre = mean - load_or(pre_bias, channel, inside, 0.0, compute)
        tile = widen(hold(tiles[t], HOLD), compute, PTX)
        z = (tile - centre[:, :, None]) * (rstd * gamma)[:, :, None] + beta[:, :, None]
        inside = within((t * TILE + vector)[:, :, None], limit, MASKED and t == TILES - 1)
        z = modulate(z, scale_map, shift_map, t * TILE + offsets, inside, compute, PTX)
        result = activate(z, SILU, PTX).to(y.dtype.element_ty)
        tl.store(y + t * TILE + offsets, result, mask=inside)


@triton.jit
def resident_forward(
    x, y, mean_of_group, rstd_of_group, partials, weight, bias, pre_bias, scale, shift, scale_map, shift_map,
    pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, channel_segments, eps: tl.constexpr,
    SILU: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr, PTX: tl.constexpr, CLUSTER_SYNC: tl.constexpr,
):  # fmt: skip
    """Normalize one group a program, held in the registers of BLOCKS blocks: x is read once.

    The blocks of a cluster exchange (mean, M2) through `partials` (N*G, 2, BLOCKS). Each merges them in the same order
    (Chan et al. 1983, for parts of equal size).
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    first_channel = (group % num_groups) * group_channels
    base = group.to(tl.int64) * (group_channels * channel_segments) * WIDTH
    weight = advance(weight, first_channel)
    bias = advance(bias, first_channel)
    pre_bias = advance(pre_bias, sample * pre_bias_stride + first_channel)
    scale = advance(scale, sample * scale_stride + first_channel)
    shift = advance(shift, sample * shift_stride + first_channel)
    share = (group_channels * channel_segments // BLOCKS) * WIDTH
    start = tl.arange(0, BLOCKS)[:, None] * share

    tiles = read_tiles(x + base, start, share, TILES, TILE, VECTOR, MASKED)
    tiles, means, m2s = centred_moments(
        tiles, pre_bias, start, share, channel_segments, BLOCKS, TILES, TILE, VECTOR, WIDTH, MASKED, HOLD, PTX, compute
    )
    if BLOCKS == 1:
        mean = tl.sum(means, 0)
        m2 = tl.sum(m2s, 0)
    else:
        slots = partials + group * (2 * BLOCKS) + tl.arange(0, BLOCKS)
        tl.store(slots, means)
        tl.store(slots + BLOCKS, m2s)
        slots = partials + cluster_barrier(group, CLUSTER_SYNC) * (2 * BLOCKS)
        pivot = tl.load(slots, volatile=True)
        mean = pivot
        for k in tl.static_range(1, BLOCKS):
            mean += (tl.load(slots + k, volatile=True) - pivot) / BLOCKS
        m2 = tl.zeros([], compute)
        for k in tl.static_range(BLOCKS):
            d = tl.load(slots + k, volatile=True) - mean
            m2 += tl.load(slots + BLOCKS + k, volatile=True) + d * d * share
    rstd = reciprocal_deviation(divide(m2, number(share * BLOCKS, compute)), eps)
    tl.store(mean_of_group + group, mean)
    tl.store(rstd_of_group + group, rstd)
    write_normalized(
        y + base, tiles, mean, rstd, weight, bias, pre_bias, scale, shift, advance(scale_map, base),
        advance(shift_map, base), start, share, channel_segments, TILES, TILE, VECTOR, WIDTH, MASKED, HOLD, PTX, SILU,
        compute,
    )  # fmt: skip


@triton.jit
def locate_part(
    program, parts, group_channels, channel_segments, PART: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """Return (group, base, channel, start, limit) of a program's part of a group, be it a chunk or a tile to apply.

    The part begins in `channel`, counted in its group. `base` is the offset of that channel in x, `start` that of the
    part from there, `limit` the number of its elements. Counting from the channel keeps the offsets of elements in 32
    bits however large the group is. WIDE is for channels that are too long even for that.
    """
    group = program // parts
    spatial = number(channel_segments, tl.int64) * WIDTH
    position = (program % parts).to(tl.int64) * PART
    channel = position // spatial
    start = position - channel * spatial
    if not WIDE:
        start = start.to(tl.int32)
    base = (group.to(tl.int64) * group_channels + channel) * channel_segments * WIDTH
    limit = tl.minimum(spatial * group_channels - position, PART).to(tl.int32)
    return group, base, channel, tl.zeros([1, 1], tl.int32) + start, limit


@triton.jit
def split_statistics(
    x, partials, pre_bias, pre_bias_stride, num_groups, group_channels, channel_segments, chunks, TILES: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr,
    PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write (mean, M2) of each chunk of TILES * TILE elements to `partials` (N*G, chunks, 2); one program a chunk."""
    compute: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0)
    group, base, channel, start, limit = locate_part(
        program, chunks, group_channels, channel_segments, TILES * TILE, WIDTH, WIDE
    )
    sample = (group // num_groups).to(tl.int64)
    pre_bias = advance(pre_bias, sample * pre_bias_stride + (group % num_groups) * group_channels + channel)
    tiles = read_tiles(x + base, start, limit, TILES, TILE, VECTOR, MASKED)
    tiles, mean, m2 = centred_moments(
        tiles, pre_bias, start, limit, channel_segments, 1, TILES, TILE, VECTOR, WIDTH, MASKED, HOLD, PTX, compute
    )
    slot = partials + program.to(tl.int64) * 2 + tl.arange(0, 1)
    tl.store(slot, mean)
    tl.store(slot + 1, m2)


@triton.jit
def merge_chunks(
    partials, group, chunks, length, CHUNK: tl.constexpr, SLOTS: tl.constexpr, TURNS: tl.constexpr,
    compute: tl.constexpr,
):  # fmt: skip
    """Merge (mean, M2) of the chunks of a group in a fixed order, SLOTS at a time, in TURNS turns.

    The number of turns is a constant, mostly 1: the compiler would unroll a loop of unknown length.
    Chan, Golub & LeVeque 1983: M2 is the sum over chunks of M2_k + n_k * (mean_k - mean)^2.
    """
    slots = partials + group.to(tl.int64) * chunks * 2
    pivot = tl.load(slots)
    mean = pivot
    for turn in range(TURNS):
        k = turn * SLOTS + tl.arange(0, SLOTS)
        count = tl.minimum(length - k.to(tl.int64) * CHUNK, CHUNK).to(compute)
        d = tl.load(slots + k * 2, mask=k < chunks, other=0.0) - pivot
        mean += tl.sum(tl.where(k < chunks, d * count, 0.0), 0) / length
    m2 = tl.zeros([], compute)
    for turn in range(TURNS):
        k = turn * SLOTS + tl.arange(0, SLOTS)
        count = tl.minimum(length - k.to(tl.int64) * CHUNK, CHUNK).to(compute)
        d = tl.load(slots + k * 2, mask=k < chunks, other=0.0) - mean
        chunk_m2 = tl.load(slots + k * 2 + 1, mask=k < chunks, other=0.0)
        m2 += tl.sum(tl.where(k < chunks, chunk_m2 + d * d * count, 0.0), 0)
    return mean, m2


@triton.jit
def merge_statistics(
    partials, mean_of_group, rstd_of_group, chunks, length, eps: tl.constexpr, CHUNK: tl.constexpr,
    SLOTS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Write mean and rstd of groups with too many chunks for each program of `split_apply` to merge them itself."""
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    group = tl.program_id(0)
    mean, m2 = merge_chunks(partials, group, chunks, length, CHUNK, SLOTS, TURNS, compute)
    tl.store(mean_of_group + group, mean)
    tl.store(rstd_of_group + group, reciprocal_deviation(divide(m2, number(length, compute)), eps))


@triton.jit
def split_apply(
    x, y, mean_of_group, rstd_of_group, partials, weight, bias, pre_bias, scale, shift, scale_map, shift_map,
    pre_bias_stride, scale_stride, shift_stride, num_groups, group_channels, channel_segments, length, chunks,
    group_tiles, eps: tl.constexpr, SILU: tl.constexpr, PTX: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, TURNS: tl.constexpr,
    MERGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write y of one tile of a group of `group_tiles` tiles, whose statistics are of `chunks` chunks of CHUNK elements.

    MERGE: every program merges the partial statistics itself, which saves a launch, and one of a group writes mean and
    rstd; else it reads those. Programs walk backwards: what the statistics read last is still in the L2 cache.
    """
    compute: tl.constexpr = mean_of_group.dtype.element_ty
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    group, base, channel, start, limit = locate_part(
        program, group_tiles, group_channels, channel_segments, TILE, WIDTH, WIDE
    )
    tiles = read_tiles(x + base, start, limit, 1, TILE, VECTOR, MASKED)
    if MERGE:
        mean, m2 = merge_chunks(partials, group, chunks, length, CHUNK, SLOTS, TURNS, compute)
        rstd = reciprocal_deviation(divide(m2, number(length, compute)), eps)
        if program % group_tiles == 0:
            tl.store(mean_of_group + group, mean)
            tl.store(rstd_of_group + group, rstd)
    else:
        mean = tl.load(mean_of_group + group)
        rstd = tl.load(rstd_of_group + group)
    sample = (group // num_groups).to(tl.int64)
    first_channel = (group % num_groups) * group_channels + channel
    write_normalized(
        y + base, tiles, mean, rstd, advance(weight, first_channel), advance(bias, first_channel),
        advance(pre_bias, sample * pre_bias_stride + first_channel),
        advance(scale, sample * scale_stride + first_channel), advance(shift, sample * shift_stride + first_channel),
        advance(scale_map, base), advance(shift_map, base), start, limit, channel_segments, 1, TILE, VECTOR, WIDTH,
        MASKED, False, PTX, SILU, compute,
    )  # fmt: skip
