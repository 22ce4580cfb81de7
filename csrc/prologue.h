// Prologues, which transform a map before a product: BatchNorm and activation for a layer's input; the
// gradients of statistics, activation and affine map for the gradient of its output.
//
// A prologue runs once per block of pixels, from the tensor into scratch memory that stays in cache, from
// which the products read. Fused into a product, it would run again for every tap or tile that reads a pixel.
#pragma once

#include "epilogue.h"

namespace dcgan::DCGAN_ISA {

DCGAN_INLINE vec leaky(vec x, vec slope) {
    return select(x < 0.0f, apply_slope(x, slope), x);
}

// Returns act'(…)·dy, computed from the saved output y. At the kink it is the left derivative, as in aten.
template <int ACT>
DCGAN_INLINE vec derivative(vec dy, vec y, vec slope) {
    if constexpr (ACT == DCGAN_RELU) return select(y <= 0.0f, vec{}, dy);
    if constexpr (ACT == DCGAN_LEAKY_RELU) return select(y > 0.0f, dy, dy * slope);
    if constexpr (ACT == DCGAN_TANH) return dy * (1.0f - y * y);
    if constexpr (ACT == DCGAN_SIGMOID) return dy * (y * (1.0f - y));
    return dy;
}

// Calls f(pixel, c, count) for every vector of channels of pixels [begin, end).
template <class F>
DCGAN_INLINE void each_vector(long channels, long begin, long end, const F& f) {
    for (long pixel = begin; pixel < end; ++pixel) {
        long c = 0;
        for (; c + LANES <= channels; c += LANES) f(pixel, c, LANES);
        if (c < channels) f(pixel, c, channels - c);
    }
}

template <int ACT>
inline void fill_gradient(const Source& source, long begin, long end, float* to) {
    const Source s = source;
    const vec slope = splat(s.slope);
    each_vector(s.channels, begin, end, [&](long pixel, long c, long count) {
        const long at = pixel * s.channels + c;
        vec du = load(s.t + at, count);
        if constexpr (ACT != DCGAN_NONE) du = derivative<ACT>(du, load(s.y + at, count), slope);
        if (s.scale != nullptr) du *= load(s.scale + c, count);
        store(to + at - begin * s.channels, du, count);
    });
}

// Materializes the prologue's result for pixels [begin, end), contiguously at `to`.
inline void fill(const Source& source, long begin, long end, float* to) {
    const Source s = source;  // a local copy, which the stores cannot alias
    const vec slope = splat(s.slope);
    const auto affine = [&](const float* t, long at, long c, long count) {
        return (load(t + at, count) - load(s.center + c, count)) * load(s.scale + c, count) +
               load(s.shift + c, count);
    };
    const long base = begin * s.channels;
    switch (s.prologue) {
        case Prologue::NONE:
            std::memcpy(to, s.t + base, static_cast<size_t>((end - begin) * s.channels) * sizeof(float));
            return;
        case Prologue::AFFINE:
            return each_vector(s.channels, begin, end, [&](long pixel, long c, long count) {
                const long at = pixel * s.channels + c;
                store(to + at - base, leaky(affine(s.t, at, c, count), slope), count);
            });
        case Prologue::ACTIVATION:
            return each_vector(s.channels, begin, end, [&](long pixel, long c, long count) {
                const long at = pixel * s.channels + c;
                store(to + at - base, leaky(load(s.t + at, count), slope), count);
            });
        case Prologue::STATISTICS:
            return each_vector(s.channels, begin, end, [&](long pixel, long c, long count) {
                const long at = pixel * s.channels + c;
                store(to + at - base, load(s.t + at, count) + affine(s.y, at, c, count), count);
            });
        case Prologue::GRADIENT:
            switch (s.act) {
                case DCGAN_RELU:
                    return fill_gradient<DCGAN_RELU>(s, begin, end, to);
                case DCGAN_LEAKY_RELU:
                    return fill_gradient<DCGAN_LEAKY_RELU>(s, begin, end, to);
                case DCGAN_TANH:
                    return fill_gradient<DCGAN_TANH>(s, begin, end, to);
                case DCGAN_SIGMOID:
                    return fill_gradient<DCGAN_SIGMOID>(s, begin, end, to);
                default:
                    return fill_gradient<DCGAN_NONE>(s, begin, end, to);
            }
    }
}

}  // namespace dcgan::DCGAN_ISA
