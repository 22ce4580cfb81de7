// The interface between abi.cpp and the engines: plain data with the same layout in all builds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dcgan.h"

namespace dcgan {

// A [N, C, H, W] tensor with strides in floats.
struct View {
    float* data;
    long n, c, h, w;
};

// The reductions over pixels that a training epilogue does besides writing y. Each unit of work has its own
// partial sums, which are merged in the order of the units.
struct PartialSums {
    enum Kind {
        STATISTICS,  // y is the raw output, reduced to its statistics
        ADJOINT,     // y is dx = g·scale[c] with g = sum·leaky'((x - center[c])·scale[c] + shift[c])
    } kind;
    const float* x;  // ADJOINT: x in the layout of y, which holds dx
    const float *center, *scale, *shift;
    float slope;
    // [unit][ROWS][width]. STATISTICS: pixel count, a pivot near the mean, Σ(y - pivot), Σ(y - pivot)²;
    // ADJOINT: Σ g, Σ g·(x - center).
    static constexpr long ROWS = 4;
    float* sums;
    long width;  // c_out rounded up to whole cache lines
};

// One layer with its input and output.
struct Job {
    const dcgan_layer* layer;
    View x, y;
    long images;
    const PartialSums* partials = nullptr;  // null: the layer's inference epilogue
    // Rows and columns that a transposed convolution's output has beyond twice its input: 1 where it is the
    // adjoint of a convolution with an odd map.
    long extra_height = 0, extra_width = 0;
};

// The result of a prologue, from the tensor t and the saved output y, both [pixels][channels].
enum class Prologue {
    NONE,        // t
    AFFINE,      // x̂ = leaky((t - center[c])·scale[c] + shift[c])
    ACTIVATION,  // x̂ = leaky(t)
    GRADIENT,    // du = t·act'(y)·scale[c], act' computed from y; scale may be null
    STATISTICS,  // du = t + ((y - center[c])·scale[c] + shift[c])
};

// The input map of a product: a tensor [pixels][channels] and its prologue.
struct Source {
    Prologue prologue;
    long channels;
    const float* t;
    const float* y;  // for GRADIENT (null if act is DCGAN_NONE) and STATISTICS
    const float *center, *scale, *shift;
    float slope;  // leaky(t) = t < 0 ? slope·t : t; 0 is ReLU, 1 the identity
    int act;      // for GRADIENT: enum dcgan_activation
};

// The weight gradient of a layer, from x̂ [images, height, width, c_in] and du [images, …, c_out].
struct GradientJob {
    const dcgan_layer* layer;  // geometry and algorithm (dense, direct, F4, narrow)
    Source x, du;
    long images;
    float* dweight;
    const int64_t* strides;
    bool add = false;  // whether to add to dweight instead of overwriting it
};

// The limit set by dcgan_limit_threads on the threads of the calling thread's parallel regions; 0 for no
// limit. It does not change how the work is partitioned, so results are the same.
extern thread_local int thread_limit;

inline int effective_threads(long threads) {
    return static_cast<int>(thread_limit > 0 && thread_limit < threads ? thread_limit : threads);
}

// The entry points of one instruction set's build of engine.cpp.
struct Engine {
    const char* name;
    long panel;  // columns of a panel of packed weights
    // The size of the packed weights in floats, and the packing of weights with the given strides.
    long (*packed_size)(const dcgan_layer& layer);
    void (*pack)(const dcgan_layer& layer, const float* weight, const int64_t strides[4], float* packed,
                 int threads);
    // The scratch that each thread needs for the job in floats, and the job itself.
    long (*scratch_size)(const Job& job, int threads);
    void (*run)(const Job& job, int threads, float* scratch, long scratch_stride);
    // Units of work of the job, each with its rows in partials->sums.
    long (*units)(const Job& job, int threads);
    void (*fill)(const Source& source, long begin, long end, float* to);
    // F(4×4) for weights too large to be stored transformed. job.x is ignored: x is read from the source.
    long (*streamed_memory)(const Job& job, const Source& x, int threads);
    long (*streamed_units)(const Job& job, int threads);
    void (*streamed)(const Job& job, const Source& x, const float* weight, const int64_t strides[4],
                     int threads, float* memory);
    long (*gradient_memory)(const GradientJob& job, int threads);
    void (*gradient)(const GradientJob& job, int threads, float* memory);
    // Σ e over `pixels`; e has no scale.
    long (*shift_memory)(const Source& e, long pixels);
    void (*shift_gradient)(const Source& e, long pixels, int threads, float* memory, float* dshift);
    // Computes Σ e·u from the weight gradient by e, and scales dweight in place to the gradient by e·scale.
    void (*scale_gradient)(const dcgan_layer& layer, const float* weight, const int64_t strides[4],
                           float* dweight, const int64_t dweight_strides[4], int threads, float* dscale);
    // Multiply-adds per second on `threads` threads with all operands in registers.
    double (*peak)(int threads, double seconds);
};

extern const Engine engine_portable;
extern const Engine engine_avx2;
extern const Engine engine_avx512;

}  // namespace dcgan
