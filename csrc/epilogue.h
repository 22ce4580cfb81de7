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

// x·slope of a leaky ReLU; of a ReLU 0, even where x is not finite.
DCGAN_INLINE vec scaled(vec x, vec slope) {
    return choose(slope == 0.0f, vec{}, x * slope);
}

// The epilogue of LANES channels.
template <int ACT>
struct Affine {
    vec scale, shift, slope;
    DCGAN_INLINE vec operator()(vec sum) const { return activate<ACT>(sum * scale + shift, slope); }
    DCGAN_INLINE void put(vec sum, float* to, long count) { store(to, (*this)(sum), count); }
    DCGAN_INLINE void done() {}
};

// Channels [begin, end) of `count` pixels, the i-th from sums + i·stride (which may be read to the end of a
// vector) to pixel(i), null for one that y does not have. A few pixels at a time: the channels' constants and
// sums stay in registers, the pixels in L1.
template <class E, class P>
DCGAN_INLINE void put_pixels(const E& epilogue, const float* sums, long stride, long count, long begin,
                             long end, const P& pixel) {
    for (long first = 0; first < count; first += 8) {
        float* to[8];
        const long few = count - first < 8 ? count - first : 8;
        for (long i = 0; i < few; ++i) to[i] = pixel(first + i);
        for (long c = begin; c < end; c += LANES) {
            const long channels = end - c < LANES ? end - c : LANES;
            auto lanes = epilogue.at(c, channels);
            const float* from = sums + first * stride + c - begin;
            for (long i = 0; i < few; ++i, from += stride)
                if (to[i] != nullptr) lanes.put(load(from), to[i] + c, channels);
            lanes.done();
        }
    }
}

template <int ACT>
struct Epilogue {
    static constexpr bool GATHERS = false;
    const float *scale, *shift;
    float slope;

    DCGAN_INLINE explicit Epilogue(const Job& job)
        : scale(job.layer->scale), shift(job.layer->shift), slope(job.layer->slope) {}

    DCGAN_INLINE const Epilogue& unit(long) const { return *this; }
    // For the channels from c on, of which `count` exist.
    DCGAN_INLINE Affine<ACT> at(long c, long count = LANES) const {
        return {scale == nullptr ? splat(1.0f) : load(scale + c, count),
                shift == nullptr ? vec{} : load(shift + c, count), splat(slope)};
    }
};

// Statistics of what is written, about a pivot: the unit's first pixel, which is as near its mean as any.
// Sums of squares about zero would cancel where the mean is many standard deviations.
struct Statistics {
    struct Lanes {
        float* sums;
        long width;
        vec pixels, pivot, first, second;
        bool fresh;

        DCGAN_INLINE void put(vec sum, float* to, long count) {
            store(to, sum, count);
            if (fresh) pivot = sum;
            fresh = false;
            const vec d = sum - pivot;
            pixels += 1.0f;
            first += d;
            second += d * d;
        }
        DCGAN_INLINE void done() {
            store(sums, pixels);
            store(sums + width, pivot);
            store(sums + 2 * width, first);
            store(sums + 3 * width, second);
        }
    };

    static constexpr bool GATHERS = true;
    const Gather& gather;
    float* sums;

    DCGAN_INLINE explicit Statistics(const Job& job) : gather(*job.gather), sums(gather.sums) {}
    // Of one unit of work; its sums are zero to begin with.
    DCGAN_INLINE Statistics unit(long index) const {
        Statistics own = *this;
        own.sums += index * Gather::ROWS * gather.width;
        return own;
    }
    DCGAN_INLINE Lanes at(long c, long = LANES) const {
        float* const from = sums + c;
        const long width = gather.width;
        const vec pixels = load(from);
        return {from,
                width,
                pixels,
                load(from + width),
                load(from + 2 * width),
                load(from + 3 * width),
                pixels[0] == 0.0f};
    }
};

// The adjoint of a prologue: from the gradient of x̂ to those of x, scale and shift.
struct Adjoint {
    struct Lanes {
        float* sums;
        long width, offset;
        vec center, scale, shift, slope, first, second;

        DCGAN_INLINE void put(vec sum, float* to, long count) {
            const vec centered = load(to + offset, count) - center;
            const vec g = choose(centered * scale + shift <= 0.0f, scaled(sum, slope), sum);
            store(to, g * scale, count);
            first += g;
            second += g * centered;
        }
        DCGAN_INLINE void done() {
            store(sums, first);
            store(sums + width, second);
        }
    };

    static constexpr bool GATHERS = true;
    const Gather& gather;
    float* sums;
    long offset;  // from dx to x

    DCGAN_INLINE explicit Adjoint(const Job& job)
        : gather(*job.gather), sums(gather.sums), offset(gather.x - job.y.data) {}
    DCGAN_INLINE Adjoint unit(long index) const {
        Adjoint own = *this;
        own.sums += index * Gather::ROWS * gather.width;
        return own;
    }
    DCGAN_INLINE Lanes at(long c, long count = LANES) const {
        float* const from = sums + c;
        const bool affine = gather.scale != nullptr;
        return {from,
                gather.width,
                offset,
                affine ? load(gather.center + c, count) : vec{},
                affine ? load(gather.scale + c, count) : splat(1.0f),
                affine ? load(gather.shift + c, count) : vec{},
                splat(gather.slope),
                load(from),
                load(from + gather.width)};
    }
};

// Calls f with the job's epilogue, its kind known at compile time.
template <class F>
DCGAN_INLINE void with_epilogue(const Job& job, const F& f) {
    if (job.gather != nullptr)
        return job.gather->kind == Gather::STATISTICS ? f(Statistics(job)) : f(Adjoint(job));
    switch (job.layer->act) {
        case DCGAN_RELU:
            return f(Epilogue<DCGAN_RELU>(job));
        case DCGAN_LEAKY_RELU:
            return f(Epilogue<DCGAN_LEAKY_RELU>(job));
        case DCGAN_TANH:
            return f(Epilogue<DCGAN_TANH>(job));
        case DCGAN_SIGMOID:
            return f(Epilogue<DCGAN_SIGMOID>(job));
        default:
            return f(Epilogue<DCGAN_NONE>(job));
    }
}

}  // namespace dcgan::DCGAN_ISA
