// What a layer does with a sum: act(sum·scale[c] + shift[c]), and the activations themselves.
#pragma once

#include "engine.h"
#include "vec.h"

namespace dcgan::DCGAN_ISA {

// e^x for x ≤ 0, to 1e-7 of it; e^-87 (2e-38) below -87. NaN stays NaN.
DCGAN_INLINE vec exp_of_negative(vec x) {
    const vec low = splat(-87.0f);
    const vec clamped = choose(x < low, low, x);
    // x = n·ln 2 + r with |r| ≤ ln 2 / 2, ln 2 in two parts so that r is exact. Adding and taking
    // away 1.5·2^23 rounds to an integer, which the sum also holds in its low bits.
    const vec magic = splat(12582912.0f);
    const vec shifted = clamped * splat(1.44269504088896341f) + magic;
    const vec n = shifted - magic;
    const vec r = (clamped - n * splat(0.693359375f)) + n * splat(2.12194440054690583e-4f);
    vec p = splat(1.0f / 5040);  // Taylor: the next term is 5e-9
    p = p * r + splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    const ivec exponent = reinterpret_cast<ivec>(shifted) << 23;  // of the low bits: n, modulo 2^9
    const vec result = reinterpret_cast<vec>(reinterpret_cast<ivec>(p) + exponent);
    return choose(x != x, x, result);
}

DCGAN_INLINE vec absolute(vec x) {
    return reinterpret_cast<vec>(reinterpret_cast<ivec>(x) & 0x7fffffff);
}

DCGAN_INLINE vec sigmoid(vec x) {
    const vec e = exp_of_negative(-absolute(x));
    const vec small = e / (1.0f + e);  // σ(-|x|); σ(|x|) = 1 - σ(-|x|) loses nothing
    return choose(x < 0.0f, small, 1.0f / (1.0f + e));
}

DCGAN_INLINE vec tanh(vec x) {
    const vec size = absolute(x);
    // Where tanh is small, 1 - 2e/(1+e) cancels: Taylor there, whose next term is below 2e-8 of the sum.
    const vec s = x * x;
    vec p = splat(-1382.0f / 155925);
    p = p * s + splat(62.0f / 2835);
    p = p * s - splat(17.0f / 315);
    p = p * s + splat(2.0f / 15);
    p = p * s - splat(1.0f / 3);
    const vec near = size + size * s * p;
    const vec e = exp_of_negative(-2.0f * size);
    const vec far = (1.0f - e) / (1.0f + e);
    const ivec sign = reinterpret_cast<ivec>(x) & static_cast<int32_t>(0x80000000);
    const ivec magnitude = reinterpret_cast<ivec>(choose(size < splat(0.35f), near, far));
    return reinterpret_cast<vec>(magnitude | sign);
}

// NaN passes every activation, as in eager: the comparisons are false for it.
template <int ACT>
DCGAN_INLINE vec activate(vec x, vec slope) {
    if constexpr (ACT == DCGAN_RELU) return choose(x < 0.0f, vec{}, x);
    if constexpr (ACT == DCGAN_LEAKY_RELU) return choose(x < 0.0f, x * slope, x);
    if constexpr (ACT == DCGAN_TANH) return tanh(x);
    if constexpr (ACT == DCGAN_SIGMOID) return sigmoid(x);
    return x;
}

// The epilogue of LANES channels.
template <int ACT>
struct Affine {
    vec scale, shift, slope;
    DCGAN_INLINE vec operator()(vec sum) const { return activate<ACT>(sum * scale + shift, slope); }
};

template <int ACT>
struct Epilogue {
    const float *scale, *shift;
    float slope;

    DCGAN_INLINE explicit Epilogue(const dcgan_layer& l) : scale(l.scale), shift(l.shift), slope(l.slope) {}

    // For the channels from c on, of which `count` exist.
    DCGAN_INLINE Affine<ACT> at(long c, long count = LANES) const {
        return {scale == nullptr ? splat(1.0f) : load(scale + c, count),
                shift == nullptr ? vec{} : load(shift + c, count), splat(slope)};
    }
    // A pixel's channels [begin, end), from sums (which may be read to the end of a vector) to y.
    DCGAN_INLINE void row(const float* sums, float* y, long begin, long end) const {
        for (long c = begin; c < end; c += LANES) {
            const long count = end - c < LANES ? end - c : LANES;
            store(y + c, at(c, count)(load(sums + c - begin)), count);
        }
    }
};

// Calls f with the layer's Epilogue, its activation known at compile time.
template <class F>
DCGAN_INLINE void with_epilogue(const dcgan_layer& l, const F& f) {
    switch (l.act) {
        case DCGAN_RELU:
            return f(Epilogue<DCGAN_RELU>(l));
        case DCGAN_LEAKY_RELU:
            return f(Epilogue<DCGAN_LEAKY_RELU>(l));
        case DCGAN_TANH:
            return f(Epilogue<DCGAN_TANH>(l));
        case DCGAN_SIGMOID:
            return f(Epilogue<DCGAN_SIGMOID>(l));
        default:
            return f(Epilogue<DCGAN_NONE>(l));
    }
}

}  // namespace dcgan::DCGAN_ISA
