#include "op_case.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

Tensor vector_of(long count) {
    return Tensor::output(Layout::NHWC, 1, count, 1, 1);
}

double error(const std::vector<float>& got, const Sums& expected) {
    double difference = 0, values = 0, squares = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        difference += (got[i] - expected.values[i]) * (got[i] - expected.values[i]);
        values += expected.values[i] * expected.values[i];
        squares += expected.squares[i];
    }
    // A ReLU may clear everything.
    return difference == 0 ? 0 : std::sqrt(difference / std::max(values, squares));
}

OpCase::OpCase(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
               Size map, long count, Layout weights)
    : images(count), in(map) {
    op.transposed = transposed;
    op.c_in = static_cast<int32_t>(c_in);
    op.c_out = static_cast<int32_t>(c_out);
    op.height = static_cast<int32_t>(in.height);
    op.width = static_cast<int32_t>(in.width);
    op.kernel = kernel;
    op.stride = stride;
    op.padding = padding;
    op.slope = SLOPE;
    out = out_size(op);
    weight = Tensor::random(random, weights, small_channels(), large_channels(), kernel, kernel);
    x = Tensor::random(random, Layout::NHWC, count, c_in, in.height, in.width);
    dy = Tensor::random(random, Layout::NHWC, count, c_out, out.height, out.width);
    y = Tensor::random(random, Layout::NHWC, count, c_out, out.height, out.width);
}

OpCase& OpCase::with_prologue(Random& random, int act, bool affine) {
    op.in_act = act;
    if (affine) {
        center = random_around(random, op.c_in, 0.0f);
        scale = random_around(random, op.c_in, 1.0f);
        shift = random_around(random, op.c_in, 0.0f);
        op.center = center.get();
        op.scale = scale.get();
        op.shift = shift.get();
    }
    // Move values away from the kink, where rounding could change the derivative.
    for (long i = 0; i < x.count(); ++i)
        while (std::abs(pre_activation(i)) < 1e-5) x.data[i] += 0.01f;
    return *this;
}

OpCase& OpCase::with_epilogue(Random& random, int act, bool with_scale, bool with_shift) {
    op.out_act = act;
    if (with_scale) out_scale = random_around(random, op.c_out, 1.0f);
    if (with_shift) out_shift = random_around(random, op.c_out, 0.0f);
    op.out_scale = out_scale.get();
    op.out_shift = out_shift.get();
    return *this;
}

OpCase& OpCase::with_statistics(Random& random) {
    op.statistics = 1;
    const float pixels = static_cast<float>(images * out.height * out.width);
    mean = random_around(random, op.c_out, 0.0f);
    dmean = random_around(random, op.c_out, 0.0f);
    dvariance = random_around(random, op.c_out, 0.0f);
    // Large enough to matter, however many pixels they are divided by.
    for (long c = 0; c < op.c_out; ++c) {
        dmean[static_cast<size_t>(c)] *= pixels;
        dvariance[static_cast<size_t>(c)] *= pixels;
    }
    op.mean = mean.get();
    op.dmean = dmean.get();
    op.dvariance = dvariance.get();
    return *this;
}

OpCase& OpCase::randomize(Random& random) {
    const auto pick = [&](unsigned long choices) { return static_cast<int>(random() % choices); };
    with_prologue(random, pick(3), pick(2) > 0);
    if (pick(2)) return with_statistics(random);
    const bool with_scale = pick(2) > 0, with_shift = pick(2) > 0;
    return with_epilogue(random, pick(DCGAN_SIGMOID + 1), with_scale, with_shift);
}

double OpCase::pre_activation(long i) const {
    const long c = i % op.c_in;
    const double value = x.data[i];
    return op.scale ? (value - op.center[c]) * op.scale[c] + op.shift[c] : value;
}

std::vector<double> OpCase::x_hat() const {
    std::vector<double> all;
    for (long i = 0; i < x.count(); ++i) all.push_back(activated(op.in_act, pre_activation(i)));
    return all;
}

std::vector<double> OpCase::du() const {
    std::vector<double> all;
    const double pixels = static_cast<double>(images * out.height * out.width);
    for (long i = 0; i < dy.count(); ++i) {
        const long c = i % op.c_out;
        const double at = y.data[i];
        double value = dy.data[i];
        if (op.statistics) {
            if (op.dmean) value += op.dmean[c] / pixels;
            if (op.dvariance) value += 2 * op.dvariance[c] / pixels * (at - op.mean[c]);
        } else {
            if (op.out_act == DCGAN_RELU) value *= at > 0;
            if (op.out_act == DCGAN_LEAKY_RELU) value *= at > 0 ? 1.0 : static_cast<double>(SLOPE);
            if (op.out_act == DCGAN_TANH) value *= 1 - at * at;
            if (op.out_act == DCGAN_SIGMOID) value *= at * (1 - at);
            if (op.out_scale) value *= op.out_scale[c];
        }
        all.push_back(value);
    }
    return all;
}

std::string OpCase::describe(const std::string& product, int threads) const {
    char text[250];
    std::snprintf(
        text, sizeof text, "%s, %s %s k%d s%d p%d %d→%d on %d×%d, %ld images, %s%s, %s%s%s, %d threads",
        product.c_str(), algorithm_name(op.algorithm), op.transposed ? "up" : "down", op.kernel, op.stride,
        op.padding, op.c_in, op.c_out, op.height, op.width, images, activation_name(op.in_act),
        op.scale ? " of affine" : "", op.statistics ? "statistics" : activation_name(op.out_act),
        op.out_scale ? ", scaled" : "", op.out_shift ? ", shifted" : "", threads);
    return text;
}

OpCase example(Random& random, bool transposed) {
    OpCase c(random, transposed, 4, 2, 1, 9, 6, transposed ? Size{5, 4} : Size{7, 10}, 3);
    c.with_prologue(random, DCGAN_LEAKY_RELU, true).with_statistics(random);
    c.op.algorithm = DCGAN_F4;
    return c;
}
