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

// What an epilogue of training does besides writing y: sums over pixels, by unit of work, to be merged in the
// order of the units.
struct Gather {
    enum Kind {
        STATISTICS,  // y raw, and its statistics
        ADJOINT,     // y is dx = g·scale[c] with g = sum·leaky'((x - center[c])·scale[c] + shift[c])
    } kind;
    const float* x;  // of ADJOINT: where y's data has dx, this has x
    const float *center, *scale, *shift;
    float slope;
    // [unit][ROWS][width]. STATISTICS: pixels, a pivot near the mean, Σ(y - pivot), Σ(y - pivot)²;
    // ADJOINT: Σ g, Σ g·(x - center).
    static constexpr long ROWS = 4;
    float* sums;
    long width;  // c_out, rounded up to whole cache lines
};

// One layer of a chain with where it reads and writes.
struct Job {
    const dcgan_layer* layer;
    View x, y;
    long images;
    const Gather* gather = nullptr;  // null: the layer's own epilogue
    // Rows and columns of a transposed convolution's output beyond twice its input's: one where it is the
    // adjoint of a convolution whose map is odd.
    long extra_height = 0, extra_width = 0;
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

// The most threads that the calling thread's parallel regions run on, however many their work is cut for, so
// that results are the same: dcgan_limit_threads. 0 for no limit.
extern thread_local int thread_limit;

inline int running(long threads) {
    return static_cast<int>(thread_limit > 0 && thread_limit < threads ? thread_limit : threads);
}

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
    // Units of work of the job: rows of gather->sums.
    long (*units)(const Job& job, int threads);
    void (*fill)(const Source& source, long begin, long end, float* to);
    // F(4×4) whose weights are too many to be kept transformed: job.x is ignored, x is read from the source.
    long (*streamed_memory)(const Job& job, const Source& x, int threads);
    long (*streamed_units)(const Job& job, int threads);
    void (*streamed)(const Job& job, const Source& x, const float* weight, const int64_t strides[4],
                     int threads, float* memory);
    long (*gradient_memory)(const GradientJob& job, int threads);
    void (*gradient)(const GradientJob& job, int threads, float* memory);
    // Σ e over `pixels`, of e without a scale.
    long (*shift_memory)(const Source& e, long pixels);
    void (*shift_gradient)(const Source& e, long pixels, int threads, float* memory, float* dshift);
    // Σ e·u from the weights' gradient by e; dweight becomes that by e·scale, the layer's.
    void (*scale_gradient)(const dcgan_layer& layer, const float* weight, const int64_t strides[4],
                           float* dweight, const int64_t dweight_strides[4], int threads, float* dscale);
    // Multiply-adds a second on `threads` threads, with every operand in a register.
    double (*peak)(int threads, double seconds);
};

extern const Engine engine_portable;
extern const Engine engine_avx2;
extern const Engine engine_avx512;

}  // namespace dcgan
