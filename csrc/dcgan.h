// The C ABI of the native engine: DCGAN's convolutions on a CPU, for inference and training, in float32.
//
//     y = act((conv(x, weight) + bias[c] - mean[c])·scale[c]/√(variance[c] + epsilon) + shift[c])
//
// This is a convolution followed by a BatchNorm in eval mode; without a BatchNorm, mean and variance are
// null. Supported are convolutions and transposed convolutions with kernel 4, stride 2 and padding 1, and
// layers whose input or output is a 1×1 map (kernel k, padding 0), which are matrix products. A chain of such
// layers runs in one call, block of images by block of images, so that activations stay in cache.
//
// Maps are NHWC: channels are contiguous, the other strides are arbitrary. All strides are arbitrary for the
// first layer's input if that layer is a DCGAN_NARROW convolution, and for the last layer's output if that
// layer is a DCGAN_NARROW transposed convolution.
//
// Every function that can fail returns a negative DCGAN_E... code on failure; dcgan_error() then describes
// the error to the calling thread. Functions may be called from several threads concurrently.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

enum { DCGAN_ABI = 5 };

enum dcgan_algorithm {
    DCGAN_DENSE = 0,   // matrix product, for layers on a 1×1 map
    DCGAN_DIRECT = 1,  // polyphase implicit GEMM: 2×2 taps for each output parity (16 taps for a convolution)
    DCGAN_F2 = 2,      // the same 2×2 convolutions by Winograd F(2×2, 2×2): 9 products instead of 16
    DCGAN_F4 = 3,      // by Winograd F(4×4, 2×2): 25 products instead of 64
    DCGAN_NARROW = 4,  // few channels on one side (1 or 3): all taps of a pixel form one panel of a GEMM
};

enum dcgan_activation {
    DCGAN_NONE = 0,
    DCGAN_RELU = 1,
    DCGAN_LEAKY_RELU = 2,
    DCGAN_TANH = 3,
    DCGAN_SIGMOID = 4,
};

enum {
    DCGAN_EARGUMENT = -1,  // an argument is out of range, or a pointer is null
    DCGAN_EMEMORY = -2,    // the workspace cannot be allocated
    DCGAN_EISA = -3,       // this machine or this build does not support the instruction set
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
    const float* mean;      // [c_out], or null for 0 (and variance 1); give both or neither
    const float* variance;  // [c_out]
} dcgan_layer;

typedef struct {
    const float* data;
    int64_t strides[4];  // of [N, C, H, W], in floats
} dcgan_tensor;

int dcgan_abi(void);
const char* dcgan_error(void);

// The instruction sets of this build that this machine supports, best first, in one string: "avx2 portable".
const char* dcgan_isas(void);
// All instruction sets of this build, including those that this machine does not support.
const char* dcgan_built(void);
// The instruction set in use. Selecting another with dcgan_use_isa(name) invalidates all packed weights.
const char* dcgan_isa(void);
int dcgan_use_isa(const char* name);

// Returns 0 if the algorithm supports the layer's geometry, otherwise an error that says why not.
int dcgan_supports(const dcgan_layer* layer);
// The size of the layer's packed weights in floats, or a negative error code.
int64_t dcgan_packed_size(const dcgan_layer* layer);
// Packs weight ([C_out, C_in, k, k], or [C_in, C_out, k, k] if transposed; strides in floats).
int dcgan_pack(const dcgan_layer* layer, const float* weight, const int64_t strides[4], float* packed,
               int threads);

// Limits the number of threads that later calls from this thread run on, 0 for no limit. Their `threads`
// argument still decides how the work is partitioned, hence the order of summation.
int dcgan_limit_threads(int limit);

// --- training, one layer ---
//
// The forward and backward pass of one layer; maps are contiguous NHWC.
//
//     x̂ = in_act((x - center[c])·scale[c] + shift[c])     prologue; if all three are null, x̂ = in_act(x)
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
// There is no prepacking: weights are packed inside the call, since in training each version of the weights
// is used only a few times.
typedef struct {
    int32_t transposed;  // of the layer, for all three of its products
    int32_t algorithm;   // enum dcgan_algorithm of that product
    int32_t c_in, c_out;
    int32_t height, width;  // of x
    int32_t kernel, stride, padding;
    int32_t in_act;   // none, relu or leaky_relu
    int32_t out_act;  // none with statistics
    int32_t statistics;
    float slope;                            // of leaky_relu, as in_act and as out_act
    const float *center, *scale, *shift;    // [c_in]; give all or none
    const float *out_scale, *out_shift;     // [c_out], or null for 1 and 0; null with statistics
    const float *mean, *dmean, *dvariance;  // [c_out], for the backward pass with statistics; null for 0
} dcgan_op;

// Returns 0 if the algorithm supports this product of the layer, otherwise an error that says why not.
enum dcgan_product { DCGAN_FPROP = 0, DCGAN_DGRAD = 1, DCGAN_WGRAD = 2 };
int dcgan_op_supports(const dcgan_op* op, int product);

// weight and dweight: [C_out, C_in, k, k], or [C_in, C_out, k, k] if transposed; strides in floats.
// mean and variance: [c_out], written if op->statistics is set.
int dcgan_fprop(const dcgan_op* op, int64_t images, const float* x, const float* weight,
                const int64_t strides[4], float* y, float* mean, float* variance, int threads);
// y: the saved output of the forward pass, needed with gradients of the statistics or with out_act. x: the
// saved input, needed with in_act or center, scale, shift. dcenter, dscale, dshift: [c_in], or all null.
int dcgan_dgrad(const dcgan_op* op, int64_t images, const float* dy, const float* y, const float* weight,
                const int64_t strides[4], const float* x, float* dx, float* dcenter, float* dscale,
                float* dshift, int threads);
// dout_scale: [c_out], or null. weight and weight_strides are read only if dout_scale is not null.
int dcgan_wgrad(const dcgan_op* op, int64_t images, const float* x, const float* dy, const float* y,
                float* dweight, const int64_t strides[4], const float* weight,
                const int64_t weight_strides[4], float* dout_scale, int threads);
// dout_shift: [c_out].
int dcgan_shift_gradient(const dcgan_op* op, int64_t images, const float* dy, const float* y,
                         float* dout_shift, int threads);

// --- training, a network ---
//
// The forward and the backward pass of a chain of layers, each in one call; maps are contiguous NHWC.
//
//     u = conv(x̂, weight)                                        x̂: x of the chain, or x̂' of the layer before
//     normalized:  y = u;  mean[c], variance[c] (biased) of u    a BatchNorm with batch statistics
//                  scale = gamma/√(variance + epsilon);  shift = beta
//                  x̂' = act((y - mean)·scale + shift)
//     otherwise:   y = x̂' = act(u + beta)                        a bias; the last layer is not normalized
//
//     dx̂ = adjoint_conv(du, weight);  dweight = wgrad(x̂, du);  g = dx̂'·act'
//     normalized:  dbeta = Σ g;  dgamma = Σ g·(y - mean)/√(variance + epsilon)
//                  du = scale·(g - dbeta/M - (y - mean)·dgamma/√(variance + epsilon)/M),  M pixels of y
//     otherwise:   du = g;  dbeta = Σ du
//
// Each of `groups` equal parts of the images has its own statistics: the results are those of as many calls,
// and the gradients of parameters are the sums of theirs. The products are those of the functions above, with
// the same bits; the arithmetic on vectors is in double.
typedef struct {
    int32_t transposed;           // of the layer, for all three of its products
    int32_t fprop, dgrad, wgrad;  // enum dcgan_algorithm of each product
    int32_t c_in, c_out;
    int32_t height, width;  // of the layer's input
    int32_t kernel, stride, padding;
    int32_t act;                // enum dcgan_activation; none, relu or leaky_relu in all layers but the last
    int32_t normalized;         // 0 or 1; 0 in the last layer
    double epsilon;             // added to variance
    const float* weight;        // [C_out, C_in, k, k], or [C_in, C_out, k, k] if transposed
    int64_t weight_strides[4];  // in floats
    const float *gamma, *beta;  // [c_out], or null for 1 and 0; gamma is null unless normalized
    // Results of the forward pass, which the backward pass reads.
    float* y;      // contiguous; in the last layer, the backward pass reads it only if act is not none
    float* stats;  // [4][groups][c_out]: mean, variance, scale and shift; ignored unless normalized
    // Results of the backward pass; null where they are not needed.
    float* dweight;
    int64_t dweight_strides[4];
    float *dgamma, *dbeta;  // [c_out]; dgamma is null unless normalized
} dcgan_train_layer;

// slope: of every leaky ReLU. groups: divides images.
int dcgan_train_forward(const dcgan_train_layer* layers, int count, int64_t images, int groups, float slope,
                        const float* x, int threads);
// dx: null if it is not needed. Products that no result depends on are not computed.
int dcgan_train_backward(const dcgan_train_layer* layers, int count, int64_t images, int groups, float slope,
                         const float* x, const float* dy, float* dx, int threads);

// --- inference ---
//
// Runs the chain on `images` images. In a forked child process it runs on one thread, whatever `threads` is.
int dcgan_run(const dcgan_layer* layers, int count, int64_t images, const dcgan_tensor* x,
              const dcgan_tensor* y, int threads);
// The workspace of dcgan_run in bytes. It is bounded by one block of images, however many images there are.
int64_t dcgan_workspace(const dcgan_layer* layers, int count, int64_t images, int threads);
// Frees the calling thread's workspace.
void dcgan_release(void);

// A region of memory and an earlier copy of it.
typedef struct {
    const void *now, *before;
    int64_t bytes;
} dcgan_pair;

// --- loss and running statistics ---
//
// logits: `groups` groups of `size`, each with a target; stride in floats.
//     loss[i] = mean(softplus(l) - targets[i]·l),  probability[i] = mean(sigmoid(l))
int dcgan_bce(const float* logits, int64_t stride, int64_t size, int groups, const double* targets,
              float* loss, float* probability);
// dlogits is contiguous. dloss and dprobability: [groups], or null for 0.
int dcgan_bce_backward(const float* logits, int64_t stride, int64_t size, int groups, const double* targets,
                       const float* dloss, const float* dprobability, float* dlogits);

// The running statistics of a BatchNorm, updated for one group after the other as nn.BatchNorm2d does.
typedef struct {
    float *mean, *variance;  // [channels]
    int64_t* batches;        // the number of batches seen
    const float* stats;      // [2][groups][channels]: mean and biased variance of each group
    int32_t channels;
    double momentum;  // negative for the cumulative average
    double count;     // values per channel and group, at least 2
} dcgan_running;
int dcgan_track(const dcgan_running* norms, int count, int groups);

// Returns 1 if a pair differs, otherwise 0. Compares `lines` random 64-byte lines of each pair, different
// ones in every call, or the whole pair if it has no more lines than that. A change to a fraction f of a
// pair's lines is missed with probability (1 - f)^lines.
int dcgan_differ(const dcgan_pair* pairs, int count, int lines);

// Multiply-adds per second on `threads` threads with all operands in registers: the peak for any kernel that
// does the arithmetic of the direct convolution.
double dcgan_peak(int threads, double seconds);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
