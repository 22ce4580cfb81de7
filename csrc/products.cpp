#include "products.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstring>

#include "chain.h"
#include "workspace.h"

namespace dcgan {
namespace {

// Transformed F(4×4) weights larger than this are streamed.
constexpr int64_t STREAMED_BYTES = 16 << 20;
// The maps of a block, over all threads, so that they stay in L3 from prologue to product.
constexpr int64_t BLOCK_BYTES = 4 << 20;
constexpr int64_t FLOAT = sizeof(float);
constexpr int64_t LINE = 16;  // floats of a cache line

int64_t pixels(int64_t height, int64_t width) {
    return height * width;
}

float negative_slope(int act, float slope) {
    return act == DCGAN_RELU ? 0.0f : act == DCGAN_LEAKY_RELU ? slope : 1.0f;
}

View nhwc(float* data, int64_t height, int64_t width, int64_t channels) {
    return {data, height * width * channels, 1, width * channels, channels};
}

}  // namespace

dcgan_layer layer_of(const dcgan_op& op) {
    dcgan_layer l{};
    l.transposed = op.transposed;
    l.algorithm = op.algorithm;
    l.c_in = op.c_in;
    l.c_out = op.c_out;
    l.height = op.height;
    l.width = op.width;
    l.kernel = op.kernel;
    l.stride = op.stride;
    l.padding = op.padding;
    l.act = op.out_act;
    l.slope = op.slope;
    l.scale = op.out_scale;
    l.shift = op.out_shift;
    return l;
}

Source source_of_x(const dcgan_op& op, const float* x) {
    Source s{Prologue::NONE,
             op.c_in,
             x,
             nullptr,
             op.center,
             op.scale,
             op.shift,
             negative_slope(op.in_act, op.slope),
             0};
    if (op.scale != nullptr)
        s.prologue = Prologue::AFFINE;
    else if (op.in_act != DCGAN_NONE)
        s.prologue = Prologue::ACTIVATION;
    return s;
}

Source source_of_du(const dcgan_op& op, int64_t images, const float* dy, const float* y, float* vectors) {
    Source s{Prologue::NONE, op.c_out, dy, y, nullptr, nullptr, nullptr, op.slope, op.out_act};
    if (op.statistics) {
        if (op.dmean == nullptr && op.dvariance == nullptr) return s;
        s.prologue = Prologue::STATISTICS;
        if (vectors == nullptr) return s;
        const dcgan_layer l = layer_of(op);
        const double count = static_cast<double>(images) *
                             static_cast<double>(pixels(out_side(l, l.height), out_side(l, l.width)));
        float *const center = vectors, *const scale = vectors + op.c_out, *const shift = scale + op.c_out;
        for (int c = 0; c < op.c_out; ++c) {
            center[c] = op.mean == nullptr ? 0.0f : op.mean[c];
            scale[c] = op.dvariance == nullptr ? 0.0f : static_cast<float>(2.0 * op.dvariance[c] / count);
            shift[c] = op.dmean == nullptr ? 0.0f : static_cast<float>(op.dmean[c] / count);
        }
        s.center = center;
        s.scale = scale;
        s.shift = shift;
    } else if (op.out_act != DCGAN_NONE || op.out_scale != nullptr) {
        s.prologue = Prologue::GRADIENT;
        s.scale = op.out_scale;
    }
    return s;
}

Product::Product(const Engine& engine, const dcgan_op& op, bool dgrad, Prologue prologue, int64_t images,
                 int threads)
    : engine_(engine),
      op_(op),
      dgrad_(dgrad),
      images_(images),
      threads_(threads),
      layer_(layer_of(op)),
      job_{&layer_, {}, {}, 0},
      has_prologue_(prologue != Prologue::NONE) {
    if (dgrad) {
        const int64_t height = out_side(layer_, op.height), width = out_side(layer_, op.width);
        layer_.transposed = !op.transposed;
        std::swap(layer_.c_in, layer_.c_out);
        layer_.height = static_cast<int32_t>(height);
        layer_.width = static_cast<int32_t>(width);
        layer_.act = DCGAN_NONE;
        layer_.scale = layer_.shift = nullptr;
        if (layer_.transposed && layer_.algorithm != DCGAN_DENSE) {
            job_.extra_height = op.height - 2 * height;
            job_.extra_width = op.width - 2 * width;
        }
    }
    const bool reduces = dgrad ? op.scale != nullptr || op.in_act != DCGAN_NONE : op.statistics != 0;
    const int64_t packed = engine.packed_size(layer_);
    streamed_ = layer_.algorithm == DCGAN_F4 && packed * FLOAT > STREAMED_BYTES;

    if (streamed_) {
        block_ = images;
        blocks_ = 1;
        job_.images = images;
        units_ = engine.streamed_units(job_, threads);
        Source source{};
        source.prologue = prologue;
        scratch_ = whole_lines(engine.streamed_memory(job_, source, threads));
    } else {
        const int64_t in = layer_.c_in * pixels(layer_.height, layer_.width);
        const int64_t out =
            layer_.c_out * (dgrad ? pixels(op.height, op.width)
                                  : pixels(out_side(layer_, op.height), out_side(layer_, op.width)));
        // Block sizes with which all threads finish at the same time are no faster: 1.00× at batch 64.
        const auto split = [&](int64_t bytes) {
            const int64_t fit = std::max<int64_t>(1, bytes / FLOAT / (in + out));
            blocks_ = (images + fit - 1) / fit;
            block_ = (images + blocks_ - 1) / blocks_;
            blocks_ = (images + block_ - 1) / block_;
        };
        split(BLOCK_BYTES / threads);
        const int64_t rounds = (blocks_ + threads - 1) / threads;
        per_thread_ = threads > 1 && blocks_ >= threads && 4 * blocks_ >= 3 * rounds * threads;
        if (!per_thread_) split(BLOCK_BYTES);
        const int threads_here = per_thread_ ? 1 : threads;
        // The last block may be smaller, and then be split differently.
        for (const int64_t size : {block_, images - (blocks_ - 1) * block_}) {
            job_.images = size;
            units_ = std::max<int64_t>(units_, engine.units(job_, threads_here));
            scratch_ = std::max(scratch_, whole_lines(engine.scratch_size(job_, threads_here)));
        }
        job_.images = block_;
        packed_ = whole_lines(packed);
        if (has_prologue_) materialized_ = whole_lines(block_ * in + 16);
    }
    if (reduces)
        sums_ = static_cast<size_t>(blocks_ * units_ * PartialSums::ROWS) * whole_lines(layer_.c_out);
}

size_t Product::bytes() const {
    const size_t copies = per_thread_ ? static_cast<size_t>(threads_) : 1;
    const size_t scratches = streamed_ ? 1 : static_cast<size_t>(threads_);
    return (sums_ + packed_ + materialized_ * copies + scratch_ * scratches) * sizeof(float);
}

void Product::run(const Maps& maps, const float* weight, const int64_t strides[4], float* memory,
                  bool packed) const {
    float* const sums = memory;
    PartialSums partials{dgrad_ ? PartialSums::ADJOINT : PartialSums::STATISTICS,
                         maps.x,
                         op_.center,
                         op_.scale,
                         op_.shift,
                         negative_slope(op_.in_act, op_.slope),
                         sums,
                         static_cast<long>(whole_lines(layer_.c_out))};
    if (sums_ > 0) std::memset(sums, 0, sums_ * sizeof(float));
    run_blocks(maps, sums_ > 0 ? &partials : nullptr, weight, strides, memory + sums_, packed);
    if (maps.sums == nullptr) return;
    if (dgrad_)
        merge_adjoint(sums, maps.sums);
    else
        merge_statistics(sums, maps.sums);
}

void Product::run_blocks(const Maps& maps, const PartialSums* partials, const float* weight,
                         const int64_t strides[4], float* memory, bool packed_already) const {
    const int64_t height = dgrad_ ? op_.height : out_side(layer_, op_.height);
    const int64_t width = dgrad_ ? op_.width : out_side(layer_, op_.width);
    const View out = nhwc(maps.out, height, width, layer_.c_out);
    if (streamed_) {
        Job job = job_;
        job.y = out;
        job.partials = partials;
        return engine_.streamed(job, maps.in, weight, strides, threads_, memory);
    }
    dcgan_layer layer = layer_;
    float* const packed = memory;
    float* const materialized = packed + packed_;
    float* const scratch = materialized + materialized_ * static_cast<size_t>(per_thread_ ? threads_ : 1);
    if (!packed_already) engine_.pack(layer, weight, strides, packed, threads_);
    layer.weights = packed;

    const int64_t in_pixels = pixels(layer_.height, layer_.width), in = in_pixels * layer_.c_in;
    const auto block = [&](int64_t index, int threads, int thread) {
        const int64_t begin = index * block_, images = std::min(block_, images_ - begin);
        float* from = const_cast<float*>(maps.in.t) + begin * in;
        if (has_prologue_) {
            from = materialized + static_cast<size_t>(thread) * materialized_;
            const int64_t rows = images * layer_.height, row = layer_.width;
            const int64_t first = begin * in_pixels;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) \
    num_threads(effective_threads(threads)) if (effective_threads(threads) > 1)
#endif
            for (int64_t r = 0; r < rows; ++r)
                engine_.fill(maps.in, first + r * row, first + (r + 1) * row, from + r * row * layer_.c_in);
        }
        Job job = job_;
        job.layer = &layer;
        job.images = images;
        job.x = nhwc(from, layer_.height, layer_.width, layer_.c_in);
        job.y = out;
        job.y.data += begin * out.n;
        PartialSums local;
        if (partials != nullptr) {
            local = *partials;
            local.sums += index * units_ * PartialSums::ROWS * local.width;
            if (local.x != nullptr) local.x += begin * out.n;
            job.partials = &local;
        }
        engine_.run(job, threads, scratch + static_cast<size_t>(thread) * scratch_,
                    static_cast<long>(scratch_));
    };
#ifdef _OPENMP
    if (per_thread_) {
#pragma omp parallel for schedule(dynamic) num_threads(effective_threads(threads_))
        for (int64_t i = 0; i < blocks_; ++i) block(i, 1, omp_get_thread_num());
        return;
    }
#endif
    for (int64_t i = 0; i < blocks_; ++i) block(i, threads_, 0);
}

// Merges counts, means and centered sums of squares pairwise (Chan, Golub & LeVeque, 1979).
void Product::merge_statistics(const float* sums, double* merged) const {
    const int64_t width = static_cast<int64_t>(whole_lines(layer_.c_out)), units = blocks_ * units_;
    for (int64_t first = 0; first < layer_.c_out; first += LINE) {  // line by line, as the units store them
        double count[LINE] = {}, center[LINE] = {}, squares[LINE] = {};
        for (int64_t u = 0; u < units; ++u) {
            const float* const of_unit = sums + u * PartialSums::ROWS * width + first;
            for (int64_t c = 0; c < LINE; ++c) {
                const double n = of_unit[c], sum = of_unit[c + 2 * width];
                const double unit_mean = of_unit[c + width] + sum / n;
                const double unit_squares = of_unit[c + 3 * width] - sum * sum / n;
                const double delta = unit_mean - center[c], total = count[c] + n;
                const double moved = center[c] + delta * n / total;
                const double grown = squares[c] + (unit_squares + delta * delta * count[c] * n / total);
                center[c] = n == 0 ? center[c] : moved;  // a unit has only some of the channels
                squares[c] = n == 0 ? squares[c] : grown;
                count[c] = total;
            }
        }
        for (int64_t c = 0; c < std::min<int64_t>(LINE, layer_.c_out - first); ++c) {
            merged[first + c] = center[c];
            // Rounding may make the variance of a constant channel slightly negative.
            merged[layer_.c_out + first + c] = squares[c] < 0 ? 0 : squares[c] / count[c];
        }
    }
}

void Product::merge_adjoint(const float* sums, double* merged) const {
    const int64_t width = static_cast<int64_t>(whole_lines(layer_.c_out)), units = blocks_ * units_;
    std::fill(merged, merged + 2 * layer_.c_out, 0.0);
    for (int64_t u = 0; u < units; ++u)
        for (int64_t row = 0; row < 2; ++row)
            for (int64_t c = 0; c < layer_.c_out; ++c)
                merged[row * layer_.c_out + c] += sums[(u * PartialSums::ROWS + row) * width + c];
}

}  // namespace dcgan
