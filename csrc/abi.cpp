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
#include "products.h"
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

int check_chain(const dcgan_layer* layers, int count, int64_t images, int threads) {
    if (layers == nullptr) return fail(DCGAN_EARGUMENT, "layers is null");
    if (count < 1 || count > MAX_LAYERS)
        return fail(DCGAN_EARGUMENT, "count must be from 1 to %d, got %d", MAX_LAYERS, count);
    if (images < 0 || images > MAX_IMAGES)
        return fail(DCGAN_EARGUMENT, "images must be from 0 to %lld, got %lld",
                    static_cast<long long>(MAX_IMAGES), static_cast<long long>(images));
    if (threads < 1 || threads > 1024)
        return fail(DCGAN_EARGUMENT, "threads must be from 1 to 1024, got %d", threads);
    for (int i = 0; i < count; ++i) {
        if (const int code = check_geometry(layers + i)) return code;
        if (i == 0) continue;
        const dcgan_layer &before = layers[i - 1], &l = layers[i];
        if (before.c_out != l.c_in || out_side(before, before.height) != l.height ||
            out_side(before, before.width) != l.width)
            return fail(DCGAN_EARGUMENT, "layer %d takes [%d, %d, %d], but layer %d outputs [%d, %lld, %lld]",
                        i, l.c_in, l.height, l.width, i - 1, before.c_out,
                        static_cast<long long>(out_side(before, before.height)),
                        static_cast<long long>(out_side(before, before.width)));
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
    if (images < 0 || images > MAX_IMAGES)
        return fail(DCGAN_EARGUMENT, "images must be from 0 to %lld, got %lld",
                    static_cast<long long>(MAX_IMAGES), static_cast<long long>(images));
    if (threads < 1 || threads > 1024)
        return fail(DCGAN_EARGUMENT, "threads must be from 1 to 1024, got %d", threads);
    return 0;
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
    const Product product(engine(), *op, false, images, forked ? 1 : threads);
    float* const memory = get_workspace(product.bytes());
    if (memory == nullptr) return DCGAN_EMEMORY;
    product.run({x, nullptr, nullptr, y, {mean, variance, nullptr}}, weight, strides, memory);
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
    const Product product(engine(), *op, true, images, forked ? 1 : threads);
    float* const memory = get_workspace(product.bytes());
    if (memory == nullptr) return DCGAN_EMEMORY;
    product.run({dy, y, x, dx, {dcenter, dscale, dshift}}, weight, strides, memory);
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
    const size_t vectors = (static_cast<size_t>(3 * op->c_out) + 15) / 16 * 16;
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
