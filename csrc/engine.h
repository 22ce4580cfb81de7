// What abi.cpp hands to the engine of an instruction set. Plain data: every build sees the same layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dcgan.h"

namespace dcgan {

// A [N, C, H, W] tensor by its strides, in floats.
struct View {
    float* data;
    long n, c, h, w;
};

// One layer of a chain with where it reads and writes.
struct Job {
    const dcgan_layer* layer;
    View x, y;
    long images;
};

// What a prologue makes of a map: t is the tensor itself, y the forward's output, [pixels][channels] both.
enum class Prologue {
    NONE,        // t
    AFFINE,      // x̂ = leaky((t - center[c])·scale[c] + shift[c])
    ACTIVATION,  // x̂ = leaky(t)
    GRADIENT,    // du = t·act'(y)·scale[c], act' told from y; scale may be null
    STATISTICS,  // du = t + ((y - center[c])·scale[c] + shift[c])
};

// A map that a product reads: a tensor [pixels][channels], or what a prologue makes of it.
struct Source {
    Prologue prologue;
    long channels;
    const float* t;
    const float* y;  // of GRADIENT (null where act is DCGAN_NONE) and STATISTICS
    const float *center, *scale, *shift;
    float slope;  // leaky(t) = t < 0 ? slope·t : t: 0 is ReLU, 1 nothing at all
    int act;      // of GRADIENT: enum dcgan_activation
};

// The gradient of a layer's weights, from x̂ [images, height, width, c_in] and du [images, …, c_out].
struct GradientJob {
    const dcgan_layer* layer;  // its geometry and algorithm (dense, direct, F4, narrow)
    Source x, du;
    long images;
    float* dweight;  // written, not added to
    const int64_t* strides;
};

// The entry points of one instruction set's build of engine.cpp.
struct Engine {
    const char* name;
    long panel;  // columns of a packed panel of weights
    // Floats that `layer` takes packed, and the packing itself, from weights of the given strides.
    long (*packed_size)(const dcgan_layer& layer);
    void (*pack)(const dcgan_layer& layer, const float* weight, const int64_t strides[4], float* packed,
                 int threads);
    // Floats of scratch a thread needs for the job, and the job itself.
    long (*scratch_size)(const Job& job, int threads);
    void (*run)(const Job& job, int threads, float* scratch, long scratch_stride);
    // Multiply-adds a second on `threads` threads, with every operand in a register.
    double (*peak)(int threads, double seconds);
};

extern const Engine engine_portable;
extern const Engine engine_avx2;
extern const Engine engine_avx512;

}  // namespace dcgan
