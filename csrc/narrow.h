// Layers with few channels on the image side, k4 s2 p1, which would waste most of a GEMM tile over channels.
//
//     up   (64 → 1 or 3):  one GEMM computes all taps of all output channels, P[pixel][16·C_out] =
//                          x[pixel]·w, with M = input pixels, K = C_in, N = 16·C_out; col2im then sums four
//                          entries of P per output pixel and applies the epilogue
//     down (1 or 3 → 64):  input rows are copied with padding, channels innermost, so that a row of A is four
//                          segments of 4·C_in floats: M = output pixels, K = 16·C_in, N = C_out
//
// The image may have any strides.
#pragma once

#include "epilogue.h"
#include "units.h"

namespace dcgan::DCGAN_ISA {

struct Narrow {
    static Gemm shape(const dcgan_layer& l) {
        if (l.transposed) return {1, l.c_in, round_up(16L * l.c_out, PANEL)};
        return {4, 4L * l.c_in, round_up(l.c_out, PANEL)};
    }

    static long packed_size(const dcgan_layer& l) { return shape(l).size(); }

    static void pack(const dcgan_layer& l, const Weights& w, float* packed, int threads) {
        const Gemm g = shape(l);
        parallel(g.panels(), threads, nullptr, 0, [&](long panel, Scratch) {
            for (long k = 0; k < g.depth(); ++k) {
                float* const to = packed + g.offset(k, panel);
                for (long lane = 0; lane < PANEL; ++lane) {
                    const long column = panel * PANEL + lane;
                    if (l.transposed)  // columns [c_out][ky][kx]
                        to[lane] = column < 16L * l.c_out ? w(k, column / 16, column / 4 % 4, column % 4) : 0;
                    else  // k = [ky][kx][c_in]
                        to[lane] =
                            column < l.c_out ? w(k % l.c_in, column, k / (4L * l.c_in), k / l.c_in % 4) : 0;
                }
            }
        });
    }

    // Splits the rows of `parity_map`. Each image is a separate group, since neighboring rows of an image
    // share products.
    static Split plan(const Job& job, int threads) {
        const Size size = parity_map(job);
        const long floats =
            size.width * (job.layer->transposed ? shape(*job.layer).columns : job.layer->c_out);
        const long target = min(size.height, max(4, 32768 / floats));  // 128 KB: a quarter of a common L2
        Split s{size.height, ceil_div(size.height, target), 1, 1, job.images, target};
        while (!balanced(s.units(), threads) && s.blocks < ceil_div(size.height, 4)) ++s.blocks;
        return s;
    }

    static long scratch_size(const Job& job, int threads) {
        const dcgan_layer& l = *job.layer;
        const Split s = plan(job, threads);
        const Size size = parity_map(job);
        if (l.transposed) {
            const long pixels = (s.max_rows + 2) * l.width;
            return round_up(2 * pixels, 16) + round_up(pixels * shape(l).columns, 16) +
                   round_up(2 * size.width + LANES, 16);
        }
        const long pixels = s.max_rows * size.width;
        return round_up((2 * s.max_rows + 2) * (2 * size.width + 2) * l.c_in, 16) + round_up(8 * pixels, 16) +
               pixels * odd_lines(shape(l).columns);
    }

    static void run(const Job& job, int threads, float* scratch, long scratch_stride) {
        const Split s = plan(job, threads);
        with_epilogue(job, [&](const auto& epilogue) {
            parallel(s.units(), threads, scratch, scratch_stride, [&](long index, Scratch local) {
                run_unit(job, unit(s, index), epilogue.unit(index), local);
            });
        });
    }

    template <class E>
    static void run_unit(const Job& job, const Unit& u, const E& epilogue, Scratch local) {
        if (!job.layer->transposed)
            down(job, u, epilogue, local);
        else if constexpr (!E::REDUCES)  // its vectors run along pixels, which rules out sums by channel
            up(job, u, epilogue, local);
    }

    template <class E>
    static void up(const Job& job, const Unit& u, const E& epilogue, Scratch local) {
        const dcgan_layer& l = *job.layer;
        const Gemm g = shape(l);
        const long first = max(u.rows.begin - 1, 0), last = min(u.rows.end + 1, l.height);
        const long m = (last - first) * l.width;
        const float** const rows = local.pointers(m);
        float* const products = local.floats(m * g.columns);
        const long width = 2 * l.width + job.extra_width, height = 2 * l.height + job.extra_height;
        float* const line = local.floats(width + LANES);
        const float* const x = job.x.data + u.group * job.x.n;
        for (long i = 0; i < m; ++i) rows[i] = x + (first + i / l.width) * job.x.h + i % l.width * job.x.w;
        gemm(g, rows, m, l.weights, 0, g.panels(), products, g.columns);

        for (long c = 0; c < l.c_out; ++c) {
            // All lanes are pixels of one channel, hence have one scale and shift.
            auto affine = epilogue.at(0, 0);
            affine.scale = splat(l.scale == nullptr ? 1.0f : l.scale[c]);
            affine.shift = splat(l.shift == nullptr ? 0.0f : l.shift[c]);
            for (long row = 2 * u.rows.begin; row < min(2 * u.rows.end, height); ++row) {
                const long p = row / 2, a = row % 2;
                for (long q = 0; q < width; ++q) line[q] = 0;
                for (long i = 0; i < 2; ++i) {
                    const long r = p - 1 + a + i;
                    if (r < 0 || r >= l.height) continue;
                    // Output column 2q sums input pixels q-1 and q, output column 2q+1 sums q and q+1.
                    const float* const from =
                        products + (r - first) * l.width * g.columns + c * 16 + tap_row(true, a, i) * 4;
                    const auto product = [&](long q, long kx) { return from[q * g.columns + kx]; };
                    for (long q = 0; q < l.width; ++q) {
                        const float left = q > 0 ? product(q - 1, 3) : 0.0f;
                        const float right = q + 1 < l.width ? product(q + 1, 0) : 0.0f;
                        line[2 * q] += left + product(q, 1);
                        line[2 * q + 1] += product(q, 2) + right;
                    }
                    if (width > 2L * l.width) line[width - 1] += product(l.width - 1, 3);
                }
                float* const y = job.y.data + u.group * job.y.n + c * job.y.c + row * job.y.h;
                for (long q = 0; q < width; q += LANES) {
                    const vec out = affine(load(line + q));
                    const long count = min(LANES, width - q);
                    if (job.y.w == 1)
                        store(y + q, out, count);
                    else
                        for (long lane = 0; lane < count; ++lane) y[(q + lane) * job.y.w] = out[lane];
                }
            }
        }
    }

    template <class E>
    static void down(const Job& job, const Unit& u, const E& epilogue, Scratch local) {
        const dcgan_layer& l = *job.layer;
        const Gemm g = shape(l);
        const Size size = parity_map(job);
        const long padded = (2 * size.width + 2) * l.c_in, c_stride = odd_lines(g.columns);
        const long m = u.rows.size() * size.width, top = 2 * u.rows.begin - 1, height = 2 * u.rows.size() + 2;
        float* const copy = local.floats(height * padded);
        const float** const rows = local.pointers(4 * m);
        float* const sums = local.floats(m * c_stride);
        const float* const x = job.x.data + u.group * job.x.n;
        for (long i = 0; i < height; ++i) {
            const long r = top + i;
            float* to = copy + i * padded;
            for (long column = -1; column <= 2 * size.width; ++column)
                for (long c = 0; c < l.c_in; ++c)
                    *to++ = r >= 0 && r < l.height && column >= 0 && column < l.width
                                ? x[r * job.x.h + column * job.x.w + c * job.x.c]
                                : 0.0f;
        }
        for (long ky = 0; ky < 4; ++ky)
            for (long i = 0; i < m; ++i)
                rows[ky * m + i] =
                    copy + (2 * (i / size.width) + ky) * padded + 2 * (i % size.width) * l.c_in;
        gemm(g, rows, m, l.weights, 0, g.panels(), sums, c_stride);
        store_pixels(epilogue, sums, c_stride, m, 0, l.c_out, [&](long i) {
            return job.y.data + u.group * job.y.n + (u.rows.begin + i / size.width) * job.y.h +
                   i % size.width * job.y.w;
        });
    }
};

}  // namespace dcgan::DCGAN_ISA
