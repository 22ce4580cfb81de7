#include "chain.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>

#include "workspace.h"

namespace dcgan {
namespace {

// Packed weights larger than this do not stay in L3: every block reads them from memory.
constexpr int64_t HEAVY_BYTES = 16 << 20;
// Target sizes of a block's activations between groups, and within a group.
constexpr int64_t OUTER_BYTES = 16 << 20, INNER_BYTES = 6 << 20;
constexpr int64_t FLOAT = sizeof(float);

int64_t out_floats(const dcgan_layer& l) {
    return l.c_out * out_side(l, l.height) * out_side(l, l.width);
}

// Images per block, so that blocks of `floats` per image fit into `bytes` and are nearly equal in size.
int64_t block_of(int64_t images, int64_t floats, int64_t bytes) {
    if (floats == 0 || images == 0) return images;
    const int64_t fit = std::max<int64_t>(1, bytes / FLOAT / floats);
    const int64_t blocks = (images + fit - 1) / fit;
    return (images + blocks - 1) / blocks;
}

View channels_last(float* data, const dcgan_layer& l) {
    const int64_t height = out_side(l, l.height), width = out_side(l, l.width);
    return {data, l.c_out * height * width, 1, l.c_out * width, l.c_out};
}

View view(const dcgan_tensor& t) {
    return {const_cast<float*>(t.data), t.strides[0], t.strides[1], t.strides[2], t.strides[3]};
}

View from_image(View v, int64_t image) {
    v.data += image * v.n;
    return v;
}

// Folds the layer's bias and BatchNorm into a scale and a shift, written to `affine` (2·size floats).
dcgan_layer fold(const dcgan_layer& l, float* affine, size_t size) {
    if (l.bias == nullptr && l.mean == nullptr) return l;
    float *const scale = affine, *const shift = affine + size;
    for (int c = 0; c < l.c_out; ++c) {
        scale[c] = l.scale == nullptr ? 1.0f : l.scale[c];
        float offset = l.bias == nullptr ? 0.0f : l.bias[c];
        if (l.mean != nullptr) {
            scale[c] /= std::sqrt(l.variance[c] + l.epsilon);
            offset -= l.mean[c];
        }
        shift[c] = (l.shift == nullptr ? 0.0f : l.shift[c]) + offset * scale[c];
    }
    dcgan_layer result = l;
    result.bias = nullptr;
    if (l.scale != nullptr || l.mean != nullptr) result.scale = scale;
    result.shift = shift;
    return result;
}

}  // namespace

int64_t out_side(const dcgan_layer& l, int64_t in) {
    if (l.transposed) return (in - 1) * l.stride - 2 * l.padding + l.kernel;
    return (in + 2 * l.padding - l.kernel) / l.stride + 1;
}

Chain::Chain(const Engine& engine, const dcgan_layer* layers, int count, int64_t images, int threads)
    : engine_(engine), layers_(layers), count_(count), threads_(threads), images_(images) {
    bool alone = true;
    for (int i = 0; i < count; ++i) {
        const bool heavy = engine.packed_size(layers[i]) * FLOAT > HEAVY_BYTES;
        if (heavy || alone)
            groups_[group_count_++] = {i, i + 1, 0, false, {0, 0}};
        else
            groups_[group_count_ - 1].end = i + 1;
        alone = heavy;
    }

    int64_t outer[2] = {0, 0};
    for (int g = 0; g + 1 < group_count_; ++g)
        outer[g % 2] = std::max(outer[g % 2], out_floats(layers[groups_[g].end - 1]));
    block_ = block_of(images, outer[0] + outer[1], OUTER_BYTES);
    for (int i = 0; i < 2; ++i) outer_[i] = whole_lines(outer[i] * block_);

    for (int g = 0; g < group_count_; ++g) {
        Group& group = groups_[g];
        int64_t inner[2] = {0, 0};
        for (int i = group.begin; i + 1 < group.end; ++i)
            inner[i % 2] = std::max(inner[i % 2], out_floats(layers[i]));
        const int64_t floats = inner[0] + inner[1];
        group.block = block_of(block_, floats, INNER_BYTES / threads);
        const int64_t blocks = group.block == 0 ? 0 : (block_ + group.block - 1) / group.block;
        const int64_t rounds = (blocks + threads - 1) / threads;
        group.per_thread = threads > 1 && blocks >= threads && 4 * blocks >= 3 * rounds * threads;
        if (!group.per_thread) group.block = block_of(block_, floats, INNER_BYTES);
        for (int i = 0; i < 2; ++i) group.inner[i] = whole_lines(inner[i] * group.block);
        inner_ = std::max(
            inner_, (group.inner[0] + group.inner[1]) * static_cast<size_t>(group.per_thread ? threads : 1));
        for (int i = group.begin; i < group.end; ++i) {
            const Job job{layers + i, {}, {}, static_cast<long>(group.block)};
            scratch_ =
                std::max(scratch_, whole_lines(engine.scratch_size(job, group.per_thread ? 1 : threads)));
            affine_ = std::max(affine_, whole_lines(layers[i].c_out));
        }
    }
}

size_t Chain::bytes() const {
    const size_t layers = static_cast<size_t>(count_), threads = static_cast<size_t>(threads_);
    return (scratch_ * threads + outer_[0] + outer_[1] + inner_ + 2 * affine_ * layers) * sizeof(float);
}

void Chain::run(const dcgan_tensor& x, const dcgan_tensor& y, float* memory) const {
    float* const scratch = memory;
    float* const after = scratch + scratch_ * static_cast<size_t>(threads_);
    float* const outer[2] = {after, after + outer_[0]};
    float* const inner = outer[1] + outer_[1];
    float* const affine = inner + inner_;
    dcgan_layer folded[MAX_LAYERS];
    for (int i = 0; i < count_; ++i)
        folded[i] = fold(layers_[i], affine + 2 * affine_ * static_cast<size_t>(i), affine_);

    for (int64_t begin = 0; begin < images_; begin += block_) {
        View from = from_image(view(x), begin);
        for (int g = 0; g < group_count_; ++g) {
            const Group& group = groups_[g];
            const View to = g + 1 < group_count_ ? channels_last(outer[g % 2], layers_[group.end - 1])
                                                 : from_image(view(y), begin);
            run(group, from, to, std::min(block_, images_ - begin), inner, scratch, folded);
            from = to;
        }
    }
}

void Chain::run(const Group& group, const View& x, const View& y, int64_t images, float* inner,
                float* scratch, const dcgan_layer* folded) const {
    const int64_t blocks = (images + group.block - 1) / group.block;
    const auto block = [&](int64_t index, int threads, int thread) {
        const int64_t begin = index * group.block;
        run_block(group, from_image(x, begin), from_image(y, begin), std::min(group.block, images - begin),
                  threads, inner + static_cast<size_t>(thread) * (group.inner[0] + group.inner[1]),
                  scratch + static_cast<size_t>(thread) * scratch_, folded);
    };
#ifdef _OPENMP
    if (group.per_thread) {
#pragma omp parallel for schedule(dynamic) num_threads(effective_threads(threads_))
        for (int64_t i = 0; i < blocks; ++i) block(i, 1, omp_get_thread_num());
        return;
    }
#endif
    for (int64_t i = 0; i < blocks; ++i) block(i, threads_, 0);
}

void Chain::run_block(const Group& group, View x, View y, int64_t images, int threads, float* inner,
                      float* scratch, const dcgan_layer* folded) const {
    for (int i = group.begin; i < group.end; ++i) {
        const View to =
            i + 1 < group.end ? channels_last(i % 2 ? inner + group.inner[0] : inner, folded[i]) : y;
        engine_.run(Job{folded + i, x, to, static_cast<long>(images)}, threads, scratch,
                    static_cast<long>(scratch_));
        x = to;
    }
}

}  // namespace dcgan
