"""Computes, for both layouts, m1 and m2 of each group and every gradient but dx from sums of slots.

`sums` is (2 or 3, N, slots, C): S0 = sum dz, S1 = sum dz * xhat and, for pre_bias, S2 = sum xhat; a plane has
N * slots * C elements. Additions run in a fixed order; each result has one writer.
"""

import triton
import triton.language as tl

from unetgn.ops.triton.kernels.elements import advance, channel_affine, load_or, number, pair_of, plane_of


@triton.jit
def fold_slots(
    sums, folded, m1_m2, weight, bias, scale, shift, scale_stride, shift_stride, plane_size, folded_plane_size,
    num_groups, group_channels, spatial, slots, WITH_XHAT: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """Fold the slots of a group's channels into `folded` (2 or 3, N, C), and write (m1, m2); one program a group."""
    compute: tl.constexpr = sums.dtype.element_ty
    group = tl.program_id(0)
    sample = (group // num_groups).to(tl.int64)
    scale = advance(scale, sample * scale_stride)
    shift = advance(shift, sample * shift_stride)
    channels = num_groups * group_channels
    sums += sample * slots * channels
    m1 = tl.zeros([COLUMNS], compute)
    m2 = tl.zeros([COLUMNS], compute)
    for column_tile in range(COLUMN_TILES):
        local = column_tile * COLUMNS + tl.arange(0, COLUMNS)
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
            s1 += tl.load(plane_of(at, 1, plane_size) + index, mask=inside, other=0.0)
            if WITH_XHAT:
                s2 += tl.load(plane_of(at, 2, plane_size) + index, mask=inside, other=0.0)
            at += SLOTS * channels
        s0_channel = tl.sum(s0, 0)
        s1_channel = tl.sum(s1, 0)
        index = sample * channels + channel
        tl.store(folded + index, s0_channel, mask=own)
        tl.store(plane_of(folded, 1, folded_plane_size) + index, s1_channel, mask=own)
        if WITH_XHAT:
            tl.store(plane_of(folded, 2, folded_plane_size) + index, tl.sum(s2, 0), mask=own)
        gamma, _beta = channel_affine(weight, bias, scale, shift, channel, own, compute)
        m1 += tl.where(own, s0_channel * gamma, 0.0)
        m2 += tl.where(own, s1_channel * gamma, 0.0)
    length = number(number(spatial, tl.int64) * group_channels, compute)
    pair = pair_of(m1_m2, group)
    tl.store(pair, tl.sum(m1, 0) / length)
    tl.store(pair + 1, tl.sum(m2, 0) / length)


@triton.jit
def parameter_gradients(
    folded, rstd_of_group, m1_m2, weight, bias, scale, dweight, dbias, dpre_bias, dscale, dshift, scale_stride,
    folded_plane_size, samples, num_groups, group_channels, spatial, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of COLUMNS channels from folded sums, SAMPLES samples at a time; None ones are left out.

    dweight = sum_n (1 + scale) S1,  dbias = sum_n (1 + scale) S0,  dscale = weight S1 + bias S0,  dshift = S0,
    dpre_bias = rstd * (gamma' S0 - HW m1 - m2 S2).
    """
    compute: tl.constexpr = folded.dtype.element_ty
    channels = num_groups * group_channels
    channel = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    w = load_or(weight, channel, channel < channels, 1.0, compute)
    b = load_or(bias, channel, channel < channels, 0.0, compute)
    dweight_samples = tl.zeros([SAMPLES, COLUMNS], compute)
    dbias_samples = tl.zeros([SAMPLES, COLUMNS], compute)
    first = 0
    while first < samples:
        sample = (first + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
        inside = (sample < samples) & (channel < channels)
        index = sample * channels + channel
        s0 = tl.load(folded + index, mask=inside, other=0.0)
        s1 = tl.load(plane_of(folded, 1, folded_plane_size) + index, mask=inside, other=0.0)
        factor = 1.0 + load_or(scale, sample * scale_stride + channel, inside, 0.0, compute)
        dweight_samples += s1 * factor
        dbias_samples += s0 * factor
        if dscale is not None:
            tl.store(dscale + index, (s1 * w + s0 * b).to(dscale.dtype.element_ty), mask=inside)
        if dshift is not None:
            tl.store(dshift + index, s0.to(dshift.dtype.element_ty), mask=inside)
        if dpre_bias is not None:
            group = sample * num_groups + channel // group_channels
            rstd = tl.load(rstd_of_group + group, mask=inside, other=0.0)
            m1 = tl.load(pair_of(m1_m2, group), mask=inside, other=0.0)
            m2 = tl.load(pair_of(m1_m2, group) + 1, mask=inside, other=0.0)
            s2 = tl.load(plane_of(folded, 2, folded_plane_size) + index, mask=inside, other=0.0)
            result = rstd * (w * factor * s0 - spatial * m1 - m2 * s2)
            tl.store(dpre_bias + index, result.to(dpre_bias.dtype.element_ty), mask=inside)
        first += SAMPLES
    own = channel < channels
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(dweight_samples, 0)[None, :].to(dweight.dtype.element_ty), mask=own)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(dbias_samples, 0)[None, :].to(dbias.dtype.element_ty), mask=own)
