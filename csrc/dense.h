// Layers whose input or output is a 1×1 map: one matrix product.
//
//     up:   x [N, C_in, 1, 1]  → y [N, C_out, k, k]:  A [N, C_in] times B [C_in, k·k·C_out]
//     down: x [N, C_in, k, k]  → y [N, C_out, 1, 1]:  A [N, k·k·C_in] times B [k·k·C_in, C_out]
//
// The columns of `up` are [ky][kx][C_out]; the channels of each pixel are padded to whole panels.
#pragma once

#include "epilogue.h"
#include "units.h"

namespace dcgan::DCGAN_ISA {

struct Dense {
    static Gemm shape(const dcgan_layer& l) {
        const long pixels = static_cast<long>(l.kernel) * l.kernel, columns = round_up(l.c_out, PANEL);
        return l.transposed ? Gemm{1, l.c_in, pixels * columns} : Gemm{pixels, l.c_in, columns};
    }

    static long packed_size(const dcgan_layer& l) { return shape(l).size(); }

    static void pack(const dcgan_layer& l, const Weights& w, float* packed, int threads) {
        const Gemm g = shape(l);
        const long per_pixel = round_up(l.c_out, PANEL) / PANEL;
        if (l.transposed && l.kernel == 4) {  // packs all 16 taps of a panel of channels at once
            parallel(per_pixel, threads, nullptr, 0, [&](long panel, Scratch) {
                float taps[4][4][PANEL];
                for (long k = 0; k < l.c_in; ++k) {
                    w.panel(k, panel * PANEL, l.c_out, taps);
                    for (long pixel = 0; pixel < 16; ++pixel)
                        std::memcpy(packed + g.offset(k, pixel * per_pixel + panel),
                                    taps[pixel / 4][pixel % 4], sizeof taps[0][0]);
                }
            });
            return;
        }
        parallel(g.panels(), threads, nullptr, 0, [&](long panel, Scratch) {
            for (long k = 0; k < g.depth(); ++k) {
                const long pixel = l.transposed ? panel / per_pixel : k / l.c_in;
                const long c_in = l.transposed ? k : k % l.c_in, c_out = panel % per_pixel * PANEL;
                float* const to = packed + g.offset(k, panel);
                for (long lane = 0; lane < PANEL; ++lane)
                    to[lane] = c_out + lane < l.c_out
                                   ? w(c_in, c_out + lane, pixel / l.kernel, pixel % l.kernel)
                                   : 0;
            }
        });
    }

    static Split plan(const Job& job, int threads) {
        return split(job.images, 96, shape(*job.layer).panels(), 1, threads, true);
    }

    // Panels per GEMM call: the sums of a wide `up` layer stay in L1.
    static constexpr long PANEL_GROUP = 4;

    static long scratch_size(const Job& job, int threads) {
        const Split s = plan(job, threads);
        return round_up(2 * s.max_rows * shape(*job.layer).taps, 16) +
               s.max_rows * odd_lines(PANEL_GROUP * PANEL);
    }

    static void run(const Job& job, int threads, float* scratch, long scratch_stride) {
        const dcgan_layer& l = *job.layer;
        const Gemm g = shape(l);
        const Split s = plan(job, threads);
        const long per_pixel = round_up(l.c_out, PANEL) / PANEL, c_stride = odd_lines(PANEL_GROUP * PANEL);
        with_epilogue(job, [&](const auto& epilogue) {
            parallel(s.units(), threads, scratch, scratch_stride, [&](long index, Scratch local) {
                const Unit u = unit(s, index);
                const auto& sink = epilogue.unit(index);
                const long m = u.rows.size();
                const float** const rows = local.pointers(m * g.taps);
                float* const sums = local.floats(m * c_stride);
                for (long tap = 0; tap < g.taps; ++tap)
                    for (long i = 0; i < m; ++i)
                        rows[tap * m + i] = job.x.data + (u.rows.begin + i) * job.x.n +
                                            tap / l.width * job.x.h + tap % l.width * job.x.w;
                for (long first = u.panels.begin; first < u.panels.end; first += PANEL_GROUP) {
                    const long last = min(first + PANEL_GROUP, u.panels.end);
                    gemm(g, rows, m, l.weights, first, last, sums, c_stride);
                    for (long panel = first; panel < last; ++panel) {
                        const long pixel = panel / per_pixel, c = panel % per_pixel * PANEL;
                        store_pixels(sink, sums + (panel - first) * PANEL, c_stride, m, c,
                                     min(c + PANEL, l.c_out), [&](long i) {
                                         return job.y.data + (u.rows.begin + i) * job.y.n +
                                                pixel / l.kernel * job.y.h + pixel % l.kernel * job.y.w;
                                     });
                    }
                }
            });
        });
    }
};

}  // namespace dcgan::DCGAN_ISA
