// The C ABI: argument checks, instruction set dispatch and the workspace of each thread.
#include <pthread.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "chain.h"
#include "dcgan.h"
#include "engine.h"
#include "loss.h"
#include "products.h"
#include "training.h"
#include "value_guard.h"
#include "workspace.h"

namespace dcgan {

thread_local int thread_limit = 0;

namespace {

thread_local char message[256] = "";

[[gnu::format(printf, 2, 3)]] int fail(int code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}

// --- instruction sets ------------------------------------------------------------------------------------

struct Candidate {
    const Engine* engine;
    bool (*is_supported)();
};

// Best first.
const Candidate candidates[] = {
#ifdef DCGAN_WITH_AVX512
    {&engine_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef DCGAN_WITH_AVX2
    {&engine_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&engine_portable, [] { return true; }},
};

const Engine* best() {
    for (const Candidate& candidate : candidates)
        if (candidate.is_supported()) return candidate.engine;
    return &engine_portable;
}

std::atomic<const Engine*> chosen{nullptr};

const Engine& engine() {
    const Engine* current = chosen.load(std::memory_order_acquire);
    if (current == nullptr) {
        const Engine* none = nullptr;
        chosen.compare_exchange_strong(none, best());
        current = chosen.load();
    }
    return *current;
}

const char* isa_names(bool supported) {
    thread_local char lists[2][64];
    char* const list = lists[supported];
    list[0] = '\0';
    for (const Candidate& candidate : candidates) {
        if (supported && !candidate.is_supported()) continue;
        if (list[0] != '\0') std::strcat(list, " ");
        std::strcat(list, candidate.engine->name);
    }
    return list;
}

// --- threads ---------------------------------------------------------------------------------------------

// An OpenMP thread pool does not survive fork(): a child that uses it waits forever for missing threads.
std::atomic<bool> forked{false};

// Registered at load time: other code in the process may create the pool before the first call.
[[gnu::constructor]] void register_fork_handler() {
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
}

// --- checks ----------------------------------------------------------------------------------------------

constexpr int64_t MAX_CHANNELS = 1 << 16, MAX_SIDE = 1 << 14, MAX_IMAGES = 1 << 28;

int check_geometry(const dcgan_layer* layer) {
    if (layer == nullptr) return fail(DCGAN_EARGUMENT, "layer is null");
    const dcgan_layer& l = *layer;
    if (l.transposed != 0 && l.transposed != 1)
        return fail(DCGAN_EARGUMENT, "transposed must be 0 or 1, got %d", l.transposed);
    if (l.c_in < 1 || l.c_out < 1 || l.c_in > MAX_CHANNELS || l.c_out > MAX_CHANNELS)
        return fail(DCGAN_EARGUMENT, "c_in and c_out must be from 1 to %d, got %d and %d", int(MAX_CHANNELS),
                    l.c_in, l.c_out);
    if (l.height < 1 || l.width < 1 || l.height > MAX_SIDE || l.width > MAX_SIDE)
        return fail(DCGAN_EARGUMENT, "height and width must be from 1 to %d, got %d and %d", int(MAX_SIDE),
                    l.height, l.width);
    if (l.act < DCGAN_NONE || l.act > DCGAN_SIGMOID)
        return fail(DCGAN_EARGUMENT, "act must be from %d to %d, got %d", DCGAN_NONE, DCGAN_SIGMOID, l.act);
    switch (l.algorithm) {
        case DCGAN_DENSE: {
            if (l.kernel < 1 || l.kernel > 64 || l.padding != 0 || l.stride < 1)
                return fail(DCGAN_EARGUMENT,
                            "a dense layer needs kernel 1 to 64, padding 0 and stride >= 1; got kernel %d, "
                            "padding %d, stride %d",
                            l.kernel, l.padding, l.stride);
            const int side = l.transposed ? 1 : l.kernel;
            if (l.height != side || l.width != side)
                return fail(DCGAN_EARGUMENT,
                            "a dense layer with kernel %d needs a %d×%d input map, got %d×%d", l.kernel, side,
                            side, l.height, l.width);
            return 0;
        }
        case DCGAN_DIRECT:
        case DCGAN_F2:
        case DCGAN_F4:
        case DCGAN_NARROW:
            if (l.kernel != 4 || l.stride != 2 || l.padding != 1)
                return fail(
                    DCGAN_EARGUMENT,
                    "algorithm %d needs kernel 4, stride 2, padding 1; got kernel %d, stride %d, padding %d",
                    l.algorithm, l.kernel, l.stride, l.padding);
            if (!l.transposed && (l.height < 2 || l.width < 2))
                return fail(DCGAN_EARGUMENT,
                            "a convolution with kernel 4, stride 2, padding 1 needs an input map of at least "
                            "2×2, got %d×%d",
                            l.height, l.width);
            return 0;
        default:
            return fail(DCGAN_EARGUMENT, "algorithm must be from %d to %d, got %d", DCGAN_DENSE, DCGAN_NARROW,
                        l.algorithm);
    }
}

int check_sizes(int64_t images, int threads) {
    if (images < 0 || images > MAX_IMAGES)
        return fail(DCGAN_EARGUMENT, "images must be from 0 to %lld, got %lld",
                    static_cast<long long>(MAX_IMAGES), static_cast<long long>(images));
    if (threads < 1 || threads > 1024)
        return fail(DCGAN_EARGUMENT, "threads must be from 1 to 1024, got %d", threads);
    return 0;
}

// Checks that layer i takes what the layer before it outputs.
int check_adjacent(const dcgan_layer& before, const dcgan_layer& l, int i) {
    const long long height = out_side(before, before.height), width = out_side(before, before.width);
    if (before.c_out == l.c_in && height == l.height && width == l.width) return 0;
    return fail(DCGAN_EARGUMENT, "layer %d takes [%d, %d, %d], but layer %d outputs [%d, %lld, %lld]", i,
                l.c_in, l.height, l.width, i - 1, before.c_out, height, width);
}

int check_chain(const dcgan_layer* layers, int count, int64_t images, int threads) {
    if (layers == nullptr) return fail(DCGAN_EARGUMENT, "layers is null");
    if (count < 1 || count > MAX_LAYERS)
        return fail(DCGAN_EARGUMENT, "count must be from 1 to %d, got %d", MAX_LAYERS, count);
    if (const int code = check_sizes(images, threads)) return code;
    for (int i = 0; i < count; ++i) {
        if (const int code = check_geometry(layers + i)) return code;
        if (i == 0) continue;
        if (const int code = check_adjacent(layers[i - 1], layers[i], i)) return code;
    }
    return 0;
}

int check_tensor(const char* name, const dcgan_tensor* t, bool any_strides, int64_t channels) {
    if (t == nullptr || t->data == nullptr) return fail(DCGAN_EARGUMENT, "%s is null", name);
    for (const int64_t stride : t->strides)
        if (stride < 0) return fail(DCGAN_EARGUMENT, "%s has a negative stride", name);
    if (!any_strides && channels > 1 && t->strides[1] != 1)
        return fail(DCGAN_EARGUMENT, "%s must have contiguous channels, got a channel stride of %lld", name,
                    static_cast<long long>(t->strides[1]));
    return 0;
}

// Checks the op, and that its algorithm supports `product`.
int check_op(const dcgan_op* op, int product) {
    if (op == nullptr) return fail(DCGAN_EARGUMENT, "op is null");
    dcgan_layer l = layer_of(*op);
    if (product < DCGAN_FPROP || product > DCGAN_WGRAD)
        return fail(DCGAN_EARGUMENT, "product must be from %d to %d, got %d", DCGAN_FPROP, DCGAN_WGRAD,
                    product);
    if (const int code = check_geometry(&l)) return code;
    if (op->in_act < DCGAN_NONE || op->in_act > DCGAN_LEAKY_RELU)
        return fail(DCGAN_EARGUMENT, "in_act must be none, relu or leaky_relu (0 to %d), got %d",
                    DCGAN_LEAKY_RELU, op->in_act);
    if (!(op->slope >= 0.0f)) return fail(DCGAN_EARGUMENT, "slope must not be negative, got %g", op->slope);
    if ((op->center == nullptr) != (op->scale == nullptr) ||
        (op->center == nullptr) != (op->shift == nullptr))
        return fail(DCGAN_EARGUMENT, "center, scale and shift must be given together or not at all");
    if (op->statistics && (op->out_act != DCGAN_NONE || op->out_scale != nullptr || op->out_shift != nullptr))
        return fail(DCGAN_EARGUMENT,
                    "statistics are those of the raw output: out_act must be none, and out_scale and "
                    "out_shift must be null");
    const bool narrow = op->algorithm == DCGAN_NARROW;
    if (narrow && product == DCGAN_FPROP && op->transposed && op->statistics)
        return fail(DCGAN_EARGUMENT, "the narrow transposed convolution does not compute statistics");
    if (narrow && product == DCGAN_DGRAD && !op->transposed &&
        (op->scale != nullptr || op->in_act != DCGAN_NONE))
        return fail(DCGAN_EARGUMENT, "dgrad of the narrow convolution does not support a prologue");
    if (op->algorithm == DCGAN_F2 && product == DCGAN_WGRAD)
        return fail(DCGAN_EARGUMENT, "algorithm F(2×2) does not support wgrad");
    return 0;
}

int check_call(const dcgan_op* op, int product, int64_t images, int threads) {
    if (const int code = check_op(op, product)) return code;
    return check_sizes(images, threads);
}

int check_not_null(std::initializer_list<std::pair<const char*, const void*>> pointers) {
    for (const auto& [name, pointer] : pointers)
        if (pointer == nullptr) return fail(DCGAN_EARGUMENT, "%s is null", name);
    return 0;
}

int check_backward(const dcgan_op& op, const float* y) {
    const bool needs_y =
        op.statistics ? op.dmean != nullptr || op.dvariance != nullptr : op.out_act != DCGAN_NONE;
    if (needs_y && y == nullptr)
        return fail(DCGAN_EARGUMENT,
                    "y is null, but the gradient of the statistics or of out_act is computed from it");
    if (op.statistics && op.dvariance != nullptr && op.mean == nullptr)
        return fail(DCGAN_EARGUMENT, "mean is null, but the gradient of the variance, dvariance, needs it");
    return 0;
}

// Prepends the layer to the message of a failed check.
int in_layer(int i, int code) {
    if (code == 0) return 0;
    char text[sizeof message];
    std::memcpy(text, message, sizeof message);
    return fail(code, "layer %d: %s", i, text);
}

// Checks a layer of a network in training without its products; its predecessors have passed.
int check_train_layer(const dcgan_train_layer* layers, int i, int count) {
    const dcgan_train_layer& l = layers[i];
    if (l.normalized != 0 && l.normalized != 1)
        return fail(DCGAN_EARGUMENT, "normalized must be 0 or 1, got %d", l.normalized);
    if (l.normalized && i + 1 == count)
        return fail(DCGAN_EARGUMENT,
                    "normalized must be 0 in the last layer, as no layer applies its statistics");
    if (i + 1 < count && (l.act < DCGAN_NONE || l.act > DCGAN_LEAKY_RELU))
        return fail(DCGAN_EARGUMENT,
                    "act must be none, relu or leaky_relu (0 to %d) in all layers but the last, got %d",
                    DCGAN_LEAKY_RELU, l.act);
    if (const int code = check_not_null({{"weight", l.weight}})) return code;
    if (l.normalized) {
        if (!(l.epsilon >= 0.0))
            return fail(DCGAN_EARGUMENT, "epsilon must not be negative, got %g", l.epsilon);
        return check_not_null({{"stats", l.stats}});
    }
    if (l.gamma != nullptr || l.dgamma != nullptr)
        return fail(DCGAN_EARGUMENT, "gamma and dgamma must be null unless the layer is normalized");
    return 0;
}

// Checks the arguments that the passes of a network have in common, and all forward products.
int check_training(const dcgan_train_layer* layers, int count, int64_t images, int groups, float slope,
                   int threads) {
    if (const int code = check_not_null({{"layers", layers}})) return code;
    if (count < 1) return fail(DCGAN_EARGUMENT, "count must be positive, got %d", count);
    if (const int code = check_sizes(images, threads)) return code;
    if (groups < 1 || images % groups != 0)
        return fail(DCGAN_EARGUMENT, "groups must divide the %lld images, got %d",
                    static_cast<long long>(images), groups);
    const Training training(engine(), layers, count, images, groups, slope, threads);
    dcgan_layer before{};
    for (int i = 0; i < count; ++i) {
        if (const int code = in_layer(i, check_train_layer(layers, i, count))) return code;
        const dcgan_op op = training.op(i, layers[i].fprop);
        if (const int code = in_layer(i, check_op(&op, DCGAN_FPROP))) return code;
        const dcgan_layer l = layer_of(op);
        if (i > 0)
            if (const int code = check_adjacent(before, l, i)) return code;
        before = l;
    }
    return 0;
}

thread_local Workspace workspace;

float* get_workspace(size_t bytes) {
    float* const memory = workspace.get(bytes);
    if (memory == nullptr) fail(DCGAN_EMEMORY, "cannot allocate a workspace of %zu bytes", bytes);
    return memory;
}

}  // namespace
}  // namespace dcgan

using namespace dcgan;

int dcgan_abi(void) {
    return DCGAN_ABI;
}
const char* dcgan_error(void) {
    return message;
}
const char* dcgan_isas(void) {
    return isa_names(true);
}
const char* dcgan_built(void) {
    return isa_names(false);
}
const char* dcgan_isa(void) {
    return engine().name;
}

int dcgan_use_isa(const char* name) {
    if (name == nullptr) return fail(DCGAN_EARGUMENT, "the name of the instruction set is null");
    for (const Candidate& candidate : candidates) {
        if (std::strcmp(candidate.engine->name, name) != 0) continue;
        if (!candidate.is_supported())
            return fail(DCGAN_EISA, "this machine does not run %s, but: %s", name, isa_names(true));
        chosen.store(candidate.engine);
        return 0;
    }
    return fail(DCGAN_EISA, "instruction set must be one of: %s; got %s", isa_names(true), name);
}

int dcgan_limit_threads(int limit) {
    if (limit < 0) return fail(DCGAN_EARGUMENT, "limit must not be negative, got %d", limit);
    thread_limit = limit;
    return 0;
}

int dcgan_supports(const dcgan_layer* layer) {
    return check_geometry(layer);
}

int64_t dcgan_packed_size(const dcgan_layer* layer) {
    if (const int code = check_geometry(layer)) return code;
    return engine().packed_size(*layer);
}

int dcgan_pack(const dcgan_layer* layer, const float* weight, const int64_t strides[4], float* packed,
               int threads) {
    if (const int code = check_chain(layer, 1, 1, threads)) return code;
    if (weight == nullptr || strides == nullptr || packed == nullptr)
        return fail(DCGAN_EARGUMENT, "weight, strides and packed must not be null");
    huge_pages(packed, static_cast<size_t>(engine().packed_size(*layer)) * sizeof(float));
    engine().pack(*layer, weight, strides, packed, forked ? 1 : threads);
    return 0;
}

int dcgan_run(const dcgan_layer* layers, int count, int64_t images, const dcgan_tensor* x,
              const dcgan_tensor* y, int threads) {
    if (const int code = check_chain(layers, count, images, threads)) return code;
    const dcgan_layer &first = layers[0], &last = layers[count - 1];
    if (const int code =
            check_tensor("x", x, first.algorithm == DCGAN_NARROW && !first.transposed, first.c_in))
        return code;
    if (const int code = check_tensor("y", y, last.algorithm == DCGAN_NARROW && last.transposed, last.c_out))
        return code;
    for (int i = 0; i < count; ++i) {
        if (layers[i].weights == nullptr) return fail(DCGAN_EARGUMENT, "layer %d has no weights", i);
        if ((layers[i].mean == nullptr) != (layers[i].variance == nullptr))
            return fail(DCGAN_EARGUMENT, "layer %d has only one of mean and variance", i);
    }
    if (images == 0) return 0;

    if (forked) threads = 1;
    const Chain chain(engine(), layers, count, images, threads);
    float* const memory = get_workspace(chain.bytes());
    if (memory == nullptr) return DCGAN_EMEMORY;
    chain.run(*x, *y, memory);
    return 0;
}

int64_t dcgan_workspace(const dcgan_layer* layers, int count, int64_t images, int threads) {
    if (const int code = check_chain(layers, count, images, threads)) return code;
    if (images == 0) return 0;
    return static_cast<int64_t>(Chain(engine(), layers, count, images, threads).bytes());
}

int dcgan_op_supports(const dcgan_op* op, int product) {
    return check_op(op, product);
}

int dcgan_fprop(const dcgan_op* op, int64_t images, const float* x, const float* weight,
                const int64_t strides[4], float* y, float* mean, float* variance, int threads) {
    if (const int code = check_call(op, DCGAN_FPROP, images, threads)) return code;
    if (const int code = check_not_null({{"x", x}, {"weight", weight}, {"strides", strides}, {"y", y}}))
        return code;
    if (op->statistics)
        if (const int code = check_not_null({{"mean", mean}, {"variance", variance}})) return code;
    if (images == 0) return 0;
    const Source source = source_of_x(*op, x);
    const Product product(engine(), *op, false, source.prologue, images, forked ? 1 : threads);
    const size_t sums_size = whole_lines(2 * DOUBLE * op->c_out);
    float* const memory = get_workspace(sums_size * sizeof(float) + product.bytes());
    if (memory == nullptr) return DCGAN_EMEMORY;
    double* const sums = reinterpret_cast<double*>(memory);
    product.run({source, nullptr, y, op->statistics ? sums : nullptr}, weight, strides, memory + sums_size);
    for (int c = 0; op->statistics && c < op->c_out; ++c) {
        mean[c] = static_cast<float>(sums[c]);
        variance[c] = static_cast<float>(sums[op->c_out + c]);
    }
    return 0;
}

int dcgan_dgrad(const dcgan_op* op, int64_t images, const float* dy, const float* y, const float* weight,
                const int64_t strides[4], const float* x, float* dx, float* dcenter, float* dscale,
                float* dshift, int threads) {
    if (const int code = check_call(op, DCGAN_DGRAD, images, threads)) return code;
    if (const int code = check_not_null({{"dy", dy}, {"weight", weight}, {"strides", strides}, {"dx", dx}}))
        return code;
    if (const int code = check_backward(*op, y)) return code;
    if ((op->scale != nullptr || op->in_act != DCGAN_NONE) && x == nullptr)
        return fail(DCGAN_EARGUMENT, "x is null, but the derivative of the prologue is computed from it");
    if ((dcenter == nullptr) != (dscale == nullptr) || (dcenter == nullptr) != (dshift == nullptr))
        return fail(DCGAN_EARGUMENT, "dcenter, dscale and dshift must be given together or not at all");
    if (dcenter != nullptr && op->scale == nullptr)
        return fail(DCGAN_EARGUMENT,
                    "dcenter, dscale and dshift must be null without center, scale and shift");
    if (images == 0) return 0;
    const Prologue prologue = source_of_du(*op, images, dy, y, nullptr).prologue;
    const Product product(engine(), *op, true, prologue, images, forked ? 1 : threads);
    const size_t sums_size = whole_lines(2 * DOUBLE * op->c_in), vectors_size = whole_lines(3 * op->c_out);
    float* const memory = get_workspace((sums_size + vectors_size) * sizeof(float) + product.bytes());
    if (memory == nullptr) return DCGAN_EMEMORY;
    double* const sums = reinterpret_cast<double*>(memory);
    float* const vectors = memory + sums_size;
    product.run({source_of_du(*op, images, dy, y, vectors), x, dx, dcenter == nullptr ? nullptr : sums},
                weight, strides, vectors + vectors_size);
    for (int c = 0; dcenter != nullptr && c < op->c_in; ++c) {
        dcenter[c] = static_cast<float>(-op->scale[c] * sums[c]);
        dscale[c] = static_cast<float>(sums[op->c_in + c]);
        dshift[c] = static_cast<float>(sums[c]);
    }
    return 0;
}

int dcgan_wgrad(const dcgan_op* op, int64_t images, const float* x, const float* dy, const float* y,
                float* dweight, const int64_t strides[4], const float* weight,
                const int64_t weight_strides[4], float* dout_scale, int threads) {
    if (const int code = check_call(op, DCGAN_WGRAD, images, threads)) return code;
    if (const int code = check_not_null({{"x", x}, {"dy", dy}, {"dweight", dweight}, {"strides", strides}}))
        return code;
    if (const int code = check_backward(*op, y)) return code;
    if (dout_scale != nullptr) {
        if (op->statistics)
            return fail(DCGAN_EARGUMENT, "dout_scale must be null with statistics, which exclude out_scale");
        if (const int code = check_not_null({{"weight", weight}, {"weight_strides", weight_strides}}))
            return code;
    }
    if (images == 0) return 0;  // dweight is left unchanged
    if (forked) threads = 1;
    const dcgan_layer layer = layer_of(*op);
    dcgan_op unscaled = *op;
    if (dout_scale != nullptr) unscaled.out_scale = nullptr;  // dweight is first computed from e
    GradientJob job{&layer, source_of_x(unscaled, x), {}, static_cast<long>(images), dweight, strides};
    // The workspace depends on the kind of prologue; the prologue's vectors precede it.
    const size_t vectors = whole_lines(3 * op->c_out);
    job.du = source_of_du(unscaled, images, dy, y, nullptr);
    float* const memory = get_workspace(
        (vectors + static_cast<size_t>(engine().gradient_memory(job, threads))) * sizeof(float));
    if (memory == nullptr) return DCGAN_EMEMORY;
    job.du = source_of_du(unscaled, images, dy, y, memory);
    engine().gradient(job, threads, memory + vectors);
    if (dout_scale != nullptr)
        engine().scale_gradient(layer, weight, weight_strides, dweight, strides, threads, dout_scale);
    return 0;
}

int dcgan_shift_gradient(const dcgan_op* op, int64_t images, const float* dy, const float* y,
                         float* dout_shift, int threads) {
    // This sum involves no algorithm; DCGAN_FPROP only selects the argument checks.
    if (const int code = check_call(op, DCGAN_FPROP, images, threads)) return code;
    if (op->statistics)
        return fail(DCGAN_EARGUMENT, "an op with statistics has no out_shift, hence no dout_shift");
    if (const int code = check_not_null({{"dy", dy}, {"dout_shift", dout_shift}})) return code;
    if (const int code = check_backward(*op, y)) return code;
    if (images == 0) return 0;
    if (forked) threads = 1;
    const dcgan_layer layer = layer_of(*op);
    dcgan_op unscaled = *op;
    unscaled.out_scale = nullptr;
    const Source e = source_of_du(unscaled, images, dy, y, nullptr);
    const long pixels =
        static_cast<long>(images * out_side(layer, layer.height) * out_side(layer, layer.width));
    float* const memory =
        get_workspace(static_cast<size_t>(engine().shift_memory(e, pixels)) * sizeof(float));
    if (memory == nullptr) return DCGAN_EMEMORY;
    engine().shift_gradient(e, pixels, threads, memory, dout_shift);
    return 0;
}

int dcgan_train_forward(const dcgan_train_layer* layers, int count, int64_t images, int groups, float slope,
                        const float* x, int threads) {
    if (const int code = check_training(layers, count, images, groups, slope, threads)) return code;
    if (const int code = check_not_null({{"x", x}})) return code;
    for (int i = 0; i < count; ++i)
        if (const int code = in_layer(i, check_not_null({{"y", layers[i].y}}))) return code;
    if (images == 0) return 0;
    const Training training(engine(), layers, count, images, groups, slope, forked ? 1 : threads);
    float* const memory = get_workspace(training.forward_bytes());
    if (memory == nullptr) return DCGAN_EMEMORY;
    training.forward(x, memory);
    return 0;
}

int dcgan_train_backward(const dcgan_train_layer* layers, int count, int64_t images, int groups, float slope,
                         const float* x, const float* dy, float* dx, int threads) {
    if (const int code = check_training(layers, count, images, groups, slope, threads)) return code;
    if (const int code = check_not_null({{"x", x}, {"dy", dy}})) return code;
    const Training training(engine(), layers, count, images, groups, slope, forked ? 1 : threads);
    for (int i = 0; i < count; ++i) {
        const dcgan_train_layer& l = layers[i];
        if (i + 1 < count || l.act != DCGAN_NONE)
            if (const int code = in_layer(i, check_not_null({{"y", l.y}}))) return code;
        const dcgan_op dgrad = training.op(i, l.dgrad), wgrad = training.op(i, l.wgrad);
        if (training.has_dgrad(i, dx != nullptr))
            if (const int code = in_layer(i, check_op(&dgrad, DCGAN_DGRAD))) return code;
        if (training.has_wgrad(i))
            if (const int code = in_layer(i, check_op(&wgrad, DCGAN_WGRAD))) return code;
    }
    if (images == 0) return 0;
    float* const memory = get_workspace(training.backward_bytes(dx != nullptr));
    if (memory == nullptr) return DCGAN_EMEMORY;
    training.backward(x, dy, dx, memory);
    return 0;
}

int dcgan_bce(const float* logits, int64_t stride, int64_t size, int groups, const double* targets,
              float* loss, float* probability) {
    if (size < 0)
        return fail(DCGAN_EARGUMENT, "size must not be negative, got %lld", static_cast<long long>(size));
    if (groups < 1) return fail(DCGAN_EARGUMENT, "groups must be at least 1, got %d", groups);
    if (const int code = check_not_null({{"targets", targets}, {"loss", loss}, {"probability", probability}}))
        return code;
    if (const int code = size > 0 ? check_not_null({{"logits", logits}}) : 0) return code;
    bce(logits, stride, size, groups, targets, loss, probability);
    return 0;
}

int dcgan_bce_backward(const float* logits, int64_t stride, int64_t size, int groups, const double* targets,
                       const float* dloss, const float* dprobability, float* dlogits) {
    if (size < 0)
        return fail(DCGAN_EARGUMENT, "size must not be negative, got %lld", static_cast<long long>(size));
    if (groups < 1) return fail(DCGAN_EARGUMENT, "groups must be at least 1, got %d", groups);
    if (const int code =
            size > 0 ? check_not_null({{"logits", logits}, {"targets", targets}, {"dlogits", dlogits}}) : 0)
        return code;
    bce_backward(logits, stride, size, groups, targets, dloss, dprobability, dlogits);
    return 0;
}

int dcgan_track(const dcgan_running* norms, int count, int groups) {
    if (count < 0) return fail(DCGAN_EARGUMENT, "count must not be negative, got %d", count);
    if (groups < 1) return fail(DCGAN_EARGUMENT, "groups must be at least 1, got %d", groups);
    if (const int code = count > 0 ? check_not_null({{"norms", norms}}) : 0) return code;
    for (int i = 0; i < count; ++i) {
        const dcgan_running& n = norms[i];
        if (const int code = check_not_null(
                {{"mean", n.mean}, {"variance", n.variance}, {"batches", n.batches}, {"stats", n.stats}}))
            return code;
        if (n.channels < 0) return fail(DCGAN_EARGUMENT, "channels must not be negative, got %d", n.channels);
        if (!(n.count >= 2)) return fail(DCGAN_EARGUMENT, "count must be at least 2, got %g", n.count);
    }
    for (int i = 0; i < count; ++i) track(norms[i], groups);
    return 0;
}

int dcgan_differ(const dcgan_pair* pairs, int count, int lines) {
    if (count < 0) return fail(DCGAN_EARGUMENT, "count must not be negative, got %d", count);
    if (lines < 1) return fail(DCGAN_EARGUMENT, "lines must be positive, got %d", lines);
    if (const int code = count > 0 ? check_not_null({{"pairs", pairs}}) : 0) return code;
    for (int i = 0; i < count; ++i) {
        if (const int code = check_not_null({{"now", pairs[i].now}, {"before", pairs[i].before}}))
            return code;
        if (pairs[i].bytes < 0)
            return fail(DCGAN_EARGUMENT, "bytes must not be negative, got %lld",
                        static_cast<long long>(pairs[i].bytes));
    }
    return differ(pairs, count, lines) ? 1 : 0;
}

void dcgan_release(void) {
    workspace.release();
}

double dcgan_peak(int threads, double seconds) {
    if (threads < 1 || threads > 1024)
        return fail(DCGAN_EARGUMENT, "threads must be from 1 to 1024, got %d", threads);
    if (!(seconds > 0.0)) return fail(DCGAN_EARGUMENT, "seconds must be positive, got %g", seconds);
    return engine().peak(forked ? 1 : threads, seconds);
}
