// The partition of a layer's work into units, which are scheduled dynamically, and shared helpers.
//
// Each output element is computed by a single unit, in an order that does not depend on the partition:
// results do not depend on the number of threads.
#pragma once

#include "engine.h"
#include "micro.h"

namespace dcgan::DCGAN_ISA {

constexpr long min(long a, long b) {
    return a < b ? a : b;
}
constexpr long max(long a, long b) {
    return a > b ? a : b;
}
constexpr long ceil_div(long a, long b) {
    return (a + b - 1) / b;
}
constexpr long round_up(long a, long to) {
    return ceil_div(a, to) * to;
}

// The stride of a row in scratch: an odd multiple of the cache line, so that rows (or planes) whose size is a
// power of two do not all map to the same L1 sets.
constexpr long odd_lines(long floats) {
    return round_up(floats, 16) / 16 % 2 == 1 ? round_up(floats, 16) : round_up(floats, 16) + 16;
}

inline long out_size(const dcgan_layer& l, long in) {
    return l.transposed ? (in - 1) * l.stride - 2 * l.padding + l.kernel
                        : (in + 2 * l.padding - l.kernel) / l.stride + 1;
}

// A partition: rows (pixels, images, tiles) into `blocks`, output columns into `parts`, for each of `groups`
// independent products (parities).
struct Split {
    long rows, blocks, panels, parts, groups;
    long max_rows;  // per block, for any smaller number of rows too: determines the size of scratch memory

    long units() const { return blocks * parts * groups; }
    long block_rows() const { return ceil_div(rows, blocks); }
    long part_panels() const { return ceil_div(panels, parts); }
};

struct Range {
    long begin, end;
    long size() const { return end - begin; }
};

// The size of a map in pixels.
struct Size {
    long height, width;
    long pixels() const { return height * width; }
};

// Output pixels per parity: `up` has one per input pixel; `down` has only one parity.
inline Size parity_map(const Job& job) {
    const dcgan_layer& l = *job.layer;
    if (l.transposed) return {l.height + job.extra_height, l.width + job.extra_width};
    return {out_size(l, l.height), out_size(l, l.width)};
}

// The pixels of a parity that exist in y: in an odd map, the second parity has one row less.
inline Size parity_rows(const Job& job, long group) {
    const Size size = parity_map(job);
    if (!job.layer->transposed) return size;
    return {size.height - job.extra_height * (group / 2), size.width - job.extra_width * (group % 2)};
}

struct Unit {
    Range rows, panels;
    long group;
};

// Whether `units` equal units of work keep the threads busy for at least three quarters of the time.
inline bool balanced(long units, int threads) {
    return 4 * units >= 3 * round_up(units, threads);
}

// Splits rows into blocks of at most `target`; if that would leave threads idle, also splits the columns, or
// makes the blocks smaller. Splitting columns divides the reads of weights among the threads, splitting rows
// divides the work per row (such as input transforms).
inline Split split(long rows, long target, long panels, long groups, int threads, bool columns_first) {
    Split s{rows, max(1, ceil_div(rows, target)), panels, 1, groups, min(rows, target)};
    const auto cut = [&](long& pieces, long limit) {
        while (!balanced(s.units(), threads) && pieces < limit) ++pieces;
    };
    if (columns_first) cut(s.parts, panels);
    cut(s.blocks, ceil_div(rows, 2 * ROWS));
    cut(s.parts, panels);
    return s;
}

// Unit `index` of the split. Consecutive units share their weights (group and part), not their rows.
inline Unit unit(const Split& s, long index) {
    const long block = index % s.blocks, part = index / s.blocks % s.parts,
               group = index / (s.blocks * s.parts);
    return {{block * s.rows / s.blocks, (block + 1) * s.rows / s.blocks},
            {part * s.panels / s.parts, (part + 1) * s.panels / s.parts},
            group};
}

// A bump allocator for a thread's scratch memory; every allocation is aligned to a cache line.
struct Scratch {
    float* at;

    float* floats(long count) {
        float* const piece = at;
        at += round_up(count, 16);
        return piece;
    }
    const float** pointers(long count) { return reinterpret_cast<const float**>(floats(2 * count)); }
};

// A layer's weights, with arbitrary strides.
struct Weights {
    const float* data;
    long in, out, row, column;

    Weights(const dcgan_layer& l, const float* w, const int64_t strides[4])
        : data(w),
          in(strides[l.transposed ? 0 : 1]),
          out(strides[l.transposed ? 1 : 0]),
          row(strides[2]),
          column(strides[3]) {}

    long at(long c_in, long c_out, long y, long x) const {
        return c_in * in + c_out * out + y * row + x * column;
    }
    float operator()(long c_in, long c_out, long y, long x) const { return data[at(c_in, c_out, y, x)]; }

    // Loads all taps of a 4×4 kernel for the PANEL output channels from c_out; those beyond `end` are zero.
    void panel(long c_in, long c_out, long end, float (&taps)[4][4][PANEL]) const {
        if (row == 4 && column == 1 && c_out + PANEL <= end) {  // 16 contiguous taps
            const float* const from = data + c_in * in + c_out * out;
            for (long lane = 0; lane < PANEL; lane += LANES)
                for (long tap = 0; tap < 16; tap += LANES) {
                    vec block[LANES];
#pragma GCC unroll 16
                    for (long i = 0; i < LANES; ++i) block[i] = load(from + (lane + i) * out + tap);
                    transpose(block);
#pragma GCC unroll 16
                    for (long i = 0; i < LANES; ++i)
                        store(&taps[(tap + i) / 4][(tap + i) % 4][lane], block[i]);
                }
            return;
        }
        for (long lane = 0; lane < PANEL; ++lane) {
            const float* const from = data + c_in * in + (c_out + lane) * out;
            for (long y = 0; y < 4; ++y)
                for (long x = 0; x < 4; ++x)
                    taps[y][x][lane] = c_out + lane < end ? from[y * row + x * column] : 0.0f;
        }
    }
};

// The row of the kernel that parity `a` of a k4 s2 p1 convolution applies at tap i (0 or 1).
//     up:   y[2p+a] = Σ_i x[p-1+a+i]·w[3-a-2i]          down: y[p] = Σ_a Σ_i x[2(p+i)-1+a]·w[a+2i]
inline long tap_row(bool transposed, long a, long i) {
    return transposed ? 3 - a - 2 * i : a + 2 * i;
}

// Runs f(index, scratch) for every index below `count` on OpenMP threads.
template <class F>
inline void parallel(long count, int threads, float* scratch, long scratch_stride, const F& f) {
#ifdef _OPENMP
    if (effective_threads(threads) > 1 && count > 1) {
        const int useful = static_cast<int>(min(effective_threads(threads), count));
#pragma omp parallel num_threads(useful)
        {
            float* const local = scratch + omp_get_thread_num() * scratch_stride;
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count; ++i) f(i, Scratch{local});
        }
        return;
    }
#endif
    for (long i = 0; i < count; ++i) f(i, Scratch{scratch});
}

}  // namespace dcgan::DCGAN_ISA
