// How a layer's work is cut into units that threads take one by one, and what the algorithms share to do one.
//
// An output element is computed by one unit alone, in an order that no split changes: results do not depend
// on the number of threads.
#pragma once

#include "engine.h"
#include "micro.h"

namespace dcgan::DCGAN_ISA {

constexpr long least(long a, long b) {
    return a < b ? a : b;
}
constexpr long most(long a, long b) {
    return a > b ? a : b;
}
constexpr long ceil_div(long a, long b) {
    return (a + b - 1) / b;
}
constexpr long round_up(long a, long to) {
    return ceil_div(a, to) * to;
}

// A row's stride in scratch: a multiple of a cache line, but an odd one, so that rows (or planes) of a power
// of two do not all fall into the same sets of L1.
constexpr long odd_lines(long floats) {
    return round_up(floats, 16) / 16 % 2 == 1 ? round_up(floats, 16) : round_up(floats, 16) + 16;
}

inline long out_size(const dcgan_layer& l, long in) {
    return l.transposed ? (in - 1) * l.stride - 2 * l.padding + l.kernel
                        : (in + 2 * l.padding - l.kernel) / l.stride + 1;
}

// Rows (pixels, images, tiles) in `blocks`, output columns in `parts`, `groups` independent products
// (parities).
struct Split {
    long rows, blocks, panels, parts, groups;
    long most_rows;  // of a block, for this many rows or fewer: what scratch memory is made for

    long units() const { return blocks * parts * groups; }
    long block_rows() const { return ceil_div(rows, blocks); }
    long part_panels() const { return ceil_div(panels, parts); }
};

struct Range {
    long begin, end;
    long size() const { return end - begin; }
};

// Pixels of a map.
struct Size {
    long height, width;
    long pixels() const { return height * width; }
};

// Output pixels of one parity: of `up` every input pixel has one, of `down` there is one parity.
inline Size parity_map(const Job& job) {
    const dcgan_layer& l = *job.layer;
    if (l.transposed) return {l.height + job.extra_height, l.width + job.extra_width};
    return {out_size(l, l.height), out_size(l, l.width)};
}

// Those that y has: of an odd map the second parity has one row less.
inline Size parity_rows(const Job& job, long group) {
    const Size size = parity_map(job);
    if (!job.layer->transposed) return size;
    return {size.height - job.extra_height * (group / 2), size.width - job.extra_width * (group % 2)};
}

struct Unit {
    Range rows, panels;
    long group;
};

// Whether this many equal units keep the threads busy for three quarters of the time.
inline bool balanced(long units, int threads) {
    return 4 * units >= 3 * round_up(units, threads);
}

// Blocks of at most `target` rows; where threads would wait, parts of the columns too, or smaller blocks.
// Threads that split the columns share the weights between them, threads that split the rows what is done
// with rows.
inline Split split(long rows, long target, long panels, long groups, int threads, bool columns_first) {
    Split s{rows, most(1, ceil_div(rows, target)), panels, 1, groups, least(rows, target)};
    const auto cut = [&](long& pieces, long limit) {
        while (!balanced(s.units(), threads) && pieces < limit) ++pieces;
    };
    if (columns_first) cut(s.parts, panels);
    cut(s.blocks, ceil_div(rows, 2 * ROWS));
    cut(s.parts, panels);
    return s;
}

// Unit `index` of the split. Neighbours in time share their weights (group and part), not their rows.
inline Unit unit(const Split& s, long index) {
    const long block = index % s.blocks, part = index / s.blocks % s.parts,
               group = index / (s.blocks * s.parts);
    return {{block * s.rows / s.blocks, (block + 1) * s.rows / s.blocks},
            {part * s.panels / s.parts, (part + 1) * s.panels / s.parts},
            group};
}

// A thread's scratch memory, handed out from the front; every piece starts on a cache line.
struct Scratch {
    float* at;

    float* floats(long count) {
        float* const piece = at;
        at += round_up(count, 16);
        return piece;
    }
    const float** pointers(long count) { return reinterpret_cast<const float**>(floats(2 * count)); }
};

// Weights as the layer names them, whatever their strides.
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

    // All taps of a 4×4 kernel for PANEL output channels from c_out on, of which those below `end` exist.
    void panel(long c_in, long c_out, long end, float (&taps)[4][4][PANEL]) const {
        if (row == 4 && column == 1 && c_out + PANEL <= end) {  // 16 taps next to each other
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

// The row of weights that parity `a` of a k4 s2 p1 convolution applies at tap i (0 or 1).
//     up:   y[2p+a] = Σ_i x[p-1+a+i]·w[3-a-2i]          down: y[p] = Σ_a Σ_i x[2(p+i)-1+a]·w[a+2i]
inline long tap_row(bool transposed, long a, long i) {
    return transposed ? 3 - a - 2 * i : a + 2 * i;
}

// Runs f(index, scratch) for every index below `count`, on the threads of the pool.
template <class F>
inline void parallel(long count, int threads, float* scratch, long scratch_stride, const F& f) {
#ifdef _OPENMP
    if (running(threads) > 1 && count > 1) {
        const int useful = static_cast<int>(least(running(threads), count));
#pragma omp parallel num_threads(useful)
        {
            float* const own = scratch + omp_get_thread_num() * scratch_stride;
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count; ++i) f(i, Scratch{own});
        }
        return;
    }
#endif
    for (long i = 0; i < count; ++i) f(i, Scratch{scratch});
}

}  // namespace dcgan::DCGAN_ISA
