// Vectors of float as GCC and Clang have them: one source, compiled once per instruction set.
//
// DCGAN_LANES is the number of floats in a register and DCGAN_ISA the namespace of this build; setup.py gives
// both on the command line, with the flags of the instruction set. Nothing here or in what includes it uses a
// template of the standard library: the linker keeps one copy of an inline function, and it could be the one
// compiled for a machine that this is not.
#pragma once

#include <cstdint>
#include <cstring>

namespace dcgan::DCGAN_ISA {

constexpr long LANES = DCGAN_LANES;

using vec = float __attribute__((vector_size(DCGAN_LANES * 4)));
using ivec = int32_t __attribute__((vector_size(DCGAN_LANES * 4)));
using loose = float __attribute__((vector_size(DCGAN_LANES * 4), aligned(4), may_alias));

#define DCGAN_INLINE inline __attribute__((always_inline))

DCGAN_INLINE vec load(const float* p) {
    return *reinterpret_cast<const loose*>(p);
}
DCGAN_INLINE void store(float* p, vec v) {
    *reinterpret_cast<loose*>(p) = v;
}
DCGAN_INLINE vec splat(float x) {
    return x - vec{};
}

// The first `count` floats of a vector; the rest is zero, and memory beyond them is not touched.
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

DCGAN_INLINE vec choose(ivec mask, vec yes, vec no) {
    return reinterpret_cast<vec>((mask & reinterpret_cast<ivec>(yes)) | (~mask & reinterpret_cast<ivec>(no)));
}

}  // namespace dcgan::DCGAN_ISA
