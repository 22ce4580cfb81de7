// The gradients of an epilogue's shift and scale, from e = dy·act'(y):
//
//     dshift[c] = Σ e          over all pixels
//     dscale[c] = Σ e·u = Σ_k weight[c][k]·dweight[c][k]
//
// where dweight is the weight gradient computed from e. Since u[c] = Σ_k weight[c][k]·x̂[k] is linear in the
// weights, u need not be recomputed. This also holds where the scale is 0.
#pragma once

#include "prologue.h"
#include "units.h"

namespace dcgan::DCGAN_ISA {

// Column sums of the map, viewed as rows ("lines") of whole pixels. Sums within a unit of work are float32,
// sums over the units float64.
struct ShiftGradient {
    static constexpr long LINE = 64;    // minimum floats per line, so that few channels still fill vectors
    static constexpr long DEPTH = 128;  // lines per unit

    const Source& e;
    long floats, line, stride, units;

    ShiftGradient(const Source& source, long pixels)
        : e(source),
          floats(pixels * source.channels),
          line(ceil_div(LINE, source.channels) * source.channels),
          stride(round_up(line, 16)),
          units(ceil_div(floats, DEPTH * line)) {}

    long memory() const { return units * stride; }

    void run(int threads, float* memory, float* dshift) const {
        parallel(units, threads, nullptr, 0, [&](long unit, Scratch) {
            const long begin = unit * DEPTH * line;
            const Range range{begin, min(floats, begin + DEPTH * line)};
            float* const sums = memory + unit * stride;
            switch (e.act) {
                case DCGAN_RELU:
                    return add<DCGAN_RELU>(range, sums);
                case DCGAN_LEAKY_RELU:
                    return add<DCGAN_LEAKY_RELU>(range, sums);
                case DCGAN_TANH:
                    return add<DCGAN_TANH>(range, sums);
                case DCGAN_SIGMOID:
                    return add<DCGAN_SIGMOID>(range, sums);
                default:
                    return add<DCGAN_NONE>(range, sums);
            }
        });
        for (long c = 0; c < e.channels; ++c) {
            double sum = 0;
            for (long unit = 0; unit < units; ++unit)
                for (long i = c; i < line; i += e.channels)
                    sum += static_cast<double>(memory[unit * stride + i]);
            dshift[c] = static_cast<float>(sum);
        }
    }

    template <int ACT>
    void add(Range range, float* sums) const {
        const Source s = e;  // a local copy, which the stores cannot alias
        const vec slope = splat(s.slope);
        std::memset(sums, 0, static_cast<size_t>(stride) * sizeof(float));
        for (long at = range.begin; at < range.end; at += line) {
            const long columns = min(line, range.end - at);
            for (long i = 0; i < columns; i += LANES) {
                const long count = min(LANES, columns - i);
                vec term = load(s.t + at + i, count);
                if constexpr (ACT != DCGAN_NONE)
                    term = derivative<ACT>(term, load(s.y + at + i, count), slope);
                store(sums + i, load(sums + i) + term);
            }
        }
    }
};

// Computes a layer's dscale from the weights and the weight gradient by e, and scales the latter in place.
struct ScaleGradient {
    const dcgan_layer& l;
    const Weights w, d;
    float* dweight;

    ScaleGradient(const dcgan_layer& layer, const float* weight, const int64_t strides[4], float* gradient,
                  const int64_t gradient_strides[4])
        : l(layer), w(layer, weight, strides), d(layer, gradient, gradient_strides), dweight(gradient) {}

    // A unit of work is one vector of output channels, read in memory order.
    void run(int threads, float* dscale) const {
        parallel(ceil_div(l.c_out, LANES), threads, nullptr, 0, [&](long unit, Scratch) {
            const Range channels{unit * LANES, min(l.c_out, (unit + 1) * LANES)};
            if (w.out == 1 && d.out == 1)
                by_lane(channels, dscale);
            else
                by_channel(channels, dscale);
        });
    }

    void by_lane(Range channels, float* dscale) const {
        const long count = channels.size();
        const vec scale = l.scale == nullptr ? splat(1.0f) : load(l.scale + channels.begin, count);
        vec sum{};
        for (long i = 0; i < l.c_in; ++i) {
            vec tap_sum{};
            for (long y = 0; y < l.kernel; ++y)
                for (long x = 0; x < l.kernel; ++x) tap_sum += product(i, channels.begin, y, x, count, scale);
            sum += tap_sum;
        }
        store(dscale + channels.begin, sum, count);
    }

    void by_channel(Range channels, float* dscale) const {
        const long k = l.kernel;
        const bool inputs = w.in == 1 && d.in == 1;  // input channels are contiguous; otherwise, are taps?
        const bool taps = w.column == 1 && d.column == 1 && w.row == k && d.row == k;
        vec sums[LANES] = {};
        for (long i = 0; i < (inputs ? k * k : l.c_in); ++i)
            for (long c = channels.begin; c < channels.end; ++c) {
                const vec scale = splat(l.scale == nullptr ? 1.0f : l.scale[c]);
                vec& sum = sums[c - channels.begin];
                if (inputs)
                    sum += product(0, c, i / k, i % k, l.c_in, scale);
                else if (taps)
                    sum += product(i, c, 0, 0, k * k, scale);
                else
                    for (long y = 0; y < k; ++y)
                        for (long x = 0; x < k; ++x) sum += product(i, c, y, x, 1, scale);
            }
        for (long c = channels.begin; c < channels.end; ++c) {
            double sum = 0;
            for (long lane = 0; lane < LANES; ++lane)
                sum += static_cast<double>(sums[c - channels.begin][lane]);
            dscale[c] = static_cast<float>(sum);
        }
    }

    // Returns Σ weight·dweight over `count` contiguous elements, per lane, and scales dweight in place.
    DCGAN_INLINE vec product(long c_in, long c_out, long y, long x, long count, vec scale) const {
        const float* const from = w.data + w.at(c_in, c_out, y, x);
        float* const to = dweight + d.at(c_in, c_out, y, x);
        vec sum{};
        for (long i = 0; i < count; i += LANES) {
            const long here = min(LANES, count - i);
            const vec gradient = load(to + i, here);
            sum += load(from + i, here) * gradient;
            store(to + i, gradient * scale, here);
        }
        return sum;
    }
};

}  // namespace dcgan::DCGAN_ISA
