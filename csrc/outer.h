// The GEMM micro-kernel of the weight gradient: C[m][n] = Σ_k A[k][m]·B[k][n], a sum of outer products.
//
// Both operands have k outermost: channels are contiguous in a map, and the sum runs over its pixels. A is
// therefore read by broadcasts of contiguous elements, and B by vectors.
#pragma once

#include "micro.h"

namespace dcgan::DCGAN_ISA {

// An operand: one row per k, `step` floats apart.
struct Operand {
    const float* from;
    long step;

    DCGAN_INLINE Operand at(long k, long channel) const { return {from + k * step + channel, step}; }
};

template <long R>
DCGAN_INLINE void outer_step(vec (&acc)[R][2], const float* a, const float* b) {
    const vec left = load(b), right = load(b + LANES);
#pragma GCC unroll 12
    for (long r = 0; r < R; ++r) {
        const vec broadcast = splat(a[r]);
        acc[r][0] += broadcast * left;
        acc[r][1] += broadcast * right;
    }
}

// Multiplies R rows with one panel, and prefetches one step of `prefetch` into L2 for every two k.
template <long R>
[[gnu::noinline]] void outer(Operand a, Operand b, long count, float* c, long c_stride, bool add,
                             Operand prefetch) {
    vec acc[R][2] = {};
    long k = 0;
    for (; k + 2 <= count; k += 2) {  // unrolling by four is slower: GCC runs out of registers
        __builtin_prefetch(prefetch.from, 0, 2);
        prefetch.from += prefetch.step;
        outer_step<R>(acc, a.from, b.from);
        outer_step<R>(acc, a.from + a.step, b.from + b.step);
        a.from += 2 * a.step;
        b.from += 2 * b.step;
    }
    if (k < count) outer_step<R>(acc, a.from, b.from);
#pragma GCC unroll 12
    for (long r = 0; r < R; ++r) {
        float* to = c + r * c_stride;
        if (add) {
            acc[r][0] += load(to);
            acc[r][1] += load(to + LANES);
        }
        store(to, acc[r][0]);
        store(to + LANES, acc[r][1]);
    }
}

DCGAN_INLINE void outer(long rows, Operand a, Operand b, long count, float* c, long c_stride, bool add,
                        Operand prefetch) {
    switch (rows) {
#define DCGAN_OUTER(R) \
    case R:            \
        return outer<R>(a, b, count, c, c_stride, add, prefetch);
        DCGAN_OUTER(1)
        DCGAN_OUTER(2)
        DCGAN_OUTER(3)
        DCGAN_OUTER(4)
        DCGAN_OUTER(5)
        DCGAN_OUTER(6)
#if DCGAN_LANES == 16
        DCGAN_OUTER(7)
        DCGAN_OUTER(8)
        DCGAN_OUTER(9)
        DCGAN_OUTER(10)
        DCGAN_OUTER(11)
        DCGAN_OUTER(12)
#endif
#undef DCGAN_OUTER
    }
}

// Multiplies `rows` rows, in tiles of nearly equal height, with one panel.
DCGAN_INLINE void outer_panel(long rows, Operand a, Operand b, long count, float* c, long c_stride, bool add,
                              Operand prefetch) {
    const long tiles = (rows + ROWS - 1) / ROWS, height = rows / tiles, taller = rows % tiles;
    for (long t = 0, m = 0; t < tiles; ++t) {
        const long here = height + (t < taller);
        outer(here, a.at(0, m), b, count, c + m * c_stride, c_stride, add, prefetch);
        prefetch.from += count / 2 * prefetch.step;
        m += here;
    }
}

}  // namespace dcgan::DCGAN_ISA
