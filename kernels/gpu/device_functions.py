"""Device functions shared by the kernels: implicit GEMM rows, activations, prologues, epilogues.

A kernel receives each tensor of a product twice: as :class:`.launcher.Pointers` in lower case (``x``: itself,
``x.other``, ``x.center``, ``x.scale`` and ``x.shift``) and as :class:`..spec.Operand` in upper case (``X``:
its size, strides and the function fused into its loads or stores), which is a compile-time constant, so that
every branch on it is resolved by the compiler.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# --- dependent launches ------------------------------------------------------------------------------------


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Wait until the previous kernel on the stream has completed, and let the next one start its programs.

    A launch that is DEPENDENT starts while the previous kernel's last programs run: what it does before this
    call overlaps with them, and costs no time of its own. It must read and write nothing before it. As the
    previous kernel has waited too, all earlier kernels have completed. The call must be outside of
    loops: the compiler moves a pipelined loop's first loads in front of the loop.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


# --- rows --------------------------------------------------------------------------------------------------


@triton.jit
def rows(
    tile,
    M,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr = 1,
):
    """Return (inside, group, n, p, q) for the rows m = (n·H + p)·W + q of row tile ``tile``; int64 if WIDE.

    The M rows are GROUPS groups of equal size, and a tile holds rows of one group only.
    """
    if WIDE:
        tile = tl.cast(tile, tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    group = tl.constexpr(0)
    if GROUPS > 1:
        of_group = M // GROUPS
        tiles = (of_group + BLOCK_M - 1) // BLOCK_M
        group = tile // tiles
        m = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < of_group
        m = group * of_group + m
    return inside, group, m // (H * W), (m // W) % H, m % W


# --- activations -------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Compute tanh to float32 accuracy: an odd polynomial near zero, where the exponential form cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = tl.abs(x) * (1.0 + x2 * (-0.33333333 + x2 * (0.13333333 + x2 * (-0.053968254 + x2 * 0.021869488))))
    magnitude = tl.where(tl.abs(x) < 0.25, near, far)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def activate(x, slope, ACT: tl.constexpr):
    """Compute act(x) in float32; NaN propagates as in eager (a plain maximum would drop it)."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "leaky_relu":
        x = tl.where(x < 0.0, x * slope, x)
    elif ACT == "tanh":
        x = tanh(x)
    elif ACT == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activate_backward(g, y, slope, ACT: tl.constexpr):
    """Compute g·act' from the saved output y = act(x), or from x if only its sign matters; NaN as in aten."""
    if ACT == "relu":
        g = tl.where(y <= 0.0, 0.0, g)
    elif ACT == "leaky_relu":
        g = tl.where(y > 0.0, g, g * slope)
    elif ACT == "tanh":
        g = g * (1.0 - y * y)
    elif ACT == "sigmoid":
        g = g * (1.0 - y) * y
    return g


# --- prologues ---------------------------------------------------------------------------------------------


@triton.jit
def _vector(ptr, channel, group, C: tl.constexpr):
    return tl.load(ptr + group * C + channel, mask=channel < C, other=0.0)


@triton.jit
def prologue(value, other, valid, channel, group, x, slope, per_count, X: tl.constexpr):
    """Apply a prologue of :class:`..spec.Operand` to a loaded tile; rounds the result to the tile's dtype.

    ``other`` is the tile itself where the prologue reads no second tensor. ``channel`` and ``valid``
    broadcast against the tile. Both tiles are 0 where not ``valid``, and so is the result: zero padding
    applies after the prologue. ``group`` is that of all pixels in the tile.
    """
    ACT: tl.constexpr = X.act  # Triton 3.6 passes a field on as a string, not as a constant
    if X.function != "none":
        dtype = value.dtype
        value = value.to(tl.float32)
        if X.function == "act":
            value = activate(value, slope, ACT)
            if ACT == "sigmoid":
                value = tl.where(valid, value, 0.0)
        elif X.function == "affine":
            value = (value - _vector(x.center, channel, group, X.size[0])) * _vector(
                x.scale, channel, group, X.size[0]
            )
            value = activate(value + _vector(x.shift, channel, group, X.size[0]), slope, ACT)
            value = tl.where(valid, value, 0.0)
        elif X.function == "gradient":
            value = activate_backward(value, other.to(tl.float32), slope, ACT)
            if X.scaled:
                value = value * _vector(x.scale, channel, group, X.size[0])
        else:
            tl.static_assert(X.function == "statistics")
            b = _vector(x.scale, channel, group, X.size[0]) * (2.0 * per_count)
            value += (other.to(tl.float32) - _vector(x.center, channel, group, X.size[0])) * b
            value = tl.where(valid, value + _vector(x.shift, channel, group, X.size[0]) * per_count, 0.0)
        value = value.to(dtype)
    return value


@triton.jit
def row_pointers(x, n, h, w, X: tl.constexpr):
    """Return pointers to x[n, 0, h, w] and, if the prologue reads a second tensor, other[n, 0, h, w]."""
    x_rows = x.ptr + n * X.stride[0] + h * X.stride[2] + w * X.stride[3]
    other_rows = x_rows
    if X.other_stride is not None:
        other_rows = x.other + n * X.other_stride[0] + h * X.other_stride[2] + w * X.other_stride[3]
    return x_rows, other_rows


@triton.jit
def load(x_rows, other_rows, dh, dw, c, group, mask, x, slope, per_count, X: tl.constexpr):
    """Load x̂ [BLOCK_M, BLOCK_K] for channels c [BLOCK_K] of the pixels (dh, dw) away from each row's."""
    x_at = x_rows[:, None] + (dh * X.stride[2] + dw * X.stride[3] + c * X.stride[1])[None, :]
    value = tl.load(x_at, mask=mask, other=0.0)
    other = value
    if X.other_stride is not None:
        other_k = dh * X.other_stride[2] + dw * X.other_stride[3] + c * X.other_stride[1]
        other = tl.load(other_rows[:, None] + other_k[None, :], mask=mask, other=0.0)
    return prologue(value, other, mask, c[None, :], group, x, slope, per_count, X)


# --- the accumulator ---------------------------------------------------------------------------------------
#
# It is [BLOCK_M, BLOCK_N], rows × columns, or, if SPEC.swapped, [BLOCK_N, BLOCK_M]. In the layout of a matrix
# instruction's result a thread has many elements of the second axis and few of the first. Swapped, a sum over
# rows takes one addition per element; otherwise it takes seven instructions, almost half of them shuffles.


@triton.jit
def of_rows(vector, SWAPPED: tl.constexpr):
    """Expand a vector over the rows to broadcast against the accumulator."""
    return vector[None, :] if SWAPPED else vector[:, None]


@triton.jit
def of_columns(vector, SWAPPED: tl.constexpr):
    """Expand a vector over the columns to broadcast against the accumulator."""
    return vector[:, None] if SWAPPED else vector[None, :]


@triton.jit
def zeros(SPEC: tl.constexpr):
    """Return an empty accumulator."""
    FIRST: tl.constexpr = SPEC.block_n if SPEC.swapped else SPEC.block_m
    SECOND: tl.constexpr = SPEC.block_m if SPEC.swapped else SPEC.block_n
    return tl.zeros((FIRST, SECOND), dtype=tl.float32)


@triton.jit
def multiply(x_hat, w, acc, SPEC: tl.constexpr):
    """Add x̂ [BLOCK_M, BLOCK_K] · w [BLOCK_K, BLOCK_N] to the accumulator."""
    if SPEC.swapped:
        acc = tl.dot(tl.trans(w), tl.trans(x_hat), acc, input_precision=SPEC.precision)
    else:
        acc = tl.dot(x_hat, w, acc, input_precision=SPEC.precision)
    return acc


@triton.jit
def column_slices(acc, SLICES: tl.constexpr, SWAPPED: tl.constexpr):
    """Split an accumulator into SLICES tiles of adjacent columns: one or four.

    An epilogue that reads a second tensor needs several registers per element. Beside a large accumulator
    these fit only for a few columns at a time.
    """
    tl.static_assert(SLICES == 1 or SLICES == 4)
    if SLICES == 1:
        slices = (acc,)
    else:
        left, right = _halves(acc, SWAPPED)
        first, second = _halves(left, SWAPPED)
        third, fourth = _halves(right, SWAPPED)
        slices = (first, second, third, fourth)  # type: ignore[assignment]
    return slices


@triton.jit
def _halves(acc, SWAPPED: tl.constexpr):
    FIRST: tl.constexpr = acc.shape[0]
    SECOND: tl.constexpr = acc.shape[1]
    if SWAPPED:
        halves = acc.reshape(2, FIRST // 2, SECOND).permute(1, 2, 0).split()
    else:
        halves = acc.reshape(FIRST, 2, SECOND // 2).permute(0, 2, 1).split()
    return halves


# --- epilogues ---------------------------------------------------------------------------------------------


@triton.jit
def affine(acc, channel, group, y, slope, Y: tl.constexpr, SWAPPED: tl.constexpr):
    """Compute act(acc·scale[c] + shift[c]); ``channel`` gives c for each column."""
    ACT: tl.constexpr = Y.act
    if Y.scaled:
        acc = acc * of_columns(_vector(y.scale, channel, group, Y.size[0]), SWAPPED)
    if Y.shifted:
        acc = acc + of_columns(_vector(y.shift, channel, group, Y.size[0]), SWAPPED)
    return activate(acc, slope, ACT)


@triton.jit
def load_other(inside, n, h, w, channel, y, Y: tl.constexpr, SWAPPED: tl.constexpr):
    """Load the tile of the second tensor that an epilogue reads at [n, channel, h, w]; 0 if it reads none."""
    other = 0.0
    if Y.other_stride is not None:
        rows = y.other + n * Y.other_stride[0] + h * Y.other_stride[2] + w * Y.other_stride[3]
        mask = inside & of_columns(channel < Y.size[0], SWAPPED)
        other = tl.load(rows + of_columns(channel * Y.other_stride[1], SWAPPED), mask=mask, other=0.0)
    return other


@triton.jit
def epilogue(
    acc,
    other,
    inside,
    channel,
    group,
    tile,
    y,
    partial_ptr,
    TILES,
    slope,
    Y: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Return the tile to store for an accumulator that is 0 where not ``inside``; store its partial sums.

    The epilogues are those of :class:`..spec.Operand`. 'statistics' stores the mean of the rows in
    partial[0, tile], their sum of squared deviations in partial[1, tile] and their number in
    partial[2, tile]; 'adjoint' and 'gradient', which read the second tensor's tile ``other``, store Σ g and
    Σ g·(other - center[c]) in the first two. ``tile`` is the row of partial [2 or 3, TILES, C], one for all
    columns or one for each.
    """
    C: tl.constexpr = Y.size[0]
    ACT: tl.constexpr = Y.act
    ROWS: tl.constexpr = 1 if SWAPPED else 0
    if Y.function == "affine":
        acc = affine(acc, channel, group, y, slope, Y, SWAPPED)
    else:
        at = partial_ptr + tile * C + channel
        if Y.function == "statistics":
            tl.static_assert(inside.shape[1 - ROWS] == 1)  # the same rows for all columns
            count = tl.sum(inside.to(tl.float32))
            mean = tl.sum(acc, axis=ROWS) / tl.maximum(count, 1.0)
            deviation = tl.where(inside, acc - of_columns(mean, SWAPPED), 0.0)
            tl.store(at, mean, mask=channel < C)
            tl.store(at + TILES * C, tl.sum(deviation * deviation, axis=ROWS), mask=channel < C)
            tl.store(at + 2 * TILES * C, tl.zeros_like(mean) + count, mask=channel < C)
        else:
            tl.static_assert(Y.function == "adjoint" or Y.function == "gradient")
            x = other.to(tl.float32)
            if Y.scaled:
                x = x - of_columns(_vector(y.center, channel, group, C), SWAPPED)
                scale = of_columns(_vector(y.scale, channel, group, C), SWAPPED)
                shift = of_columns(_vector(y.shift, channel, group, C), SWAPPED)
                g = activate_backward(acc, activate(x * scale + shift, slope, ACT), slope, ACT)
                if Y.function == "gradient":  # sums of what is stored, so that those of du vanish
                    g = g.to(y.ptr.dtype.element_ty).to(tl.float32)
                tl.store(at, tl.sum(g, axis=ROWS), mask=channel < C)
                tl.store(at + TILES * C, tl.sum(g * x, axis=ROWS), mask=channel < C)
                acc = g if Y.function == "gradient" else g * scale
            else:
                acc = activate_backward(acc, activate(x, slope, ACT), slope, ACT)
    return acc


@triton.jit
def store(
    acc,
    other,
    inside,
    n,
    h,
    w,
    channel,
    group,
    tile,
    y,
    partial_ptr,
    TILES,
    slope,
    Y: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Apply the epilogue to an accumulator and store it at y[n, channel, h, w].

    n, h, w and ``inside`` broadcast against acc, which is 0 where not ``inside``; ``channel`` is C or more in
    columns that are not stored. ``other`` is from :func:`load_other`.
    """
    acc = epilogue(acc, other, inside, channel, group, tile, y, partial_ptr, TILES, slope, Y, SWAPPED)
    y_rows = y.ptr + n * Y.stride[0] + h * Y.stride[2] + w * Y.stride[3]
    mask = inside & of_columns(channel < Y.size[0], SWAPPED)
    y_at = y_rows + of_columns(channel * Y.stride[1], SWAPPED)
    tl.store(y_at, acc.to(y.ptr.dtype.element_ty), mask=mask)
