// Float vectors with the vector extensions of GCC and Clang: one source, compiled once per instruction set.
//
// DCGAN_LANES is the number of floats in a register and DCGAN_ISA the namespace of this build; setup.py
// defines both on the command line, with the flags of the instruction set. Neither this file nor any file
// that includes it may use templates of the standard library: the linker keeps one copy of an inline
// function, possibly one compiled for an instruction set that this machine does not support.
#pragma once

#include <cstdint>
#include <cstring>

namespace dcgan::DCGAN_ISA {

constexpr long LANES = DCGAN_LANES;

using vec = float __attribute__((vector_size(DCGAN_LANES * 4)));
using ivec = int32_t __attribute__((vector_size(DCGAN_LANES * 4)));
using unaligned_vec = float __attribute__((vector_size(DCGAN_LANES * 4), aligned(4), may_alias));

#define DCGAN_INLINE inline __attribute__((always_inline))

DCGAN_INLINE vec load(const float* p) {
    return *reinterpret_cast<const unaligned_vec*>(p);
}
DCGAN_INLINE void store(float* p, vec v) {
    *reinterpret_cast<unaligned_vec*>(p) = v;
}
DCGAN_INLINE vec splat(float x) {
    return x - vec{};
}

// Loads or stores the first `count` floats of a vector without accessing memory beyond them. Lanes that are
// not loaded are zero.
DCGAN_INLINE vec load(const float* p, long count) {
    if (count >= LANES) return load(p);
    vec v{};
    std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
    return v;
}
DCGAN_INLINE void store(float* p, vec v, long count) {
    if (count >= LANES) return store(p, v);
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

// Interleaves the lanes of the low (high) halves of a and b.
DCGAN_INLINE vec interleave_low(vec a, vec b) {
#if DCGAN_LANES == 4
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#elif DCGAN_LANES == 8
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
}
DCGAN_INLINE vec interleave_high(vec a, vec b) {
#if DCGAN_LANES == 4
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif DCGAN_LANES == 8
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

// Transposes a LANES×LANES matrix by log2(LANES) perfect shuffles.
DCGAN_INLINE void transpose(vec (&rows)[LANES]) {
    for (long step = 1; step < LANES; step *= 2) {
        vec next[LANES];
#pragma GCC unroll 8
        for (long i = 0; i < LANES / 2; ++i) {
            next[2 * i] = interleave_low(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = interleave_high(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (long i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

DCGAN_INLINE vec select(ivec mask, vec yes, vec no) {
    return reinterpret_cast<vec>((mask & reinterpret_cast<ivec>(yes)) | (~mask & reinterpret_cast<ivec>(no)));
}

}  // namespace dcgan::DCGAN_ISA
