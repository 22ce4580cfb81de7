// Polyphase Winograd F(4×4, 2×2) without materializing the transformed weights. F(4×4) needs 25 products
// instead of 64, but its transformed weights take 6.25 times the size of the weights (52 MB for a 512→256
// layer), and a training step uses each version of the weights only a few times. Here a unit of work
// transforms the weights of a few output channels and one K block into its own cache and uses them at once
// for all tiles.
//
// For a block of tiles, whose V stays in L3, and for one parity after the other:
//
//     x̂ = prologue(x);  V[ξ][tile][K] = Bᵀ x̂ B              parallel over tiles
//     U[ξ][k][panels] = G g Gᵀ;  S[ξ][tile][panels] += V·U;  y = epilogue(Aᵀ S A)     parallel over panels
//
// (winograd.h has the mathematics.) Computing U costs about as much as the products of 8 tiles, so a block
// should have many tiles; below about 32 the direct algorithm is faster.
#pragma once

#include "prologue.h"
#include "winograd.h"

namespace dcgan::DCGAN_ISA {

struct Streamed {
    using Base = Winograd<F4>;
    static constexpr long POINTS = Base::POINTS, PANELS = 2;
    static constexpr long V_FLOATS = 2L << 20;  // 8 MB

    struct Plan {
        long images;             // per block
        long tiles;              // per block
        long depth, row, plane;  // of V
        long panels, groups_of_panels;
        long units;  // per block and parity
        long s_row, s_plane, u_plane;
        bool has_prologue;
    };

    static Plan plan(const Job& job, const Source* x) {
        const dcgan_layer& l = *job.layer;
        const Base::Tiles grid = Base::tiles(job);
        const long per_image = grid.down * grid.across;
        Plan p{};
        p.depth = (l.transposed ? 1L : 4L) * l.c_in;
        p.row = odd_lines((l.transposed ? 1L : 4L) * round_up(l.c_in, LANES));
        const long fit = max(1, V_FLOATS / (POINTS * p.row * per_image));
        p.images = ceil_div(job.images, ceil_div(job.images, fit));  // blocks of nearly equal size
        p.tiles = p.images * per_image;
        p.plane = odd_lines(p.tiles * p.row);
        p.panels = ceil_div(l.c_out, PANEL);
        p.units = ceil_div(p.panels, PANELS);
        p.s_row = odd_lines(PANELS * PANEL);
        p.s_plane = odd_lines(p.tiles * p.s_row);
        p.u_plane = odd_lines(min(K_BLOCK, p.depth) * PANEL);
        p.has_prologue = x != nullptr && x->prologue != Prologue::NONE;
        return p;
    }

    static long units(const Job& job, int) {
        const Plan p = plan(job, nullptr);
        return ceil_div(job.images, p.images) * Base::groups(*job.layer) * p.units;
    }

    static long taps_floats(const Plan& p, const dcgan_layer& l) { return p.panels * l.c_in * 16 * PANEL; }
    static long thread_floats(const Plan& p) {
        return round_up(p.tiles * 2 * 2, 16) + POINTS * (PANELS * p.u_plane + p.s_plane);
    }

    static long memory(const Job& job, const Source& x, int threads) {
        const dcgan_layer& l = *job.layer;
        const Plan p = plan(job, &x);
        const long x_hat = p.has_prologue ? p.images * l.height * l.width * l.c_in + LANES : 0;
        return round_up(l.c_in + LANES, 16) + round_up(x_hat, 16) + taps_floats(p, l) + POINTS * p.plane +
               threads * round_up(thread_floats(p), 16);
    }

    static void run(const Job& job, const Source& x, const float* weight, const int64_t strides[4],
                    int threads, float* memory) {
        const dcgan_layer& l = *job.layer;
        const Plan p = plan(job, &x);
        const Weights w(l, weight, strides);
        Scratch shared{memory};
        float* const zeros = shared.floats(l.c_in + LANES);
        float* const x_hat =
            shared.floats(p.has_prologue ? p.images * l.height * l.width * l.c_in + LANES : 0);
        float* const taps = shared.floats(taps_floats(p, l));
        float* const v = shared.floats(POINTS * p.plane);
        for (long c = 0; c < l.c_in; ++c) zeros[c] = 0;

        // [panel][c_in][16 taps][PANEL], so that a unit reads the taps of its channels contiguously.
        const long slabs = ceil_div(l.c_in, 64);
        parallel(p.panels * slabs, threads, nullptr, 0, [&](long index, Scratch) {
            const long panel = index / slabs, first = index % slabs * 64;
            for (long c = first; c < min(first + 64, l.c_in); ++c)
                w.panel(c, panel * PANEL, l.c_out,
                        *reinterpret_cast<float (*)[4][4][PANEL]>(taps + (panel * l.c_in + c) * 16 * PANEL));
        });

        with_epilogue(job, [&](const auto& epilogue) {
            long unit_base = 0;
            for (long begin = 0; begin < job.images; begin += p.images) {
                const long images = min(p.images, job.images - begin);
                Job block = job;
                block.images = images;
                block.y.data += begin * job.y.n;
                const long pixels = l.height * l.width;
                const float* from = x.t + begin * pixels * l.c_in;
                if (p.has_prologue) {
                    const long rows = images * l.height;
                    parallel(rows, threads, nullptr, 0, [&](long row, Scratch) {
                        fill(x, begin * pixels + row * l.width, begin * pixels + (row + 1) * l.width,
                             x_hat + row * l.width * l.c_in);
                    });
                    from = x_hat;
                }
                const Base::Tiles grid = Base::tiles(block);
                for (long group = 0; group < Base::groups(l); ++group) {
                    parallel(grid.total, threads, nullptr, 0, [&](long tile, Scratch) {
                        input(l, grid, from, zeros, tile, group, v + tile * p.row, p.plane);
                    });
                    parallel(p.units, threads, shared.at, round_up(thread_floats(p), 16),
                             [&](long index, Scratch local) {
                                 const auto& sink = epilogue.unit(unit_base + group * p.units + index);
                                 products(block, p, grid, v, taps, group, index, sink, local);
                             });
                }
                unit_base += Base::groups(l) * p.units;
            }
        });
    }

    // Computes V of one tile, for all parities that the products sum over.
    static void input(const dcgan_layer& l, const Base::Tiles& grid, const float* x, const float* zeros,
                      long tile, long group, float* v, long plane) {
        const long q = tile % grid.across * F4::OUT, p = tile / grid.across % grid.down * F4::OUT;
        const float* const image = x + tile / (grid.across * grid.down) * l.height * l.width * l.c_in;
        for (long parity = 0; parity < (l.transposed ? 1 : 4); ++parity) {
            const long at = l.transposed ? group : parity, a = at / 2, b = at % 2;
            const float* window[F4::IN][F4::IN];
            for (long i = 0; i < F4::IN; ++i) {
                const long r = l.transposed ? p - 1 + a + i : 2 * (p + i) - 1 + a;
                for (long j = 0; j < F4::IN; ++j) {
                    const long c = l.transposed ? q - 1 + b + j : 2 * (q + j) - 1 + b;
                    const bool inside = r >= 0 && r < l.height && c >= 0 && c < l.width;
                    window[i][j] = inside ? image + (r * l.width + c) * l.c_in : zeros;
                }
            }
            Base::input_tile(window, l.c_in, v + parity * round_up(l.c_in, LANES), plane);
        }
    }

    // Runs one unit of work: all tiles of the block times PANELS panels of output channels, for one parity.
    template <class E>
    static void products(const Job& job, const Plan& p, const Base::Tiles& grid, const float* v,
                         const float* taps, long group, long index, const E& sink, Scratch local) {
        const dcgan_layer& l = *job.layer;
        const long m = grid.total, first = index * PANELS, panels = min(PANELS, p.panels - first);
        const long parities = l.transposed ? 1 : 4, parity_row = round_up(l.c_in, LANES);
        const float** const rows = local.pointers(m);
        float* const u = local.floats(POINTS * PANELS * p.u_plane);
        float* const sums = local.floats(POINTS * p.s_plane);
        const long tiles = ceil_div(m, ROWS), height = m / tiles, taller = m % tiles;
        bool add = false;
        for (long parity = 0; parity < parities; ++parity) {
            const long at = l.transposed ? group : parity, a = at / 2, b = at % 2;
            for (long begin = 0; begin < l.c_in; begin += K_BLOCK) {
                const long count = min(K_BLOCK, l.c_in - begin);
                for (long panel = 0; panel < panels; ++panel)
                    for (long k = 0; k < count; ++k) {
                        const float* const g = taps + ((first + panel) * l.c_in + begin + k) * 16 * PANEL;
                        const auto tap = [&](long i, long j) {
                            return g +
                                   (tap_row(l.transposed, a, i) * 4 + tap_row(l.transposed, b, j)) * PANEL;
                        };
                        Base::transform(tap(0, 0), tap(0, 1), tap(1, 0), tap(1, 1),
                                        u + panel * p.u_plane + k * PANEL, PANELS * p.u_plane);
                    }
                const Gemm g{1, count, PANEL};
                const KBlock block{0, 0, count, add};
                for (long point = 0; point < POINTS; ++point) {
                    for (long t = 0; t < m; ++t)
                        rows[t] = v + point * p.plane + t * p.row + parity * parity_row + begin;
                    for (long panel = 0; panel < panels; ++panel) {
                        const float* const from = u + (point * PANELS + panel) * p.u_plane;
                        float* to = sums + point * p.s_plane + panel * PANEL;
                        const float* prefetch = from + p.u_plane;
                        for (long t = 0, done = 0; t < tiles; ++t) {
                            const long here = height + (t < taller);
                            tile(here, g, rows + done, m, block, from, to, p.s_row, prefetch);
                            prefetch += count * PANEL / tiles;
                            to += here * p.s_row;
                            done += here;
                        }
                    }
                }
                add = true;
            }
        }
        const Size size = parity_rows(job, group);
        const long step = l.transposed ? 2 : 1, c_begin = first * PANEL;
        const long c_end = min((first + panels) * PANEL, l.c_out);
        for (long t = 0; t < m; ++t) {
            const long q = t % grid.across * F4::OUT, row = t / grid.across % grid.down * F4::OUT;
            float* const y = job.y.data + t / (grid.across * grid.down) * job.y.n +
                             (row * step + group / 2) * job.y.h + (q * step + group % 2) * job.y.w;
            for (long c = c_begin; c < c_end; c += LANES) {
                const long count = min(LANES, c_end - c);
                auto lanes = sink.at(c, count);
                Base::output_channels(sums + t * p.s_row + c - c_begin, p.s_plane, lanes, size.height - row,
                                      size.width - q, y + c, step * job.y.h, step * job.y.w, count);
                lanes.flush();
            }
        }
    }
};

}  // namespace dcgan::DCGAN_ISA
