// The weight gradient of a layer.
//
// A tap connects pixel p of a small map with pixel p·stride - padding + k of a large one. A convolution maps
// large to small, a transposed convolution small to large, and both have weights [C_small, C_large, k, k].
// Hence the weight gradient of either is the same correlation:
//
//     dw[s][l][ky][kx] = Σ_p small[p][s]·large[p·stride - padding + k][l]
//
// where one of the maps is x̂ and the other du.
//
// The reduction over tiles is split into K blocks, each of which takes two steps:
//
//     operands   parallel over tiles: materialize the prologues of both maps in scratch, padded with zeros,
//                and write their transforms to shared memory: V of the large map, W of the small one, in
//                panels of channels [panel][point][tile][PANEL]
//     products   parallel over blocks of dw: C[point] = Σ_tile W[point][tile]·V[point][tile] in the thread's
//                L2, then the output transform from points to taps
//
// The taps of a block are accumulated over the K blocks and stored (or added) to dweight after the last one:
// the order of summation does not depend on the number of threads.
#pragma once

#include "outer.h"
#include "prologue.h"
#include "units.h"
#include "winograd.h"

namespace dcgan::DCGAN_ISA {

struct Correlation {
    const Source *large, *small;
    Size large_map, small_map;
    long images, kernel, stride, padding;
    float* dweight;
    bool add;                // to dweight
    long s, l, row, column;  // strides of dweight

    explicit Correlation(const GradientJob& job)
        : large(&job.x),
          small(&job.du),
          large_map{job.layer->height, job.layer->width},
          small_map{out_size(*job.layer, job.layer->height), out_size(*job.layer, job.layer->width)},
          images(job.images),
          kernel(job.layer->kernel),
          stride(job.layer->stride),
          padding(job.layer->padding),
          dweight(job.dweight),
          add(job.add),
          s(0),
          l(0),
          row(0),
          column(0) {
        if (job.layer->transposed) {
            large = &job.du;
            small = &job.x;
            const Size size = large_map;
            large_map = small_map;
            small_map = size;
        }
        if (job.strides == nullptr) return;
        s = job.strides[0];
        l = job.strides[1];
        row = job.strides[2];
        column = job.strides[3];
    }

    long taps() const { return kernel * kernel; }
    float* tap(long channel_s, long channel_l, long index) const {
        return dweight + channel_s * s + channel_l * l + index / kernel * row + index % kernel * column;
    }
    void put(long channel_s, long channel_l, long index, float sum) const {
        float* const to = tap(channel_s, channel_l, index);
        *to = add ? sum + *to : sum;
    }
};

// A window of a map in scratch, zero outside the map.
struct Window {
    long rows, columns, channels;

    // Rows are an odd number of cache lines apart: otherwise the rows of a tile would share their L1 sets.
    long row_stride() const { return odd_lines(columns * channels); }
    long size() const { return rows * row_stride(); }

    // Fills the window, whose first pixel is (top, left) of the image.
    void fill(const Source& source, Size map, long image, long top, long left, float* to) const {
        const long first = max(0, -left), last = max(first, min(columns, map.width - left));
        for (long i = 0; i < rows; ++i) {
            float* const line = to + i * row_stride();
            const bool inside = top + i >= 0 && top + i < map.height;
            zero(line, line + (inside ? first : columns) * channels);
            if (!inside) continue;
            const long pixel = (image * map.height + top + i) * map.width + left;
            DCGAN_ISA::fill(source, pixel + first, pixel + last, line + first * channels);
            zero(line + last * channels, line + columns * channels);
        }
    }

    static void zero(float* begin, const float* end) {
        std::memset(begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    }
};

// The direct form: a tile is one pixel of the small map, and each tap is a group with a single point.
struct Taps {
    static constexpr long OUT = 1, POINTS = 1;

    // Groups form a side×side grid; the pixels of group (i, j) start at row i and column j of the window.
    static long side(const Correlation& c) { return c.kernel; }

    // Transforms `count` channels of the tile whose first pixel is at `from`, to its points.
    static DCGAN_INLINE void large(const float* from, long, long, long count, float* to, long) {
        store(to, load(from, count));
    }
    static DCGAN_INLINE void small(const float* from, long, long, long count, float* to, long) {
        store(to, load(from, count));
    }
};

// The 2×2 taps of each parity, over 4×4 tiles, by the transpose of F(4×4, 2×2):
//
//     dw = Gᵀ [ Σ_tiles (Bᵀ d B) ⊙ (A e Aᵀ) ] G
//
// where d is 5×5 pixels of one parity of the large map, and e 4×4 pixels of the small one.
struct Polyphase {
    static constexpr long OUT = F4::OUT, IN = F4::IN, POINTS = IN * IN;

    static long side(const Correlation&) { return 2; }

    static DCGAN_INLINE void large(const float* from, long row, long column, long count, float* to,
                                   long plane) {
        vec half[IN][IN];
#pragma GCC unroll 5
        for (long i = 0; i < IN; ++i) {
            vec d[IN];
#pragma GCC unroll 5
            for (long j = 0; j < IN; ++j) d[j] = load(from + 2 * i * row + 2 * j * column, count);
            F4::input(d, half[i]);
        }
#pragma GCC unroll 5
        for (long j = 0; j < IN; ++j) {
            vec d[IN], v[IN];
#pragma GCC unroll 5
            for (long i = 0; i < IN; ++i) d[i] = half[i][j];
            F4::input(d, v);
#pragma GCC unroll 5
            for (long i = 0; i < IN; ++i) store(to + (i * IN + j) * plane, v[i]);
        }
    }

    static DCGAN_INLINE void spread(const vec (&e)[OUT], vec (&w)[IN]) {  // A e, the transpose of F4::output
        w[0] = e[0];
        w[1] = (e[0] + 0.25f * e[2]) - 0.5f * (e[1] + 0.25f * e[3]);
        w[2] = (e[0] + e[2]) + (e[1] + e[3]);
        w[3] = (e[0] + 4.0f * e[2]) - 2.0f * (e[1] + 4.0f * e[3]);
        w[4] = e[3];
    }

    static DCGAN_INLINE void small(const float* from, long row, long column, long count, float* to,
                                   long plane) {
        vec half[OUT][IN];
#pragma GCC unroll 4
        for (long i = 0; i < OUT; ++i) {
            vec e[OUT];
#pragma GCC unroll 4
            for (long j = 0; j < OUT; ++j) e[j] = load(from + i * row + j * column, count);
            spread(e, half[i]);
        }
#pragma GCC unroll 5
        for (long j = 0; j < IN; ++j) {
            vec e[OUT], w[IN];
#pragma GCC unroll 4
            for (long i = 0; i < OUT; ++i) e[i] = half[i][j];
            spread(e, w);
#pragma GCC unroll 5
            for (long i = 0; i < IN; ++i) store(to + (i * IN + j) * plane, w[i]);
        }
    }

    static DCGAN_INLINE void collect(const vec (&c)[IN], vec (&g)[2]) {  // Gᵀ c
        g[0] = (F4::G[1][0] * c[1] - c[0]) + (F4::G[2][0] * c[2] + F4::G[3][0] * c[3]);
        g[1] = (F4::G[1][1] * c[1] + c[4]) + (F4::G[2][1] * c[2] + F4::G[3][1] * c[3]);
    }

    // Computes the four taps of a parity. Points and taps are both `plane` floats apart.
    static DCGAN_INLINE void taps(const float* sums, long plane, long group, bool add, float* to) {
        vec half[IN][2];
#pragma GCC unroll 5
        for (long i = 0; i < IN; ++i) {
            vec c[IN];
#pragma GCC unroll 5
            for (long j = 0; j < IN; ++j) c[j] = load(sums + (i * IN + j) * plane);
            collect(c, half[i]);
        }
        for (long j = 0; j < 2; ++j) {
            vec c[IN], g[2];
#pragma GCC unroll 5
            for (long i = 0; i < IN; ++i) c[i] = half[i][j];
            collect(c, g);
            for (long i = 0; i < 2; ++i) {
                float* const tap = to + ((group / 2 + 2 * i) * 4 + group % 2 + 2 * j) * plane;
                store(tap, add ? g[i] + load(tap) : g[i]);
            }
        }
    }
};

template <class T>
struct TiledGradient {
    static constexpr long BUDGET = (10L << 20) / 4;  // floats of V and W: a third of a typical L3
    static constexpr long DEPTH = 256;               // tiles per K block, if the budget allows
    static constexpr long MAPS = (256L << 10) / 4;   // approximate floats of the maps in a thread's scratch

    // W is offset against V by half an L1 way: otherwise rows at the same offset would conflict.
    static constexpr long SHIFT = 2048 / 4;

    const Correlation& c;
    long down, across;        // tiles per image
    long height, per_image;   // rows of tiles per strip, strips per image
    long k_block, k_blocks;   // strips per K block, number of K blocks
    long s_panels, l_panels;  // of the small and the large map
    long s_block, l_block;    // panels per block of dw
    long groups;
    long plane, panel;       // floats of one point's tiles in a panel, and of a whole panel
    long c_stride, c_plane;  // of a block's sums
    Window large, small;

    TiledGradient(const Correlation& correlation, int threads) : c(correlation) {
        down = ceil_div(c.small_map.height, T::OUT);
        across = ceil_div(c.small_map.width, T::OUT);
        large = {0, (across * T::OUT - 1) * c.stride + c.kernel, c.large->channels};
        small = {0, across * T::OUT, c.small->channels};
        height = 1;
        while (height < down && maps(height + 1) <= MAPS) ++height;
        per_image = ceil_div(down, height);
        height = ceil_div(down, per_image);
        set_rows(height);
        groups = T::side(c) * T::side(c);
        s_panels = ceil_div(c.small->channels, PANEL);
        l_panels = ceil_div(c.large->channels, PANEL);
        const long floats = T::POINTS * (s_panels + groups * l_panels) * PANEL;
        const long tiles = min(DEPTH, BUDGET / floats), strips = c.images * per_image;
        k_block = min(max(1, tiles / (height * across)), strips);
        k_blocks = ceil_div(strips, k_block);
        k_block = ceil_div(strips, k_blocks);
        plane = odd_lines(k_block * height * across * PANEL);
        panel = round_up(T::POINTS * plane, 2 * SHIFT);

        s_block = min(s_panels, max(1, 32 / PANEL));
        l_block = min(l_panels, max(1, 64 / PANEL));
        while (blocks() < 2 * threads && s_block > 1) s_block = ceil_div(s_block, 2);
        while (blocks() < 2 * threads && l_block > 1) l_block = ceil_div(l_block, 2);
        c_stride = odd_lines(l_block * PANEL);
        c_plane = odd_lines(s_block * PANEL * c_stride);
    }

    void set_rows(long rows) {
        large.rows = (rows * T::OUT - 1) * c.stride + c.kernel;
        small.rows = rows * T::OUT;
    }
    long maps(long rows) {
        set_rows(rows);
        return large.size() + small.size();
    }
    long s_blocks() const { return ceil_div(s_panels, s_block); }
    long l_blocks() const { return ceil_div(l_panels, l_block); }
    long blocks() const { return s_blocks() * l_blocks(); }

    long v_size() const { return groups * l_panels * panel + SHIFT; }
    long w_size() const { return s_panels * panel; }
    long taps_size() const { return round_up(c.taps() * c_plane, 16); }
    long scratch_size() const {
        const long maps_size = round_up(large.size(), 16) + round_up(small.size(), 16);
        return max(maps_size, T::POINTS * c_plane + taps_size());
    }
    long memory(int threads) const {
        return v_size() + w_size() + (k_blocks > 1 ? blocks() * taps_size() : 0) + threads * scratch_size();
    }

    void run(int threads, float* memory) const {
        Scratch all{memory};
        float* const v = all.floats(v_size());
        float* const w = all.floats(w_size());
        float* const taps = k_blocks > 1 ? all.floats(blocks() * taps_size()) : nullptr;
        const long strips = c.images * per_image;
        for (long i = 0; i < k_blocks; ++i) {
            const long begin = i * strips / k_blocks, end = (i + 1) * strips / k_blocks;
            parallel(end - begin, threads, all.at, scratch_size(),
                     [&](long index, Scratch local) { operands(begin, begin + index, v, w, local); });
            const long tiles = first_tile(end) - first_tile(begin);
            parallel(blocks(), threads, all.at, scratch_size(), [&](long index, Scratch local) {
                float* const sums = local.floats(T::POINTS * c_plane);
                float* const to = k_blocks > 1 ? taps + index * taps_size() : local.floats(taps_size());
                products(index, tiles, v, w, i > 0, sums, to);
                if (i + 1 == k_blocks) store_block(index, to);
            });
        }
    }

    long first_tile(long strip) const {
        return (strip / per_image * down + strip % per_image * height) * across;
    }

    // Computes V and W of the tiles of a strip.
    void operands(long first, long strip, float* v, float* w, Scratch local) const {
        const long image = strip / per_image, top = strip % per_image * height;
        const long rows = min(height, down - top);
        const long tile = first_tile(strip) - first_tile(first);
        float* const l = local.floats(large.size());
        float* const s = local.floats(small.size());
        Window l_window = large, s_window = small;
        l_window.rows = (rows * T::OUT - 1) * c.stride + c.kernel;
        s_window.rows = rows * T::OUT;
        l_window.fill(*c.large, c.large_map, image, top * T::OUT * c.stride - c.padding, -c.padding, l);
        s_window.fill(*c.small, c.small_map, image, top * T::OUT, 0, s);

        for (long group = 0; group < groups; ++group) {
            const long i = group / T::side(c), j = group % T::side(c);
            panels<true>(large, l + i * large.row_stride() + j * large.channels, T::OUT * c.stride, rows,
                         v + group * l_panels * panel + tile * PANEL);
        }
        panels<false>(small, s, T::OUT, rows, w + tile * PANEL);
    }

    // Transforms rows of tiles, `step` pixels apart, to all panels of one group of V, or of W.
    template <bool LARGE>
    void panels(const Window& window, const float* map, long step, long rows, float* to) const {
        const long row = window.row_stride(), column = window.channels;
        for (long index = 0; index * PANEL < window.channels; ++index)
            for (long i = 0; i < rows; ++i)
                for (long j = 0; j < across; ++j)
                    line<LARGE>(map + step * (i * row + j * column) + index * PANEL, row, column,
                                min(PANEL, window.channels - index * PANEL),
                                to + index * panel + (i * across + j) * PANEL, plane);
    }

    // Transforms the channels of one panel of one tile. If this is inlined, GCC runs out of registers for the
    // addresses and the code takes twice as long.
    template <bool LARGE>
    [[gnu::noinline]] static void line(const float* from, long row, long column, long channels, float* to,
                                       long plane) {
        // Prefetch the next tile's destination: the hardware prefetcher cannot track that many streams.
        for (long point = 0; point < T::POINTS; ++point)
            __builtin_prefetch(to + point * plane + 2 * PANEL, 1);
        const auto transform = [&](long lane, long count) __attribute__((always_inline)) {
            if constexpr (LARGE)
                T::large(from + lane, row, column, count, to + lane, plane);
            else
                T::small(from + lane, row, column, count, to + lane, plane);
        };
        if (channels == PANEL)
            for (long lane = 0; lane < PANEL; lane += LANES) transform(lane, LANES);
        else
            for (long lane = 0; lane < PANEL; lane += LANES)
                transform(lane, max(0, min(LANES, channels - lane)));
    }

    struct Block {
        Range s, l;  // panels
    };
    Block block(long index) const {
        const long i = index % s_blocks(), j = index / s_blocks();
        return {{i * s_panels / s_blocks(), (i + 1) * s_panels / s_blocks()},
                {j * l_panels / l_blocks(), (j + 1) * l_panels / l_blocks()}};
    }

    void products(long index, long tiles, const float* v, const float* w, bool add, float* sums,
                  float* taps) const {
        const Block b = block(index);
        constexpr bool direct = T::POINTS == 1;
        const long s_count = b.s.size(), l_count = b.l.size();
        const float* const w_block = w + b.s.begin * panel;
        for (long group = 0; group < groups; ++group) {
            const float* const v_block = v + (group * l_panels + b.l.begin) * panel;
            for (long point = 0; point < T::POINTS; ++point) {
                // Each product prefetches its share of the next point's panels into L2.
                const bool last = point + 1 == T::POINTS;
                const float* const w_next = last ? w_block : w_block + (point + 1) * plane;
                const float* const v_next = last ? v_block + l_panels * panel : v_block + (point + 1) * plane;
                const auto prefetch = [&](long product) {
                    const long at = product * (s_count + l_count) * tiles / (s_count * l_count);
                    const long next = at / tiles, line = at % tiles * PANEL;
                    const float* const from =
                        next < s_count ? w_next + next * panel : v_next + (next - s_count) * panel;
                    return Operand{from + line, 8};
                };
                float* const to = direct ? taps + group * c_plane : sums + point * c_plane;
                for (long l = 0; l < l_count; ++l)
                    for (long s = 0; s < s_count; ++s)
                        outer_panel(min(PANEL, c.small->channels - (b.s.begin + s) * PANEL),
                                    {w_block + s * panel + point * plane, PANEL},
                                    {v_block + l * panel + point * plane, PANEL}, tiles,
                                    to + (s * c_stride + l) * PANEL, c_stride, direct && add,
                                    prefetch(l * s_count + s));
            }
            if constexpr (T::POINTS > 1) {
                const long rows = min(b.s.size() * PANEL, c.small->channels - b.s.begin * PANEL);
                for (long row = 0; row < rows; ++row)
                    for (long lane = 0; lane < b.l.size() * PANEL; lane += LANES)
                        T::taps(sums + row * c_stride + lane, c_plane, group, add,
                                taps + row * c_stride + lane);
            }
        }
    }

    // Stores the taps of a block to dweight, or adds them to it.
    void store_block(long index, const float* taps) const {
        const Block b = block(index);
        const long s_end = min(b.s.end * PANEL, c.small->channels);
        const long l_begin = b.l.begin * PANEL, l_end = min(b.l.end * PANEL, c.large->channels);
        const auto put = [&](float* to, vec sum, long count) __attribute__((always_inline)) {
            store(to, c.add ? sum + load(to, count) : sum, count);
        };
        for (long s = b.s.begin * PANEL; s < s_end; ++s) {
            const float* const from = taps + (s - b.s.begin * PANEL) * c_stride - l_begin;
            if (c.l == 1) {
                for (long tap = 0; tap < c.taps(); ++tap)
                    for (long l = l_begin; l < l_end; l += LANES)
                        put(c.tap(s, l, tap), load(from + tap * c_plane + l), min(LANES, l_end - l));
            } else {
                long l = l_begin;
                if (c.kernel == 4 && c.column == 1 && c.row == 4)  // 16 contiguous taps
                    for (; l + LANES <= l_end; l += LANES)
                        for (long tap = 0; tap < 16; tap += LANES) {
                            vec block[LANES];
#pragma GCC unroll 16
                            for (long i = 0; i < LANES; ++i) block[i] = load(from + (tap + i) * c_plane + l);
                            transpose(block);
#pragma GCC unroll 16
                            for (long i = 0; i < LANES; ++i) put(c.tap(s, l + i, tap), block[i], LANES);
                        }
                for (; l < l_end; ++l)
                    for (long tap = 0; tap < c.taps(); ++tap) c.put(s, l, tap, from[tap * c_plane + l]);
            }
        }
    }
};

// The weight gradient for k4 s2 p1 with few channels in the large map, the image: one product
// [16·C_large, pixels]·[pixels, C_small] computes all taps of all channels and reads the small map once.
struct NarrowGradient {
    static constexpr long DEPTH = 128;  // approximate pixels per block

    const Correlation& c;
    long rows, per_image;  // rows of the small map per block, blocks per image
    long parts;            // number of partial sums, independent of the number of threads
    long taps, columns;
    Window large, small;

    explicit NarrowGradient(const Correlation& correlation) : c(correlation) {
        const Size map = c.small_map;
        rows = min(map.height, max(1, DEPTH / map.width));
        per_image = ceil_div(map.height, rows);
        taps = 16 * c.large->channels;
        columns = round_up(c.small->channels, PANEL);
        parts = max(1, min(c.images * per_image, min(32, (1L << 21) / (taps * columns))));
        // The prologue treats a row of the image as one wide pixel, since it is slow on few channels.
        large = {2 * rows + 2, 2 * map.width + 2, c.large->channels};
        small = {rows, map.width, c.small->channels};
    }

    bool copies() const { return c.small->prologue != Prologue::NONE || c.small->channels % PANEL != 0; }
    long image_row() const { return c.large_map.width * c.large->channels; }
    long scratch_size() const {
        return round_up(large.size(), 16) + round_up(rows * small.columns * columns, 16) +
               round_up(rows * small.columns * taps, 16);
    }
    long memory(int threads) const {
        return 3 * round_up(image_row(), 16) + parts * taps * columns + threads * scratch_size();
    }

    void run(int threads, float* memory) const {
        Scratch all{memory};
        Source image = *c.large;
        const auto widen = [&](const float*& channels) {
            float* const wide = all.floats(image_row());
            if (channels == nullptr) return;
            for (long i = 0; i < image_row(); ++i) wide[i] = channels[i % c.large->channels];
            channels = wide;
        };
        widen(image.center);
        widen(image.scale);
        widen(image.shift);
        image.channels = image_row();
        float* const sums = all.floats(parts * taps * columns);
        const long blocks = c.images * per_image;
        parallel(parts, threads, all.at, scratch_size(), [&](long part, Scratch local) {
            float* const l = local.floats(large.size());
            float* const s = local.floats(rows * small.columns * columns);
            float* const a = local.floats(rows * small.columns * taps);
            const long begin = part * blocks / parts, end = (part + 1) * blocks / parts;
            for (long block = begin; block < end; ++block)
                add(image, block, block > begin, l, s, a, sums + part * taps * columns);
        });
        for (long part = 1; part < parts; ++part)
            for (long i = 0; i < taps * columns; i += LANES)
                store(sums + i, load(sums + i) + load(sums + part * taps * columns + i));
        for (long s = 0; s < c.small->channels; ++s)
            for (long l = 0; l < c.large->channels; ++l)
                for (long tap = 0; tap < 16; ++tap)
                    c.put(s, l, tap, sums[(tap * c.large->channels + l) * columns + s]);
    }

    void add(const Source& image, long block, bool more, float* l, float* s, float* a, float* sums) const {
        const long n = block / per_image, top = block % per_image * rows, channels = c.large->channels;
        const long here = min(rows, c.small_map.height - top), width = c.small_map.width;
        // Rows 2·top - 1 to 2·(top + here) of the image, with padding.
        for (long i = 0; i < 2 * here + 2; ++i) {
            float* const line = l + i * large.row_stride();
            const long row = 2 * top - 1 + i;
            const bool inside = row >= 0 && row < c.large_map.height;
            Window::zero(line, line + large.columns * channels);
            if (!inside) continue;
            fill(image, n * c.large_map.height + row, n * c.large_map.height + row + 1, line + channels);
        }
        const long pixel = (n * c.small_map.height + top) * width, pixels = here * width;
        Operand right{c.small->t + pixel * c.small->channels, c.small->channels};
        if (copies()) {
            right.from = s;
            fill(*c.small, pixel, pixel + pixels, s);
        }
        for (long p = 0; p < here; ++p)
            for (long ky = 0; ky < 4; ++ky) {
                const float* const from = l + (2 * p + ky) * large.row_stride();
                float* const to = a + p * width * taps + ky * 4 * channels;
                for (long q = 0; q < width; ++q)
                    for (long i = 0; i < 4 * channels; i += 4)
                        std::memcpy(to + q * taps + i, from + q * 2 * channels + i, 4 * sizeof(float));
            }
        // Each panel prefetches its share of the next block's small map.
        const long panels = columns / PANEL, share = pixels * c.small->channels / panels;
        for (long panel = 0; panel < panels; ++panel) {
            const bool other = c.small->y != nullptr && panel % 2 == 1;
            const float* const map = other ? c.small->y : c.small->t;
            const Operand prefetch{map + (pixel + pixels) * c.small->channels + panel * share, 8};
            outer_panel(taps, {a, taps}, right.at(0, panel * PANEL), pixels, sums + panel * PANEL, columns,
                        more, prefetch);
        }
    }
};

struct WeightGradient {
    // Workspace in floats; its size is bounded by a K block, however many images there are.
    static long memory(const GradientJob& job, int threads) {
        const Correlation c(job);
        switch (job.layer->algorithm) {
            case DCGAN_F4:
                return TiledGradient<Polyphase>(c, threads).memory(threads);
            case DCGAN_NARROW:
                return NarrowGradient(c).memory(threads);
            default:
                return TiledGradient<Taps>(c, threads).memory(threads);
        }
    }

    static void run(const GradientJob& job, int threads, float* memory) {
        const Correlation c(job);
        switch (job.layer->algorithm) {
            case DCGAN_F4:
                return TiledGradient<Polyphase>(c, threads).run(threads, memory);
            case DCGAN_NARROW:
                return NarrowGradient(c).run(threads, memory);
            default:
                return TiledGradient<Taps>(c, threads).run(threads, memory);
        }
    }
};

}  // namespace dcgan::DCGAN_ISA
