// Helpers that all tests share: assertions, tensors that detect out-of-bounds reads and writes, layers with
// their weights, and the naive convolution that is the reference. op_case.h has those of fprop, dgrad and
// wgrad.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../dcgan.h"

// Prints the message, which describes the case, and ends the tests unless `ok`.
[[gnu::format(printf, 2, 3)]] void require(bool ok, const char* format, ...);

// Requires that a call was rejected with this code and an error message in which `names` occurs.
void expect_rejected(const char* function, long long code, const char* names, int expected = DCGAN_EARGUMENT);

// Runs `body` in a forked child, which must succeed before an alarm kills it.
void in_child(const char* when, const std::function<void()>& body);

// Reports in one line that a group of tests has passed.
[[gnu::format(printf, 1, 2)]] void report(const char* format, ...);

// The instruction sets that this machine supports. Tests select each of them with dcgan_use_isa.
const std::vector<std::string>& isas();
std::vector<std::string> split(const char* list);

using Random = std::minstd_rand;
// Uniform in [-limit, limit).
float uniform(Random& random, float limit = 1.0f);
using Floats = std::unique_ptr<float[]>;
// Uniform in [middle - limit, middle + limit).
Floats random_around(Random& random, long count, float middle, float limit = 0.5f);

enum class Layout {
    NHWC,       // contiguous, channels innermost
    NCHW,       // contiguous, as PyTorch has it by default
    PADDED,     // channels innermost, with gaps between pixels, rows and images
    SCATTERED,  // no contiguous dimension: [W, C, N, H] with a stride of two floats
};
const char* name(Layout layout);

// A [N, C, H, W] tensor whose heap block starts with its first element and ends with its last, so that
// AddressSanitizer detects every out-of-bounds access. Gaps between its elements hold NaN, which a stray read
// would propagate to the result.
struct Tensor {
    long size[4];
    int64_t strides[4];
    std::vector<float> guarded;  // see output()
    std::unique_ptr<float[]> exact;
    float* data;

    static Tensor input(Layout layout, long n, long c, long h, long w);
    static Tensor random(Random& random, Layout layout, long n, long c, long h, long w);
    // A tensor to be written, between guard floats. Elements, gaps and guards all hold one recognizable NaN.
    static Tensor output(Layout layout, long n, long c, long h, long w);

    long count() const { return size[0] * size[1] * size[2] * size[3]; }
    float& at(long n, long c, long h, long w) const {
        return data[n * strides[0] + c * strides[1] + h * strides[2] + w * strides[3]];
    }
    dcgan_tensor view(long first_image = 0) const {
        return {data + first_image * strides[0], {strides[0], strides[1], strides[2], strides[3]}};
    }
    // For output(): whether nothing but the elements was written, and whether nothing was written at all.
    bool guards_intact() const;
    bool untouched() const;
    // The elements, or their bits, in the order [N, H, W, C].
    std::vector<float> values() const;
    std::vector<uint32_t> bits() const;

 private:
    static Tensor make(Layout layout, long n, long c, long h, long w);
    long span() const;
};

// --- geometry of a dcgan_layer or a dcgan_op

struct Size {
    long height, width;
};

template <class L>
Size out_size(const L& l) {
    const auto side = [&](long in) {
        return l.transposed ? (in - 1) * l.stride - 2 * l.padding + l.kernel
                            : (in + 2 * l.padding - l.kernel) / l.stride + 1;
    };
    return {side(l.height), side(l.width)};
}

// Calls f(tap, small pixel, large pixel) for all pixels that are connected, by the definition: tap k connects
// pixel p of the small map with pixel p·stride - padding + k of the large one. A convolution maps large to
// small, a transposed convolution small to large.
template <class L, class F>
void each_connection(const L& l, long images, const F& f) {
    const Size in{l.height, l.width}, out = out_size(l);
    const Size small = l.transposed ? in : out, large = l.transposed ? out : in;
    for (long n = 0; n < images; ++n)
        for (long p = 0; p < small.height; ++p)
            for (long q = 0; q < small.width; ++q)
                for (long tap = 0; tap < l.kernel * l.kernel; ++tap) {
                    const long r = p * l.stride - l.padding + tap / l.kernel;
                    const long c = q * l.stride - l.padding + tap % l.kernel;
                    if (r < 0 || r >= large.height || c < 0 || c >= large.width) continue;
                    f(tap, (n * small.height + p) * small.width + q,
                      (n * large.height + r) * large.width + c);
                }
}

// --- layers

constexpr float SLOPE = 0.2f;

// A dcgan_layer that owns its parameters.
struct Layer {
    dcgan_layer l{};
    Tensor weight;
    Floats packed, bias, scale, shift, mean, variance;

    // The weights are about 1/√K, so that sums are near 1 and activations do not saturate.
    Layer(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
          long height, long width, Layout weights = Layout::NCHW);

    Layer& affine(Random& random, bool with_scale, bool with_shift, bool with_statistics = false,
                  bool with_bias = false);
    Layer& activation(int act);
    // Packs the weights for the instruction set in use.
    Layer& pack(int algorithm, int threads = 1);

    long out_height() const { return out_size(l).height; }
    long out_width() const { return out_size(l).width; }
};

const char* algorithm_name(int algorithm);
const char* activation_name(int act);
std::string describe(const dcgan_layer& l);

// How many runs there were, and the largest error of each algorithm.
struct Totals {
    long runs = 0;
    double worst[5] = {};

    void add(int algorithm, double error);
    // As "6 runs; largest error: dense 1.0e-07, F4 2.0e-07".
    std::string summary() const;
};

// The reference result of the layer before its activation, in float64 and by the definition, as [N, H, W, C].
std::vector<double> reference(const Layer& layer, const Tensor& x);
double activated(int act, double x);

// Runs a chain or a single layer. Requires that it succeeds and writes only the elements of y.
void run(const dcgan_layer* layers, int count, const Tensor& x, const Tensor& y, int threads);
void run(const Layer& layer, const Tensor& x, const Tensor& y, int threads);
