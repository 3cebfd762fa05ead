"""Computes what every kernel shares: SiLU and its derivative, the affine of a channel, optional loads, barriers."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def widen(tile, compute: tl.constexpr, PTX: tl.constexpr):
    """Return the tile in the type of the arithmetic.

    PTX: a bfloat16 is the upper half of a float32, so a shift and a mask widen two of them, one instruction each.
    """
    if PTX and tile.dtype == tl.bfloat16:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [tile], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        result = tile.to(compute)
    return result


@triton.jit
def sigmoid(z, PTX: tl.constexpr):
    """Return 1 / (1 + exp(-z)).

    PTX, for results of 16 bits: approximations within two units of a float32's last place, which end at 2**-126.
    """
    if PTX:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3f800000; rcp.approx.ftz.f32 $0, $0;", "=f,f",
            [z * -LOG2E], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        result = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
    return result


@triton.jit
def activate(z, SILU: tl.constexpr, PTX: tl.constexpr):
    """Return z * sigmoid(z) in five to ten instructions (`tl.sigmoid` takes fifteen), or z."""
    if SILU and PTX:
        result = z * sigmoid(z, PTX)
    elif SILU:
        result = z / (1.0 + tl.exp2(z * -LOG2E))
    else:
        result = z
    return result


@triton.jit
def activation_gradient(dy, z, SILU: tl.constexpr, PTX: tl.constexpr):
    """Return dz = dy * d silu(z) / dz, where silu' = s * (1 + z * (1 - s)) and s = sigmoid(z)."""
    if SILU:
        s = sigmoid(z, PTX)
        result = dy * (s * (1.0 + z * (1.0 - s)))
    else:
        result = dy
    return result


@triton.jit
def modulate(z, scale_map, shift_map, offsets, mask, compute: tl.constexpr, PTX: tl.constexpr):
    """Return z * (1 + scale) + shift by maps, which have the shape of x; z where there are none.

    `offsets` count from where the pointers have been advanced to, as those of x.
    """
    result = z
    if scale_map is not None:
        result = result * (1.0 + widen(tl.load(scale_map + offsets, mask=mask, other=0.0), compute, PTX))
    if shift_map is not None:
        result = result + widen(tl.load(shift_map + offsets, mask=mask, other=0.0), compute, PTX)
    return result


@triton.jit
def gradient_of_z(
    dy, z, scale_map, shift_map, dscale_map, dshift_map, offsets, mask, SILU: tl.constexpr, PTX: tl.constexpr,
    compute: tl.constexpr,
):  # fmt: skip
    """Return dz, of the z before the maps, and write the maps' gradients where they are asked for."""
    result = activation_gradient(dy, modulate(z, scale_map, shift_map, offsets, mask, compute, PTX), SILU, PTX)
    if dshift_map is not None:
        tl.store(dshift_map + offsets, result.to(dshift_map.dtype.element_ty), mask=mask)
    if dscale_map is not None:
        tl.store(dscale_map + offsets, (result * z).to(dscale_map.dtype.element_ty), mask=mask)
    if scale_map is not None:
        result = result * (1.0 + widen(tl.load(scale_map + offsets, mask=mask, other=0.0), compute, PTX))
    return result


@triton.jit
def within(index, limit, MASKED: tl.constexpr):
    """Return the mask index < limit.

    Where the plan knows that no index is beyond, it is a constant, which the compiler drops. A mask that has to be
    computed costs predicates and registers.
    """
    if MASKED:
        result = index < limit
    else:
        result = tl.full(index.shape, True, tl.int1)
    return result


@triton.jit
def load_or(pointer, index, mask, default: tl.constexpr, compute: tl.constexpr):
    """Load pointer[index] in the type of the arithmetic, or the default where the optional tensor is absent (None)."""
    if pointer is None:
        result = tl.full(index.shape, default, compute)
    else:
        result = tl.load(pointer + index, mask=mask, other=0.0).to(compute)
    return result


@triton.jit
def advance(pointer, offset):
    """Return pointer + offset, or None where the optional tensor is absent.

    Done once a program: the channels counted from there stay in 32 bits.
    """
    if pointer is None:
        result = None
    else:
        result = pointer + offset
    return result


@triton.jit
def channel_affine(weight, bias, scale, shift, channel, mask, compute: tl.constexpr):
    """Return (gamma', beta') with z = xhat * gamma' + beta': weight * (1 + scale) and bias * (1 + scale) + shift.

    `channel` counts from where the pointers have been advanced to: `scale` and `shift` at least to their sample's row.
    """
    gamma = load_or(weight, channel, mask, 1.0, compute)
    beta = load_or(bias, channel, mask, 0.0, compute)
    if scale is not None:
        factor = 1.0 + load_or(scale, channel, mask, 0.0, compute)
        gamma = gamma * factor
        beta = beta * factor
    if shift is not None:
        beta = beta + load_or(shift, channel, mask, 0.0, compute)
    return gamma, beta


@triton.jit
def number(value, dtype: tl.constexpr):
    """Return a scalar of that type, also from an argument that is 1, which Triton makes a constant."""
    return tl.zeros([], dtype) + value


@triton.jit
def plane_of(sums, which: tl.constexpr, plane_size):
    """Return where plane `which` of `sums` begins. Two planes may have more elements than 32 bits count."""
    return sums + number(plane_size, tl.int64) * which


@triton.jit
def pair_of(m1_m2, group):
    """Return where the pair of a group lies in `m1_m2` (N*G, 2), which may have more elements than 32 bits count."""
    return m1_m2 + group.to(tl.int64) * 2


@triton.jit
def divide(a, b):
    """Return the correctly rounded quotient, so that the mean of a constant is that constant."""
    if a.dtype == tl.float32:
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit
def reciprocal_deviation(variance, eps: tl.constexpr):
    """Return 1 / sqrt(var + eps), correctly rounded in float32, in float64 too (`tl.rsqrt` approximates)."""
    if variance.dtype == tl.float32:
        result = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    else:
        result = 1.0 / tl.sqrt(variance + eps)
    return result


@triton.jit
def hold(tile, HOLD: tl.constexpr):
    """Return the tile through an identity that the compiler cannot see through, for 16-bit tiles on NVIDIA.

    Without it the widening to float32 before a reduction and the one after it are merged, and the float32 copy is what
    stays in registers across the reduction: twice the registers.
    """
    if HOLD:
        result = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    else:
        result = tile
    return result


@triton.jit
def range_of_use(SIZE: tl.constexpr, USE: tl.constexpr):
    """Return 0 ... SIZE - 1 as a value of its own for each USE.

    The compiler makes equal ranges one value; Triton's planner of clusters gives up where what it splits over the
    blocks (loads, sums) and what it comes to last (stores) share values.
    """
    return tl.arange(USE * SIZE, USE * SIZE + SIZE) - USE * SIZE


@triton.jit
def cluster_barrier(value, CLUSTER_SYNC: tl.constexpr):
    """Return `value` (int32) once every block of the cluster has arrived and its stores are visible to the others.

    Under the interpreter all blocks of a cluster are one program, and there is nothing to wait for.
    """
    if CLUSTER_SYNC:
        result = tl.inline_asm_elementwise(
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;",
            "=r,r",
            [value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        result = value
    return result


@triton.jit
def add_pairs(s0, s1, more_s0, more_s1):
    """Return two sums, for a reduction of two tensors at once."""
    return s0 + more_s0, s1 + more_s1


@triton.jit
def merge_sums(
    partials, group, m1_blocks, m2_blocks, BLOCKS: tl.constexpr, CLUSTER_SYNC: tl.constexpr, compute: tl.constexpr
):
    """Return the sums of both [BLOCKS] over the blocks of a cluster; each adds them up in the same order."""
    slots = partials + group.to(tl.int64) * (2 * BLOCKS) + tl.arange(0, BLOCKS)
    tl.store(slots, m1_blocks)
    tl.store(slots + BLOCKS, m2_blocks)
    slots = partials + cluster_barrier(group, CLUSTER_SYNC).to(tl.int64) * (2 * BLOCKS)
    m1 = tl.zeros([], compute)
    m2 = tl.zeros([], compute)
    for k in tl.static_range(BLOCKS):
        m1 += tl.load(slots + k, volatile=True)
        m2 += tl.load(slots + BLOCKS + k, volatile=True)
    return m1, m2
