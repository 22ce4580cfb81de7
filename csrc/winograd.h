// Polyphase Winograd for k4 s2 p1: each parity's 2×2 convolution by F(M×M, 2×2), which needs (M+1)² products
// instead of 4·M².
//
//     Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A          (Lavin & Gray, 2016; Toom-Cook in each dimension)
//
// A unit of work takes a block of M×M output tiles of one parity through three steps in its own scratch:
//
//     V[ξ][tile][C_in] = Bᵀ d B                     input transform, ξ one of the (M+1)² points
//     S[ξ][tile][C_out] = V[ξ]·U[ξ]                 (M+1)² matrix products
//     y = act(Aᵀ S A·scale + shift)                 output transform with the layer's epilogue
//
//     up:   four parities of the output, with K = C_in
//     down: the products sum over the parities of the input (K = 4·C_in), before a single output transform
//
// A tile's window may extend beyond the map, where it is zero. A NaN or Inf in the window may spread to the
// whole tile, and so does the rounding error of its largest pixel: next to a pixel that is 1e6 times larger,
// a small one loses most of its digits.
//
// Two variants were tried and are no faster: computing one row of points at a time, so that V stays in L2,
// and prefetching V for the next product.
#pragma once

#include "epilogue.h"
#include "units.h"

namespace dcgan::DCGAN_ISA {

// Points 0, 1, ∞.
struct F2 {
    static constexpr long OUT = 2, IN = 3;
    static constexpr float G[IN][2] = {{1, 0}, {1, 1}, {0, 1}};

    static DCGAN_INLINE void input(const vec (&d)[IN], vec (&v)[IN]) {
        v[0] = d[0] - d[1];
        v[1] = d[1];
        v[2] = d[2] - d[1];
    }
    static DCGAN_INLINE void output(const vec (&s)[IN], vec (&y)[OUT]) {
        y[0] = s[0] + s[1];
        y[1] = s[1] + s[2];
    }
};

// Points 0, -1/2, 1, -2, ∞: the set is closed under p → -1/p up to sign, which keeps the entries of the
// matrices near 1. Errors are 0.6 times those of the usual points 0, ±1, 2, ∞, for three more additions.
struct F4 {
    static constexpr long OUT = 4, IN = 5;
    static constexpr float G[IN][2] = {
        {-1, 0}, {8.0f / 9, -4.0f / 9}, {2.0f / 9, 2.0f / 9}, {-1.0f / 9, 2.0f / 9}, {0, 1}};

    static DCGAN_INLINE void input(const vec (&d)[IN], vec (&v)[IN]) {
        v[0] = (d[3] - d[0]) + 1.5f * (d[2] - d[1]);
        v[1] = (d[2] + d[3]) - 2.0f * d[1];
        v[2] = (d[1] + d[3]) + 2.5f * d[2];
        v[3] = d[3] - 0.5f * (d[1] + d[2]);
        v[4] = (d[4] - d[1]) + 1.5f * (d[3] - d[2]);
    }
    static DCGAN_INLINE void output(const vec (&s)[IN], vec (&y)[OUT]) {
        y[0] = (s[0] + s[1]) + (s[2] + s[3]);
        y[1] = (s[2] - 0.5f * s[1]) - 2.0f * s[3];
        y[2] = (s[2] + 0.25f * s[1]) + 4.0f * s[3];
        y[3] = (s[2] + s[4]) - (0.125f * s[1] + 8.0f * s[3]);
    }
};

template <class F>
struct Winograd {
    static constexpr long POINTS = F::IN * F::IN;

    static long groups(const dcgan_layer& l) { return l.transposed ? 4 : 1; }

    static Gemm shape(const dcgan_layer& l) {
        return {l.transposed ? 1 : 4, l.c_in, round_up(l.c_out, PANEL)};
    }

    // The distance between the matrices of two points: an odd number of cache lines, since packing writes to
    // all of them at the same offset.
    static long plane(const dcgan_layer& l) { return odd_lines(shape(l).size()); }

    static long packed_size(const dcgan_layer& l) { return groups(l) * POINTS * plane(l); }

    // Packs U[parity][ξ] = G g Gᵀ.
    static void pack(const dcgan_layer& l, const Weights& w, float* packed, int threads) {
        const Gemm g = shape(l);
        for (long i = 0; i < groups(l) * POINTS; ++i)  // zero the gap between matrices, which is never read
            std::memset(packed + i * plane(l) + g.size(), 0,
                        static_cast<size_t>(plane(l) - g.size()) * sizeof(float));
        parallel(g.panels(), threads, nullptr, 0, [&](long panel, Scratch) {
            float taps[4][4][PANEL];
            for (long c_in = 0; c_in < l.c_in; ++c_in) {
                w.panel(c_in, panel * PANEL, l.c_out, taps);
                for (long parity = 0; parity < 4; ++parity) {
                    const long a = parity / 2, b = parity % 2;
                    const auto tap = [&](long i, long j) -> const float* {
                        return taps[tap_row(l.transposed, a, i)][tap_row(l.transposed, b, j)];
                    };
                    // `down` concatenates the parities along K, `up` has a separate matrix for each.
                    transform(tap(0, 0), tap(0, 1), tap(1, 0), tap(1, 1),
                              packed + (l.transposed ? parity * POINTS * plane(l) : 0) +
                                  g.offset((l.transposed ? 0 : parity * l.c_in) + c_in, panel),
                              plane(l));
                }
            }
        });
    }

    // Computes G g Gᵀ for PANEL channels, and stores it at the same offset in the matrix of each point.
    static DCGAN_INLINE void transform(const float* g00, const float* g01, const float* g10, const float* g11,
                                       float* to, long stride) {
        const vec a00 = load(g00), a01 = load(g01), a10 = load(g10), a11 = load(g11);
        const vec b00 = load(g00 + LANES), b01 = load(g01 + LANES), b10 = load(g10 + LANES),
                  b11 = load(g11 + LANES);
#pragma GCC unroll 5
        for (long i = 0; i < F::IN; ++i) {
            const vec left = F::G[i][0] * a00 + F::G[i][1] * a10, right = F::G[i][0] * a01 + F::G[i][1] * a11;
            const vec left2 = F::G[i][0] * b00 + F::G[i][1] * b10,
                      right2 = F::G[i][0] * b01 + F::G[i][1] * b11;
#pragma GCC unroll 5
            for (long j = 0; j < F::IN; ++j) {  // a whole cache line at a time
                float* const line = to + (i * F::IN + j) * stride;
                store(line, F::G[j][0] * left + F::G[j][1] * right);
                store(line + LANES, F::G[j][0] * left2 + F::G[j][1] * right2);
            }
        }
    }

    struct Tiles {
        long down, across, total;
    };

    static Tiles tiles(const Job& job) {
        const Size size = parity_map(job);
        const long down = ceil_div(size.height, F::OUT), across = ceil_div(size.width, F::OUT);
        return {down, across, job.images * down * across};
    }

    static Split plan(const Job& job, int threads) {
        // Reading the weights of four columns takes about as long as the transforms of one tile.
        const long total = tiles(job).total;
        const Gemm g = shape(*job.layer);
        return split(total, block_target(*job.layer), g.panels(), groups(*job.layer), threads,
                     4 * total < g.columns);
    }

    // Tiles per block. Small blocks keep V in L2; large blocks read the weights less often from L3 or memory.
    static long block_target(const dcgan_layer& l) {
        const bool beyond_l3 = packed_size(l) > (4L << 20);
        return F::OUT == 2 ? (beyond_l3 ? 96 : 64) : 32;
    }

    struct Strides {
        long v_row, v_plane, s_row, s_plane;
    };

    static Strides strides(const dcgan_layer& l, long tiles, long panels) {
        const long v_row = odd_lines((l.transposed ? 1 : 4) * round_up(l.c_in, LANES));
        const long s_row = odd_lines(panels * PANEL);
        return {v_row, odd_lines(tiles * v_row), s_row, odd_lines(tiles * s_row)};
    }

    static long scratch_size(const Job& job, int threads) {
        const dcgan_layer& l = *job.layer;
        const Split s = plan(job, threads);
        const Strides st = strides(l, s.max_rows, s.panels);
        return round_up(l.c_in + LANES, 16) + round_up(2 * s.max_rows * shape(l).taps, 16) +
               round_up(POINTS * st.v_plane, 16) + round_up(POINTS * st.s_plane, 16);
    }

    // Computes V of one tile and parity: window[i][j] points to the channels of its pixel (i, j).
    static DCGAN_INLINE void input_channels(const float* const (&window)[F::IN][F::IN], long c, long count,
                                            float* v, long plane) {
        vec half[F::IN][F::IN];
#pragma GCC unroll 5
        for (long i = 0; i < F::IN; ++i) {
            vec d[F::IN];
#pragma GCC unroll 5
            for (long j = 0; j < F::IN; ++j) d[j] = load(window[i][j] + c, count);
            F::input(d, half[i]);
        }
#pragma GCC unroll 5
        for (long j = 0; j < F::IN; ++j) {
            vec d[F::IN], t[F::IN];
#pragma GCC unroll 5
            for (long i = 0; i < F::IN; ++i) d[i] = half[i][j];
            F::input(d, t);
#pragma GCC unroll 5
            for (long i = 0; i < F::IN; ++i) store(v + (i * F::IN + j) * plane + c, t[i]);
        }
    }

    static void input_tile(const float* const (&window)[F::IN][F::IN], long channels, float* v, long plane) {
        long c = 0;
        for (; c + LANES <= channels; c += LANES) input_channels(window, c, LANES, v, plane);
        if (c < channels) input_channels(window, c, channels - c, v, plane);
    }

    template <class E>
    static DCGAN_INLINE void output_channels(const float* s, long plane, E& lanes, long rows, long columns,
                                             float* y, long y_row, long y_column, long count) {
        vec half[F::IN][F::OUT];
#pragma GCC unroll 5
        for (long i = 0; i < F::IN; ++i) {
            vec t[F::IN];
#pragma GCC unroll 5
            for (long j = 0; j < F::IN; ++j) t[j] = load(s + (i * F::IN + j) * plane);
            F::output(t, half[i]);
        }
#pragma GCC unroll 4
        for (long j = 0; j < F::OUT; ++j) {
            vec t[F::IN], out[F::OUT];
#pragma GCC unroll 5
            for (long i = 0; i < F::IN; ++i) t[i] = half[i][j];
            F::output(t, out);
#pragma GCC unroll 4
            for (long i = 0; i < F::OUT; ++i) {
                if (i >= rows || j >= columns) continue;
                float* const to = y + i * y_row + j * y_column;
                __builtin_prefetch(to + F::OUT * y_column, 1);  // the next tile's
                lanes.write(out[i], to, count);
            }
        }
    }

    static void run(const Job& job, int threads, float* scratch, long scratch_stride) {
        const dcgan_layer& l = *job.layer;
        const Gemm g = shape(l);
        const Split s = plan(job, threads);
        const Strides st = strides(l, s.block_rows(), s.part_panels());
        const Tiles grid = tiles(job);
        const long parities = l.transposed ? 1 : 4, step = l.transposed ? 2 : 1;
        const long parity_row = round_up(l.c_in, LANES);
        with_epilogue(job, [&](const auto& epilogue) {
            parallel(s.units(), threads, scratch, scratch_stride, [&](long index, Scratch local) {
                const Unit u = unit(s, index);
                const auto& sink = epilogue.unit(index);
                const long m = u.rows.size();
                float* const zeros = local.floats(l.c_in + LANES);
                const float** const rows = local.pointers(m * g.taps);
                float* const v = local.floats(POINTS * st.v_plane);
                float* const sums = local.floats(POINTS * st.s_plane);
                for (long c = 0; c < l.c_in; ++c) zeros[c] = 0;

                const auto position = [&](long tile, long& image, long& p, long& q) {
                    q = tile % grid.across * F::OUT;
                    p = tile / grid.across % grid.down * F::OUT;
                    image = tile / (grid.across * grid.down);
                };
                for (long t = 0; t < m; ++t) {
                    long image, p, q;
                    position(u.rows.begin + t, image, p, q);
                    const float* const x = job.x.data + image * job.x.n;
                    for (long parity = 0; parity < parities; ++parity) {
                        const long group = l.transposed ? u.group : parity, a = group / 2, b = group % 2;
                        const float* window[F::IN][F::IN];
                        for (long i = 0; i < F::IN; ++i) {
                            const long r = l.transposed ? p - 1 + a + i : 2 * (p + i) - 1 + a;
                            for (long j = 0; j < F::IN; ++j) {
                                const long c = l.transposed ? q - 1 + b + j : 2 * (q + j) - 1 + b;
                                const bool inside = r >= 0 && r < l.height && c >= 0 && c < l.width;
                                window[i][j] = inside ? x + r * job.x.h + c * job.x.w : zeros;
                            }
                        }
                        input_tile(window, l.c_in, v + t * st.v_row + parity * parity_row, st.v_plane);
                    }
                }
                for (long point = 0; point < POINTS; ++point) {
                    for (long tap = 0; tap < parities; ++tap)
                        for (long t = 0; t < m; ++t)
                            rows[tap * m + t] = v + point * st.v_plane + t * st.v_row + tap * parity_row;
                    gemm(g, rows, m, l.weights + (u.group * POINTS + point) * plane(l), u.panels.begin,
                         u.panels.end, sums + point * st.s_plane, st.s_row);
                }
                const Size size = parity_rows(job, u.group);
                const long begin = u.panels.begin * PANEL, end = min(u.panels.end * PANEL, l.c_out);
                for (long t = 0; t < m; ++t) {
                    long image, p, q;
                    position(u.rows.begin + t, image, p, q);
                    float* const y = job.y.data + image * job.y.n + (p * step + u.group / 2) * job.y.h +
                                     (q * step + u.group % 2) * job.y.w;
                    for (long c = begin; c < end; c += LANES) {
                        const long count = min(LANES, end - c);
                        auto lanes = sink.at(c, count);
                        output_channels(sums + t * st.s_row + c - begin, st.s_plane, lanes, size.height - p,
                                        size.width - q, y + c, step * job.y.h, step * job.y.w, count);
                        lanes.flush();
                    }
                }
            });
        });
    }
};

}  // namespace dcgan::DCGAN_ISA
