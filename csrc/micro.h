// The matrix product that every algorithm ends in: C[m][n] = Σ_k A[m][k]·B[k][n].
//
// A is given by pointers to its rows, in segments ("taps"): row m, tap t is `length` contiguous floats at
// rows[t·m_count + m]. So an implicit GEMM gathers its input through pointers and copies nothing, and
// Winograd's products have one tap (or one for each parity).
//
// B is packed: K in chunks of at most CHUNK, each chunk in panels of PANEL columns, each panel [k][PANEL]. A
// panel (CHUNK·PANEL floats: half of a 32 KB L1) stays in L1 while all rows of A pass by; sums of a chunk are
// added up in C, which also keeps the rounding error of a long K near that of CHUNK.
#pragma once

#include "vec.h"

namespace dcgan::DCGAN_ISA {

constexpr long PANEL = 2 * LANES;
constexpr long CHUNK =
    256;  // 128 and 192 are no faster; a non-temporal prefetch of B with them is half as fast
// Rows of the micro-kernel's tile: 2·ROWS accumulators, two columns of B and a broadcast fill the registers.
constexpr long ROWS = LANES == 16 ? 12 : 6;

struct Gemm {
    long taps, length;  // K = taps·length
    long columns;       // N, a multiple of PANEL: the caller pads

    DCGAN_INLINE long depth() const { return taps * length; }
    DCGAN_INLINE long panels() const { return columns / PANEL; }
    DCGAN_INLINE long size() const { return depth() * columns; }
    // Where B[k][panel·PANEL] lies in the packed weights.
    DCGAN_INLINE long offset(long k, long panel) const {
        const long chunk = k / CHUNK * CHUNK;
        const long deep = depth() - chunk < CHUNK ? depth() - chunk : CHUNK;
        return chunk * columns + panel * deep * PANEL + (k - chunk) * PANEL;
    }
};

template <long R>
DCGAN_INLINE void multiply(vec (&acc)[R][2], const float* const (&a)[R], long count, const float*& b,
                           const float*& ahead) {
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
        __builtin_prefetch(ahead);
        ahead += 16;
        step(k);
        step(k + 1);
        step(k + 2);
        step(k + 3);
    }
    for (; k < count; ++k) step(k);
}

// Where a chunk of k begins in A: in which tap, how far in, and how many k it has. `add`: to what C holds.
struct Slice {
    long tap, first, count;
    bool add;
};

// R rows by one panel over the k of one chunk.
template <long R>
[[gnu::noinline]] void tile(const Gemm& g, const float* const* rows, long m_count, const Slice& slice,
                            const float* b, float* c, long c_stride, const float* ahead) {
    vec acc[R][2] = {};
    const float* const* tap = rows + slice.tap * m_count;
    for (long left = slice.count, first = slice.first; left > 0; tap += m_count, first = 0) {
        const long count = g.length - first < left ? g.length - first : left;
        const float* a[R];
#pragma GCC unroll 12
        for (long r = 0; r < R; ++r) a[r] = tap[r] + first;
        multiply<R>(acc, a, count, b, ahead);
        left -= count;
    }
#pragma GCC unroll 12
    for (long r = 0; r < R; ++r) {
        float* to = c + r * c_stride;
        if (slice.add) {
            acc[r][0] += load(to);
            acc[r][1] += load(to + LANES);
        }
        store(to, acc[r][0]);
        store(to + LANES, acc[r][1]);
    }
}

DCGAN_INLINE void tile(long count, const Gemm& g, const float* const* rows, long m_count, const Slice& slice,
                       const float* b, float* c, long c_stride, const float* ahead) {
    switch (count) {
#define DCGAN_TILE(R) \
    case R:           \
        return tile<R>(g, rows, m_count, slice, b, c, c_stride, ahead);
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

// C[m_count][(panel_end - panel_begin)·PANEL] of row stride c_stride. `b` is the whole packed matrix.
inline void gemm(const Gemm& g, const float* const* rows, long m_count, const float* b, long panel_begin,
                 long panel_end, float* c, long c_stride) {
    // Tiles of nearly equal height: 8 rows are 4 + 4, since 6 + 2 would leave the last tile short of
    // independent accumulators to hide an FMA's latency.
    const long tiles = (m_count + ROWS - 1) / ROWS, height = m_count / tiles, higher = m_count % tiles;
    for (long begin = 0; begin < g.depth(); begin += CHUNK) {
        const long count = begin + CHUNK < g.depth() ? CHUNK : g.depth() - begin;
        const Slice slice{begin / g.length, begin % g.length, count, begin > 0};
        for (long panel = panel_begin; panel < panel_end; ++panel) {
            const float* const from = b + g.offset(begin, panel);
            const float* ahead = from + count * PANEL;  // what is used next: prefetched meanwhile
            float* to = c + (panel - panel_begin) * PANEL;
            for (long t = 0, m = 0; t < tiles; ++t) {
                const long rows_here = height + (t < higher);
                tile(rows_here, g, rows + m, m_count, slice, from, to, c_stride, ahead);
                ahead += count * PANEL / tiles;
                to += rows_here * c_stride;
                m += rows_here;
            }
        }
    }
}

}  // namespace dcgan::DCGAN_ISA
