// The GEMM micro-kernel that all algorithms share: C[m][n] = Σ_k A[m][k]·B[k][n].
//
// A is given by pointers to segments of its rows ("taps"): tap t of row m is `length` contiguous floats at
// rows[t·m_count + m]. An implicit GEMM thus reads its input in place, without im2col; Winograd products have
// one tap (or one per parity).
//
// B is packed: K is split into blocks of at most K_BLOCK, each block into panels of PANEL columns, each panel
// stored as [k][PANEL]. A panel (K_BLOCK·PANEL floats: half of a 32 KB L1) stays in L1 while all rows of A
// are multiplied with it. The sums of the K blocks are accumulated in C, which also keeps the rounding error
// of a long K near that of K_BLOCK.
#pragma once

#include "vec.h"

namespace dcgan::DCGAN_ISA {

constexpr long PANEL = 2 * LANES;
// 128 and 192 are no faster; with a non-temporal prefetch of B they are half as fast.
constexpr long K_BLOCK = 256;
// Rows of the register tile: 2·ROWS accumulators, two vectors of B and a broadcast of A fill the registers.
constexpr long ROWS = LANES == 16 ? 12 : 6;

struct Gemm {
    long taps, length;  // K = taps·length
    long columns;       // N, a multiple of PANEL: the caller pads

    DCGAN_INLINE long depth() const { return taps * length; }
    DCGAN_INLINE long panels() const { return columns / PANEL; }
    DCGAN_INLINE long size() const { return depth() * columns; }
    // The offset of B[k][panel·PANEL] in the packed weights.
    DCGAN_INLINE long offset(long k, long panel) const {
        const long begin = k / K_BLOCK * K_BLOCK;
        const long count = depth() - begin < K_BLOCK ? depth() - begin : K_BLOCK;
        return begin * columns + panel * count * PANEL + (k - begin) * PANEL;
    }
};

template <long R>
DCGAN_INLINE void multiply(vec (&acc)[R][2], const float* const (&a)[R], long count, const float*& b,
                           const float*& prefetch) {
    const auto step = [&](long k) {
        const vec left = load(b), right = load(b + LANES);
        b += PANEL;
#pragma GCC unroll 12
        for (long r = 0; r < R; ++r) {
            const vec broadcast = splat(a[r][k]);
            acc[r][0] += broadcast * left;
            acc[r][1] += broadcast * right;
        }
    };
    long k = 0;
    for (; k + 4 <= count; k += 4) {
        __builtin_prefetch(prefetch);
        prefetch += 16;
        step(k);
        step(k + 1);
        step(k + 2);
        step(k + 3);
    }
    for (; k < count; ++k) step(k);
}

// A K block: the tap of A in which it begins, the offset within that tap, and the number of k.
struct KBlock {
    long tap, first, count;
    bool accumulate;  // add to C instead of overwriting it
};

// Multiplies R rows with one panel over one K block.
template <long R>
[[gnu::noinline]] void tile(const Gemm& g, const float* const* rows, long m_count, const KBlock& block,
                            const float* b, float* c, long c_stride, const float* prefetch) {
    vec acc[R][2] = {};
    const float* const* tap = rows + block.tap * m_count;
    for (long left = block.count, first = block.first; left > 0; tap += m_count, first = 0) {
        const long count = g.length - first < left ? g.length - first : left;
        const float* a[R];
#pragma GCC unroll 12
        for (long r = 0; r < R; ++r) a[r] = tap[r] + first;
        multiply<R>(acc, a, count, b, prefetch);
        left -= count;
    }
#pragma GCC unroll 12
    for (long r = 0; r < R; ++r) {
        float* to = c + r * c_stride;
        if (block.accumulate) {
            acc[r][0] += load(to);
            acc[r][1] += load(to + LANES);
        }
        store(to, acc[r][0]);
        store(to + LANES, acc[r][1]);
    }
}

DCGAN_INLINE void tile(long count, const Gemm& g, const float* const* rows, long m_count, const KBlock& block,
                       const float* b, float* c, long c_stride, const float* prefetch) {
    switch (count) {
#define DCGAN_TILE(R) \
    case R:           \
        return tile<R>(g, rows, m_count, block, b, c, c_stride, prefetch);
        DCGAN_TILE(1)
        DCGAN_TILE(2)
        DCGAN_TILE(3)
        DCGAN_TILE(4)
        DCGAN_TILE(5)
        DCGAN_TILE(6)
#if DCGAN_LANES == 16
        DCGAN_TILE(7)
        DCGAN_TILE(8)
        DCGAN_TILE(9)
        DCGAN_TILE(10)
        DCGAN_TILE(11)
        DCGAN_TILE(12)
#endif
#undef DCGAN_TILE
    }
}

// Computes C[m_count][(panel_end - panel_begin)·PANEL] with row stride c_stride, from all of packed B.
inline void gemm(const Gemm& g, const float* const* rows, long m_count, const float* b, long panel_begin,
                 long panel_end, float* c, long c_stride) {
    // Tiles have nearly equal heights: 8 rows are split 4 + 4, since with 6 + 2 the last tile would have too
    // few independent accumulators to hide the latency of an FMA.
    const long tiles = (m_count + ROWS - 1) / ROWS, height = m_count / tiles, taller = m_count % tiles;
    for (long begin = 0; begin < g.depth(); begin += K_BLOCK) {
        const long count = begin + K_BLOCK < g.depth() ? K_BLOCK : g.depth() - begin;
        const KBlock block{begin / g.length, begin % g.length, count, begin > 0};
        for (long panel = panel_begin; panel < panel_end; ++panel) {
            const float* const from = b + g.offset(begin, panel);
            const float* prefetch = from + count * PANEL;  // the next panel
            float* to = c + (panel - panel_begin) * PANEL;
            for (long t = 0, m = 0; t < tiles; ++t) {
                const long rows_here = height + (t < taller);
                tile(rows_here, g, rows + m, m_count, block, from, to, c_stride, prefetch);
                prefetch += count * PANEL / tiles;
                to += rows_here * c_stride;
                m += rows_here;
            }
        }
    }
}

}  // namespace dcgan::DCGAN_ISA
