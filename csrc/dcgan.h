// The C ABI of the native engine: DCGAN's convolutions on a CPU, inference and training, float32.
//
//     y = act((conv(x, weight) + bias[c] - mean[c])·scale[c]/√(variance[c] + epsilon) + shift[c])
//
// (a BatchNorm in eval mode is that; without one, mean and variance are null)
// for the convolutions and transposed convolutions of kernel 4, stride 2, padding 1, and for the layers on a
// 1×1 map (kernel k, padding 0, where input or output is one pixel), which are matrix products. A chain of
// such layers runs in one call, over blocks of images, so that what is between two layers is small and is
// reused.
//
// Maps are NHWC: channels next to each other, other strides free. The first layer's input, where it has few
// channels (DCGAN_NARROW of a convolution), and the last layer's output, where it has few
// (DCGAN_NARROW of a transposed one), may have any strides.
//
// Every function that can fail returns 0 or a negative DCGAN_E..., and dcgan_error() then says what was
// wrong, on the calling thread. Calls from several threads at once are independent.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

enum { DCGAN_ABI = 3 };

enum dcgan_algorithm {
    DCGAN_DENSE = 0,   // a matrix product: a layer on a 1×1 map
    DCGAN_DIRECT = 1,  // polyphase implicit GEMM: 2×2 taps for each output parity (16 taps for a convolution)
    DCGAN_F2 = 2,      // the same 2×2 convolutions by Winograd F(2×2, 2×2): 9 products for 16
    DCGAN_F4 = 3,      // by Winograd F(4×4, 2×2): 25 products for 64
    DCGAN_NARROW = 4,  // few channels on one side (1 or 3): all taps of a pixel are one panel of a GEMM
};

enum dcgan_activation {
    DCGAN_NONE = 0,
    DCGAN_RELU = 1,
    DCGAN_LEAKY_RELU = 2,
    DCGAN_TANH = 3,
    DCGAN_SIGMOID = 4,
};

enum {
    DCGAN_EARGUMENT = -1,  // an argument is out of its range, or a pointer is null
    DCGAN_EMEMORY = -2,    // no memory for the workspace
    DCGAN_EISA = -3,       // this machine, or this build, lacks the instruction set
};

typedef struct {
    int32_t transposed;  // 0: convolution, 1: transposed convolution
    int32_t algorithm;   // enum dcgan_algorithm
    int32_t c_in, c_out;
    int32_t height, width;  // of the layer's input
    int32_t kernel, stride, padding;
    int32_t act;            // enum dcgan_activation
    float slope;            // of leaky_relu
    float epsilon;          // added to variance
    const float* weights;   // packed by dcgan_pack for this algorithm and instruction set
    const float* bias;      // [c_out], or null for 0
    const float* scale;     // [c_out], or null for 1
    const float* shift;     // [c_out], or null for 0
    const float* mean;      // [c_out], or null for 0 and 1: only both or neither
    const float* variance;  // [c_out]
} dcgan_layer;

typedef struct {
    const float* data;
    int64_t strides[4];  // of [N, C, H, W], in floats
} dcgan_tensor;

int dcgan_abi(void);
const char* dcgan_error(void);

// The instruction sets of this build that this machine runs, best first, as one string: "avx2 portable".
const char* dcgan_isas(void);
// Those of this build, whether this machine runs them or not.
const char* dcgan_built(void);
// The one in use; dcgan_use_isa(name) makes another, and packed weights of the one before invalid.
const char* dcgan_isa(void);
int dcgan_use_isa(const char* name);

// Whether the layer's geometry and algorithm go together: 0, or an error that says why not.
int dcgan_supports(const dcgan_layer* layer);
// Floats that the layer's weights take, packed; negative for an error.
int64_t dcgan_packed_size(const dcgan_layer* layer);
// Packs weight ([C_out, C_in, k, k], or [C_in, C_out, k, k] if transposed; strides in floats).
int dcgan_pack(const dcgan_layer* layer, const float* weight, const int64_t strides[4], float* packed,
               int threads);

// The most threads that later calls of this thread run on, whatever `threads` says: that decides how their
// work is cut, and so the order of sums. 0 for no limit.
int dcgan_limit_threads(int most);

// --- training ---
//
// One layer, forward and backward; maps are contiguous NHWC.
//
//     x̂ = in_act((x - center[c])·scale[c] + shift[c])     prologue; without the three, x̂ = in_act(x)
//     u = conv(x̂, weight)                                 the zero padding pads x̂, not x
//     statistics: y = u;  mean[c], variance[c] (biased) of u over all pixels
//     otherwise:  y = out_act(u·out_scale[c] + out_shift[c])
//
//     du = dy + dmean[c]/M + 2·dvariance[c]/M·(y - mean[c])     with statistics, M pixels of y
//          dy·out_act'(y)·out_scale[c]                          otherwise
//     dx̂ = adjoint_conv(du, weight);  g = dx̂·in_act'
//     dx = g·scale[c];  dscale[c] = Σ g·(x - center[c]);  dshift[c] = Σ g;  dcenter = -scale·dshift
//     dweight = wgrad(x̂, du)
//     e = dy·out_act'(y);  dout_shift[c] = Σ e;  dout_scale[c] = Σ e·u    without statistics
//
// Nothing is packed beforehand: weights are transformed in the call, since in training each version of them
// is used a few times only.
typedef struct {
    int32_t transposed;  // of the layer, whichever of its three products is asked for
    int32_t algorithm;   // enum dcgan_algorithm of that product
    int32_t c_in, c_out;
    int32_t height, width;  // of x
    int32_t kernel, stride, padding;
    int32_t in_act;   // none, relu or leaky_relu
    int32_t out_act;  // none with statistics
    int32_t statistics;
    float slope;                            // of either leaky_relu
    const float *center, *scale, *shift;    // [c_in], all or none
    const float *out_scale, *out_shift;     // [c_out], or null for 1 and 0; not with statistics
    const float *mean, *dmean, *dvariance;  // [c_out], of a backward with statistics; null for 0
} dcgan_op;

// Whether the layer and the algorithm of that product go together: 0, or an error that says why not.
enum dcgan_product { DCGAN_FPROP = 0, DCGAN_DGRAD = 1, DCGAN_WGRAD = 2 };
int dcgan_op_supports(const dcgan_op* op, int product);

// weight and dweight: [C_out, C_in, k, k], or [C_in, C_out, k, k] if transposed; strides in floats.
// mean and variance: [c_out], written where op->statistics.
int dcgan_fprop(const dcgan_op* op, int64_t images, const float* x, const float* weight,
                const int64_t strides[4], float* y, float* mean, float* variance, int threads);
// y: the forward's, where statistics or out_act tell the gradient from it. x: the forward's, where in_act or
// the prologue is. dcenter, dscale, dshift: [c_in], or all null.
int dcgan_dgrad(const dcgan_op* op, int64_t images, const float* dy, const float* y, const float* weight,
                const int64_t strides[4], const float* x, float* dx, float* dcenter, float* dscale,
                float* dshift, int threads);
// dout_scale: [c_out], or null; weight, in its strides, is looked at where it is wanted only.
int dcgan_wgrad(const dcgan_op* op, int64_t images, const float* x, const float* dy, const float* y,
                float* dweight, const int64_t strides[4], const float* weight,
                const int64_t weight_strides[4], float* dout_scale, int threads);
// dout_shift: [c_out].
int dcgan_shift_gradient(const dcgan_op* op, int64_t images, const float* dy, const float* y,
                         float* dout_shift, int threads);

// --- inference ---
//
// Runs the chain on `images` images. In a forked child it runs on one thread, whatever `threads` says.
int dcgan_run(const dcgan_layer* layers, int count, int64_t images, const dcgan_tensor* x,
              const dcgan_tensor* y, int threads);
// Bytes of workspace that dcgan_run takes for this: no more for 1,000 images than for one block of them.
int64_t dcgan_workspace(const dcgan_layer* layers, int count, int64_t images, int threads);
// Gives the calling thread's workspace back to the system.
void dcgan_release(void);

// Memory as it is now and a copy of it from before.
typedef struct {
    const void *now, *before;
    int64_t bytes;
} dcgan_pair;

// 1 if a pair differs, else 0. Of each pair `lines` lines of 64 bytes are compared, at random places that are
// others at every call, or all of a pair that is no larger: changes to a share f of a pair's lines are missed
// with probability (1 - f)^lines.
int dcgan_differ(const dcgan_pair* pairs, int count, int lines);

// Multiply-adds a second that `threads` threads reach with every operand in a register: the roof of any
// kernel that does a convolution's arithmetic directly.
double dcgan_peak(int threads, double seconds);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
