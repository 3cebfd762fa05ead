"""The small backward kernels, for both layouts: from sums of slots to group means and to every gradient but dx.

`sums` is (2 or 3, N, slots, C): S0 = sum dz, S1 = sum dz * xhat and, for pre_bias, S2 = sum xhat; a plane has
N * slots * C elements. Additions run in a fixed order; each result has one writer.
"""

import triton
import triton.language as tl

from unetgn.ops.triton.kernels.elements import advance, channel_affine, load_or, number, pair_of, plane_of


@triton.jit
def fold_slots(
    sums, folded, group_means, weight, bias, scale, shift, scale_stride, shift_stride, plane, folded_plane, num_groups,
    group_channels, spatial, slots, WITH_XHAT: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program a group: folds the slots of its channels into `folded` (2 or 3, N, C), and writes (m1, m2)."""
    compute: tl.constexpr = sums.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    channels = num_groups * group_channels
    sums += sample * slots * channels
    m1 = tl.zeros([COLUMNS], compute)
    m2 = tl.zeros([COLUMNS], compute)
    for block in range(COLUMN_BLOCKS):
        local = block * COLUMNS + tl.arange(0, COLUMNS)
        own = local < group_channels
        channel = (group % num_groups) * group_channels + local
        s0 = tl.zeros([SLOTS, COLUMNS], compute)
        s1 = tl.zeros([SLOTS, COLUMNS], compute)
        s2 = tl.zeros([SLOTS, COLUMNS], compute)
        index = tl.arange(0, SLOTS)[:, None] * channels + channel[None, :]
        at = sums
        for first in range(0, slots, SLOTS):
            inside = (first + tl.arange(0, SLOTS) < slots)[:, None] & own[None, :]
            s0 += tl.load(at + index, mask=inside, other=0.0)
            s1 += tl.load(plane_of(at, 1, plane) + index, mask=inside, other=0.0)
            if WITH_XHAT:
                s2 += tl.load(plane_of(at, 2, plane) + index, mask=inside, other=0.0)
            at += SLOTS * channels
        s0_channel = tl.sum(s0, 0)
        s1_channel = tl.sum(s1, 0)
        index = sample * channels + channel
        tl.store(folded + index, s0_channel, mask=own)
        tl.store(plane_of(folded, 1, folded_plane) + index, s1_channel, mask=own)
        if WITH_XHAT:
            tl.store(plane_of(folded, 2, folded_plane) + index, tl.sum(s2, 0), mask=own)
        gamma, _beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
        m1 += tl.where(own, s0_channel * gamma, 0.0)
        m2 += tl.where(own, s1_channel * gamma, 0.0)
    length = number(number(spatial, tl.int64) * group_channels, compute)
    pair = pair_of(group_means, group)
    tl.store(pair, tl.sum(m1, 0) / length)
    tl.store(pair + 1, tl.sum(m2, 0) / length)


@triton.jit
def parameter_gradients(
    folded, rstd_in, group_means, weight, bias, scale, dweight, dbias, dpre_bias, dscale, dshift, scale_stride, plane,
    samples, num_groups, group_channels, spatial, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of COLUMNS channels from folded sums, ROWS samples at a time; those that are None are left out.

    dweight = sum_n (1 + scale) S1,  dbias = sum_n (1 + scale) S0,  dscale = weight S1 + bias S0,  dshift = S0,
    dpre_bias = rstd * (gamma' S0 - HW m1 - m2 S2).
    """
    compute: tl.constexpr = folded.dtype.element_ty
    channels = num_groups * group_channels
    channel = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    w = load_or(weight, channel, channel < channels, 1.0, compute)
    b = load_or(bias, channel, channel < channels, 0.0, compute)
    dweight_rows = tl.zeros([ROWS, COLUMNS], compute)
    dbias_rows = tl.zeros([ROWS, COLUMNS], compute)
    first = 0
    while first < samples:
        sample = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (sample < samples) & (channel < channels)
        index = sample * channels + channel
        s0 = tl.load(folded + index, mask=inside, other=0.0)
        s1 = tl.load(plane_of(folded, 1, plane) + index, mask=inside, other=0.0)
        factor = 1.0 + load_or(scale, sample * scale_stride + channel, inside, 0.0, compute)
        dweight_rows += s1 * factor
        dbias_rows += s0 * factor
        if dscale is not None:
            tl.store(dscale + index, (s1 * w + s0 * b).to(dscale.dtype.element_ty), mask=inside)
        if dshift is not None:
            tl.store(dshift + index, s0.to(dshift.dtype.element_ty), mask=inside)
        if dpre_bias is not None:
            group = sample * num_groups + channel // group_channels
            rstd = tl.load(rstd_in + group, mask=inside, other=0.0)
            m1 = tl.load(pair_of(group_means, group), mask=inside, other=0.0)
            m2 = tl.load(pair_of(group_means, group) + 1, mask=inside, other=0.0)
            s2 = tl.load(plane_of(folded, 2, plane) + index, mask=inside, other=0.0)
            result = rstd * (w * factor * s0 - spatial * m1 - m2 * s2)
            tl.store(dpre_bias + index, result.to(dpre_bias.dtype.element_ty), mask=inside)
        first += ROWS
    own = channel < channels
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(dweight_rows, 0)[None, :].to(dweight.dtype.element_ty), mask=own)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(dbias_rows, 0)[None, :].to(dbias.dtype.element_ty), mask=own)
