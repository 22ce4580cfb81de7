// What the tests of fprop, dgrad and wgrad share: an operator with its parameters and maps, and sums that
// know the size that they would have without cancellation.
#pragma once

#include "support.h"

// As in test_layers.cpp. Each result is a single product of x̂, du or the weights; x̂ and du are exact up to a
// few roundings.
constexpr double PRODUCT_BOUND = 5e-6;

// Sums, and the sums of the squares of their terms. The latter give the size that the sums would have without
// cancellation, relative to which rounding errors are measured where a sum cancels.
struct Sums {
    std::vector<double> values, squares;

    explicit Sums(long count) : values(static_cast<size_t>(count)), squares(static_cast<size_t>(count)) {}
    void add(long i, double term) {
        values[static_cast<size_t>(i)] += term;
        squares[static_cast<size_t>(i)] += term * term;
    }
};

// A vector to be written, between guard floats.
Tensor vector_of(long count);

// The relative L2 error of these values; NaN where one is NaN.
double error(const std::vector<float>& got, const Sums& expected);

// A dcgan_op that owns its parameters and maps.
struct OpCase {
    dcgan_op op{};
    long images;
    Size in, out;
    Floats center, scale, shift, out_scale, out_shift, mean, dmean, dvariance;
    Tensor weight{}, x{}, dy{}, y{};

    OpCase(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
           Size map, long count, Layout weights = Layout::NCHW);

    OpCase& with_prologue(Random& random, int act, bool affine);
    OpCase& with_epilogue(Random& random, int act, bool with_scale, bool with_shift = false);
    OpCase& with_statistics(Random& random);
    // Chooses the prologue and epilogue at random.
    OpCase& randomize(Random& random);

    bool has_prologue() const { return op.scale != nullptr || op.in_act != DCGAN_NONE; }
    // Whether the gradient depends on y.
    bool reads_y() const { return op.statistics ? op.dmean || op.dvariance : op.out_act != DCGAN_NONE; }
    // The channels of the small and of the large map, which are the weights' outer dimensions.
    long small_channels() const { return op.transposed ? op.c_in : op.c_out; }
    long large_channels() const { return op.transposed ? op.c_out : op.c_in; }

    double pre_activation(long i) const;  // of element i of x
    // x̂ and du as [pixel][channel].
    std::vector<double> x_hat() const;
    std::vector<double> du() const;

    std::string describe(const std::string& product, int threads) const;
};

// A layer of odd sizes with a prologue and statistics, by F(4×4).
OpCase example(Random& random, bool transposed);
