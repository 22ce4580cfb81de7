#include "training.h"

#include <algorithm>
#include <cmath>

#include "chain.h"
#include "products.h"
#include "workspace.h"

namespace dcgan {
namespace {

// More than any machine has: the sizes of maps are clamped to it, so that sums of sizes do not overflow.
constexpr int64_t MAX_FLOATS = int64_t{1} << 56;

}  // namespace

dcgan_op Training::op(int i, int algorithm, int group) const {
    const dcgan_train_layer& l = layers_[i];
    dcgan_op op{};
    op.transposed = l.transposed;
    op.algorithm = algorithm;
    op.c_in = l.c_in;
    op.c_out = l.c_out;
    op.height = l.height;
    op.width = l.width;
    op.kernel = l.kernel;
    op.stride = l.stride;
    op.padding = l.padding;
    op.out_act = l.normalized ? DCGAN_NONE : l.act;
    op.out_shift = l.normalized ? nullptr : l.beta;
    op.statistics = l.normalized;
    op.slope = slope_;
    if (i > 0 && layers_[i - 1].normalized) {
        op.in_act = layers_[i - 1].act;
        op.center = stats(i - 1, 0, group);
        op.scale = stats(i - 1, 2, group);
        op.shift = stats(i - 1, 3, group);
    }
    return op;
}

int Training::lowest() const {
    int i = 0;
    while (i < count_ && layers_[i].dweight == nullptr && layers_[i].dgamma == nullptr &&
           layers_[i].dbeta == nullptr)
        ++i;
    return i;
}

size_t Training::channels() const {
    size_t most = 0;
    for (int i = 0; i < count_; ++i) most = std::max(most, whole_lines(layers_[i].c_out));
    return most;
}

int64_t Training::map_floats(int i) const {
    if (i < count_) return int64_t{layers_[i].c_in} * layers_[i].height * layers_[i].width;
    const dcgan_layer last = layer_of(op(i - 1, layers_[i - 1].fprop));
    return last.c_out * out_side(last, last.height) * out_side(last, last.width);
}

long Training::pixels(int i) const {
    return static_cast<long>(std::min(map_floats(i + 1), MAX_FLOATS / images_) * images_ / layers_[i].c_out);
}

float* Training::stats(int i, int row, int group) const {
    return layers_[i].stats + (int64_t{row} * groups_ + group) * layers_[i].c_out;
}

// --- forward ---------------------------------------------------------------------------------------------

size_t Training::forward_bytes() const {
    size_t products = 0;
    for (int i = 0; i < count_; ++i) {
        const dcgan_op fprop = op(i, layers_[i].fprop);
        const Prologue prologue = source_of_x(fprop, nullptr).prologue;
        products = std::max(products, Product(engine_, fprop, false, prologue, images_, threads_).bytes());
    }
    return 2 * channels() * sizeof(double) + products;
}

void Training::forward(const float* x, float* memory) const {
    double* const moments = reinterpret_cast<double*>(memory);
    float* const product_memory = memory + 2 * channels() * DOUBLE;
    for (int i = 0; i < count_; ++i) {
        const dcgan_train_layer& l = layers_[i];
        const int64_t in = images_ * map_floats(i), out = images_ * map_floats(i + 1);
        for (int group = 0; group < groups_; ++group) {
            const dcgan_op fprop = op(i, l.fprop, group);
            const Source source = source_of_x(fprop, (i == 0 ? x : layers_[i - 1].y) + group * in);
            Product(engine_, fprop, false, source.prologue, images_, threads_)
                .run({source, nullptr, l.y + group * out, l.normalized ? moments : nullptr}, l.weight,
                     l.weight_strides, product_memory, group > 0);
            if (l.normalized) store_statistics(i, group, moments);
        }
    }
}

void Training::store_statistics(int i, int group, const double* moments) const {
    const dcgan_train_layer& l = layers_[i];
    float *const mean = stats(i, 0, group), *const variance = stats(i, 1, group);
    float *const scale = stats(i, 2, group), *const shift = stats(i, 3, group);
    for (int c = 0; c < l.c_out; ++c) {
        const double gamma = l.gamma == nullptr ? 1.0 : l.gamma[c];
        mean[c] = static_cast<float>(moments[c]);
        variance[c] = static_cast<float>(moments[l.c_out + c]);
        scale[c] = static_cast<float>(gamma / std::sqrt(moments[l.c_out + c] + l.epsilon));
        shift[c] = l.beta == nullptr ? 0.0f : l.beta[c];
    }
}

// --- backward --------------------------------------------------------------------------------------------

// The gradient of layer i's input is in map i % 2.
Training::Parts Training::parts(bool needs_dx) const {
    const size_t rows = 2 * static_cast<size_t>(groups_) * channels();
    Parts p{rows * DOUBLE, rows, {0, 0}};
    for (int i = 1; i < count_; ++i)
        if (has_dgrad(i, needs_dx)) {
            const int64_t images = images_ * groups_;
            const int64_t floats = std::min(map_floats(i), MAX_FLOATS / images) * images;
            p.maps[i % 2] = std::max(p.maps[i % 2], whole_lines(floats));
        }
    return p;
}

Prologue Training::prologue_of_du(int i) const {
    if (layers_[i].normalized) return Prologue::STATISTICS;
    return layers_[i].act == DCGAN_NONE ? Prologue::NONE : Prologue::GRADIENT;
}

// dy: the gradient of all images of y, in a normalized layer times the scale.
Source Training::source_of_du(int i, int group, const float* dy, const float* vectors) const {
    const dcgan_train_layer& l = layers_[i];
    const int64_t offset = group * images_ * map_floats(i + 1);
    Source s{prologue_of_du(i), l.c_out, dy + offset, nullptr, nullptr, nullptr, nullptr, slope_, l.act};
    if (s.prologue != Prologue::NONE) s.y = l.y + offset;
    if (l.normalized) {
        s.center = stats(i, 0, group);
        s.scale = vectors + 2 * static_cast<size_t>(group) * channels();
        s.shift = s.scale + channels();
    }
    return s;
}

size_t Training::backward_bytes(bool needs_dx) const {
    size_t products = 0;
    for (int i = 0; i < count_; ++i) {
        if (has_dgrad(i, needs_dx)) {
            const dcgan_op dgrad = op(i, layers_[i].dgrad);
            const Product product(engine_, dgrad, true, prologue_of_du(i), images_, threads_);
            products = std::max(products, product.bytes());
        }
        Source du{};
        du.channels = layers_[i].c_out;
        du.prologue = prologue_of_du(i);
        if (has_bias_gradient(i))
            products =
                std::max(products, static_cast<size_t>(engine_.shift_memory(du, pixels(i))) * sizeof(float));
        if (has_wgrad(i)) {
            const dcgan_op wgrad = op(i, layers_[i].wgrad);
            const dcgan_layer geometry = layer_of(wgrad);
            const GradientJob job{
                &geometry, source_of_x(wgrad, nullptr), du, static_cast<long>(images_), nullptr, nullptr};
            products = std::max(products,
                                static_cast<size_t>(engine_.gradient_memory(job, threads_)) * sizeof(float));
        }
    }
    return parts(needs_dx).total() * sizeof(float) + products;
}

void Training::backward(const float* x, const float* dy, float* dx, float* memory) const {
    const bool needs_dx = dx != nullptr;
    const Parts p = parts(needs_dx);
    double* const sums = reinterpret_cast<double*>(memory);
    float* const vectors = memory + p.sums;
    float* const maps[2] = {vectors + p.vectors, vectors + p.vectors + p.maps[0]};
    float* const product_memory = memory + p.total();
    for (int i = count_ - 1; i >= 0; --i) {
        const dcgan_train_layer& l = layers_[i];
        const int64_t in = images_ * map_floats(i);
        const float* const from = i + 1 < count_ ? maps[(i + 1) % 2] : dy;
        const float* const input = i > 0 ? layers_[i - 1].y : x;
        // This layer's du has no vectors, so that their memory is free.
        if (has_bias_gradient(i)) bias_gradient(i, from, vectors, product_memory);
        for (int group = 0; group < groups_ && has_dgrad(i, needs_dx); ++group) {
            const dcgan_op dgrad = op(i, l.dgrad, group);
            const Source du = source_of_du(i, group, from, vectors);
            double* const of_group = sums + 2 * group * (i > 0 ? layers_[i - 1].c_out : 0);
            Product(engine_, dgrad, true, du.prologue, images_, threads_)
                .run({du, input + group * in, (i > 0 ? maps[i % 2] : dx) + group * in,
                      dgrad.scale == nullptr ? nullptr : of_group},
                     l.weight, l.weight_strides, product_memory, group > 0);
        }
        for (int group = 0; group < groups_ && has_wgrad(i); ++group) {
            const dcgan_op wgrad = op(i, l.wgrad, group);
            const dcgan_layer geometry = layer_of(wgrad);
            const Source du = source_of_du(i, group, from, vectors);
            const Source source = source_of_x(wgrad, input + group * in);
            engine_.gradient(
                {&geometry, source, du, static_cast<long>(images_), l.dweight, l.dweight_strides, group > 0},
                threads_, product_memory);
        }
        // Not before wgrad, which reads the vectors of this layer's du.
        if (i > 0 && has_dgrad(i, needs_dx) && layers_[i - 1].normalized)
            reduce_gradients(i - 1, sums, vectors);
    }
}

void Training::bias_gradient(int i, const float* dy, float* of_group, float* memory) const {
    const dcgan_train_layer& l = layers_[i];
    std::fill_n(l.dbeta, l.c_out, 0.0f);
    for (int group = 0; group < groups_; ++group) {
        engine_.shift_gradient(source_of_du(i, group, dy, nullptr), pixels(i), threads_, memory, of_group);
        for (int c = 0; c < l.c_out; ++c) l.dbeta[c] += of_group[c];
    }
}

// From the sums of dgrad, writes dgamma, dbeta, and the scale and shift of du's prologue:
//     du = dx + ((y - mean)·scale + shift),   dx = g·stats.scale
void Training::reduce_gradients(int i, const double* sums, float* vectors) const {
    const dcgan_train_layer& l = layers_[i];
    const double count = static_cast<double>(images_) * static_cast<double>(map_floats(i + 1) / l.c_out);
    const size_t row = channels();
    for (int c = 0; c < l.c_out; ++c) {
        float dgamma = 0, dbeta = 0;  // rounded per group, as the gradients of that many calls would be
        for (int group = 0; group < groups_; ++group) {
            const double* const of_group = sums + 2 * group * l.c_out;
            const double inverse = 1.0 / std::sqrt(stats(i, 1, group)[c] + l.epsilon);
            const double dshift = of_group[c], dscale = of_group[l.c_out + c] * inverse;
            const double scale = stats(i, 2, group)[c];
            dgamma += static_cast<float>(dscale);
            dbeta += static_cast<float>(dshift);
            float* const of_du = vectors + 2 * static_cast<size_t>(group) * row + c;
            of_du[0] = static_cast<float>(-scale * inverse * dscale / count);
            of_du[row] = static_cast<float>(-scale * dshift / count);
        }
        if (l.dgamma != nullptr) l.dgamma[c] = dgamma;
        if (l.dbeta != nullptr) l.dbeta[c] = dbeta;
    }
}

// --- running statistics ----------------------------------------------------------------------------------

void track(const dcgan_running& norm, int groups) {
    for (int group = 0; group < groups; ++group) {
        *norm.batches += 1;
        const double weight = norm.momentum >= 0 ? norm.momentum : 1.0 / static_cast<double>(*norm.batches);
        const float* const mean = norm.stats + int64_t{group} * norm.channels;
        const float* const variance = mean + int64_t{groups} * norm.channels;
        const double unbiased = norm.count / (norm.count - 1);
        for (int c = 0; c < norm.channels; ++c) {
            norm.mean[c] = static_cast<float>((1 - weight) * norm.mean[c] + weight * mean[c]);
            norm.variance[c] =
                static_cast<float>((1 - weight) * norm.variance[c] + weight * unbiased * variance[c]);
        }
    }
}

}  // namespace dcgan
