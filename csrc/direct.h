// Polyphase implicit GEMM for k4 s2 p1: a row of A is an output pixel's window, read in place by pointers.
//
//     up:   four products, one for each output parity, of 2×2 taps      M = N·H·W,     K = 4·C_in
//     down: one product of 4×4 taps                                     M = N·H·W / 4, K = 16·C_in
//
// A tap outside the map points to zeros.
#pragma once

#include "epilogue.h"
#include "units.h"

namespace dcgan::DCGAN_ISA {

struct Direct {
    static long groups(const dcgan_layer& l) { return l.transposed ? 4 : 1; }

    static Gemm shape(const dcgan_layer& l) {
        return {l.transposed ? 4 : 16, l.c_in, round_up(l.c_out, PANEL)};
    }

    static long packed_size(const dcgan_layer& l) { return groups(l) * shape(l).size(); }

    // The kernel row of tap row i in parity a, and the input row that it reads for output row p.
    static long kernel_row(const dcgan_layer& l, long a, long i) {
        return l.transposed ? tap_row(true, a, i) : i;
    }
    static long input_row(const dcgan_layer& l, long p, long a, long i) {
        return l.transposed ? p - 1 + a + i : 2 * p - 1 + i;
    }

    static void pack(const dcgan_layer& l, const Weights& w, float* packed, int threads) {
        const Gemm g = shape(l);
        const long side = l.transposed ? 2 : 4;
        parallel(g.panels(), threads, nullptr, 0, [&](long panel, Scratch) {
            float taps[4][4][PANEL];
            for (long c_in = 0; c_in < l.c_in; ++c_in) {
                w.panel(c_in, panel * PANEL, l.c_out, taps);
                for (long group = 0; group < groups(l); ++group)
                    for (long tap = 0; tap < g.taps; ++tap) {
                        const long ky = kernel_row(l, group / 2, tap / side);
                        const long kx = kernel_row(l, group % 2, tap % side);
                        std::memcpy(packed + group * g.size() + g.offset(tap * l.c_in + c_in, panel),
                                    taps[ky][kx], sizeof taps[ky][kx]);
                    }
            }
        });
    }

    static Split plan(const Job& job, int threads) {
        return split(job.images * parity_map(job).pixels(), 96, shape(*job.layer).panels(),
                     groups(*job.layer), threads, true);
    }

    static long scratch_size(const Job& job, int threads) {
        const Split s = plan(job, threads);
        return round_up(job.layer->c_in, 16) + round_up(2 * s.max_rows * shape(*job.layer).taps, 16) +
               s.max_rows * odd_lines(s.panels * PANEL);
    }

    static void run(const Job& job, int threads, float* scratch, long scratch_stride) {
        const dcgan_layer& l = *job.layer;
        const Gemm g = shape(l);
        const Split s = plan(job, threads);
        const Size size = parity_map(job);
        const long side = l.transposed ? 2 : 4, step = l.transposed ? 2 : 1;
        const long c_stride = odd_lines(s.part_panels() * PANEL);
        with_epilogue(job, [&](const auto& epilogue) {
            parallel(s.units(), threads, scratch, scratch_stride, [&](long index, Scratch local) {
                const Unit u = unit(s, index);
                const auto& sink = epilogue.unit(index);
                const long m = u.rows.size(), a = u.group / 2, b = u.group % 2;
                float* const zeros = local.floats(l.c_in);
                const float** const rows = local.pointers(m * g.taps);
                float* const sums = local.floats(m * c_stride);
                for (long c = 0; c < l.c_in; ++c) zeros[c] = 0;
                for (long i = 0; i < m; ++i) {
                    const long pixel = u.rows.begin + i, q = pixel % size.width,
                               p = pixel / size.width % size.height;
                    const float* const image = job.x.data + pixel / size.pixels() * job.x.n;
                    for (long tap = 0; tap < g.taps; ++tap) {
                        const long r = input_row(l, p, a, tap / side), c = input_row(l, q, b, tap % side);
                        const bool inside = r >= 0 && r < l.height && c >= 0 && c < l.width;
                        rows[tap * m + i] = inside ? image + r * job.x.h + c * job.x.w : zeros;
                    }
                }
                gemm(g, rows, m, l.weights + u.group * g.size(), u.panels.begin, u.panels.end, sums,
                     c_stride);
                const Size present = parity_rows(job, u.group);
                const long begin = u.panels.begin * PANEL, end = min(u.panels.end * PANEL, l.c_out);
                store_pixels(sink, sums, c_stride, m, begin, end, [&](long i) -> float* {
                    const long pixel = u.rows.begin + i, q = pixel % size.width,
                               p = pixel / size.width % size.height;
                    if (p >= present.height || q >= present.width) return nullptr;
                    return job.y.data + pixel / size.pixels() * job.y.n + (p * step + a) * job.y.h +
                           (q * step + b) * job.y.w;
                });
            });
        });
    }
};

}  // namespace dcgan::DCGAN_ISA
