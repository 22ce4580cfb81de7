#include "support.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

void require(bool ok, const char* format, ...) {
    if (ok) return;
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "FAILED with %s: ", dcgan_isa());
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    // Not exit(), which would run destructors of objects that other threads still use.
    std::_Exit(1);
}

void expect_rejected(const char* function, long long code, const char* names, int expected) {
    require(code == expected, "%s with an invalid %s returns %lld, not %d: %s", function, names, code,
            expected, dcgan_error());
    require(std::strstr(dcgan_error(), names) != nullptr, "%s: the error does not name %s: %s", function,
            names, dcgan_error());
}

// Seconds after which a forked child is considered to hang.
static constexpr unsigned HANG_TIMEOUT = 10;

void in_child(const char* when, const std::function<void()>& body) {
    std::fflush(stdout);
    const pid_t child = fork();
    require(child >= 0, "fork failed");
    if (child == 0) {
        alarm(HANG_TIMEOUT);
        body();
        std::_Exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    require(!WIFSIGNALED(status) || WTERMSIG(status) != SIGALRM, "a forked child hangs: %s", when);
    require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child fails: %s", when);
}

void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    std::putchar('\n');
    std::fflush(stdout);
    va_end(arguments);
}

std::vector<std::string> split(const char* list) {
    std::istringstream stream(list);
    std::vector<std::string> all;
    for (std::string word; stream >> word;) all.push_back(word);
    return all;
}

const std::vector<std::string>& isas() {
    static const std::vector<std::string> all = split(dcgan_isas());
    return all;
}

float uniform(Random& random, float limit) {
    return std::uniform_real_distribution<float>(-limit, limit)(random);
}

Floats random_around(Random& random, long count, float middle, float limit) {
    Floats block(new float[static_cast<size_t>(count)]);
    for (long i = 0; i < count; ++i) block[static_cast<size_t>(i)] = middle + uniform(random, limit);
    return block;
}

const char* name(Layout layout) {
    switch (layout) {
        case Layout::NHWC:
            return "NHWC";
        case Layout::NCHW:
            return "NCHW";
        case Layout::PADDED:
            return "padded";
        default:
            return "scattered";
    }
}

// --- tensors

static const uint32_t SENTINEL = 0x7fc0dead;  // a NaN that arithmetic does not produce
static constexpr long GUARD = 64;

static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float sentinel() {
    float x;
    std::memcpy(&x, &SENTINEL, sizeof x);
    return x;
}

Tensor Tensor::make(Layout layout, long n, long c, long h, long w) {
    Tensor t{{n, c, h, w}, {}, {}, nullptr, nullptr};
    int64_t* s = t.strides;
    switch (layout) {
        case Layout::NHWC:
            s[1] = 1, s[3] = c, s[2] = w * s[3], s[0] = h * s[2];
            break;
        case Layout::NCHW:
            s[3] = 1, s[2] = w, s[1] = h * s[2], s[0] = c * s[1];
            break;
        case Layout::PADDED:
            s[1] = 1, s[3] = c + 3, s[2] = w * s[3] + 5, s[0] = h * s[2] + 7;
            break;
        case Layout::SCATTERED:
            s[2] = 2, s[0] = h * s[2] + 1, s[1] = n * s[0] + 1, s[3] = c * s[1] + 1;
            break;
    }
    return t;
}

long Tensor::span() const {
    long last = 0;
    for (int i = 0; i < 4; ++i) last += (size[i] - 1) * strides[i];
    return last + 1;
}

Tensor Tensor::input(Layout layout, long n, long c, long h, long w) {
    Tensor t = make(layout, n, c, h, w);
    t.exact.reset(new float[static_cast<size_t>(t.span())]);
    t.data = t.exact.get();
    for (long i = 0; i < t.span(); ++i) t.data[i] = sentinel();
    return t;
}

Tensor Tensor::random(Random& random, Layout layout, long n, long c, long h, long w) {
    Tensor t = input(layout, n, c, h, w);
    for (long i = 0; i < n; ++i)
        for (long j = 0; j < c; ++j)
            for (long k = 0; k < h; ++k)
                for (long l = 0; l < w; ++l) t.at(i, j, k, l) = uniform(random);
    return t;
}

Tensor Tensor::output(Layout layout, long n, long c, long h, long w) {
    Tensor t = make(layout, n, c, h, w);
    t.guarded.assign(static_cast<size_t>(t.span() + 2 * GUARD), sentinel());
    t.data = t.guarded.data() + GUARD;
    return t;
}

bool Tensor::guards_intact() const {
    std::vector<char> element(guarded.size(), 0);
    for (long n = 0; n < size[0]; ++n)
        for (long c = 0; c < size[1]; ++c)
            for (long h = 0; h < size[2]; ++h)
                for (long w = 0; w < size[3]; ++w)
                    element[static_cast<size_t>(&at(n, c, h, w) - guarded.data())] = 1;
    for (size_t i = 0; i < guarded.size(); ++i)
        if (!element[i] && bits_of(guarded[i]) != SENTINEL) return false;
    return true;
}

bool Tensor::untouched() const {
    for (const float x : guarded)
        if (bits_of(x) != SENTINEL) return false;
    return true;
}

std::vector<float> Tensor::values() const {
    std::vector<float> all;
    all.reserve(static_cast<size_t>(count()));
    for (long n = 0; n < size[0]; ++n)
        for (long h = 0; h < size[2]; ++h)
            for (long w = 0; w < size[3]; ++w)
                for (long c = 0; c < size[1]; ++c) all.push_back(at(n, c, h, w));
    return all;
}

std::vector<uint32_t> Tensor::bits() const {
    const std::vector<float> all = values();
    std::vector<uint32_t> bits(all.size());
    if (!all.empty()) std::memcpy(bits.data(), all.data(), all.size() * sizeof all[0]);
    return bits;
}

// --- layers

Layer::Layer(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
             long height, long width, Layout weights)
    : weight(Tensor::random(random, weights, transposed ? c_in : c_out, transposed ? c_out : c_in, kernel,
                            kernel)) {
    l.transposed = transposed;
    l.c_in = static_cast<int32_t>(c_in);
    l.c_out = static_cast<int32_t>(c_out);
    l.height = static_cast<int32_t>(height);
    l.width = static_cast<int32_t>(width);
    l.kernel = kernel;
    l.stride = stride;
    l.padding = padding;
    l.slope = SLOPE;
    const double taps = padding > 0 && transposed ? 4 : transposed ? 1 : kernel * kernel;
    const float size = static_cast<float>(std::sqrt(9.0 / (taps * static_cast<double>(c_in))));
    for (long i = 0; i < weight.count(); ++i) weight.data[i] *= size;
}

Layer& Layer::affine(Random& random, bool with_scale, bool with_shift, bool with_statistics, bool with_bias) {
    bias = with_bias ? random_around(random, l.c_out, 0.0f, 0.5f) : nullptr;
    scale = with_scale ? random_around(random, l.c_out, 1.0f, 0.5f) : nullptr;
    shift = with_shift ? random_around(random, l.c_out, 0.0f, 0.5f) : nullptr;
    mean = with_statistics ? random_around(random, l.c_out, 0.0f, 0.5f) : nullptr;
    variance = with_statistics ? random_around(random, l.c_out, 1.0f, 0.75f) : nullptr;
    l.bias = bias.get();
    l.scale = scale.get();
    l.shift = shift.get();
    l.mean = mean.get();
    l.variance = variance.get();
    l.epsilon = 0.125f;  // large enough that omitting it is detected
    return *this;
}

Layer& Layer::activation(int act) {
    l.act = act;
    return *this;
}

Layer& Layer::pack(int algorithm, int threads) {
    l.algorithm = algorithm;
    const int64_t floats = dcgan_packed_size(&l);
    require(floats >= weight.count(), "%s: dcgan_packed_size returns %lld: %s", describe(l).c_str(),
            static_cast<long long>(floats), dcgan_error());
    packed.reset(new float[static_cast<size_t>(floats)]);
    for (int64_t i = 0; i < floats; ++i) packed[static_cast<size_t>(i)] = sentinel();
    const int code = dcgan_pack(&l, weight.data, weight.strides, packed.get(), threads);
    require(code == 0, "%s: dcgan_pack returns %d: %s", describe(l).c_str(), code, dcgan_error());
    int64_t written = 0;
    while (written < floats && bits_of(packed[static_cast<size_t>(written)]) != SENTINEL) ++written;
    require(written == floats, "%s: packed weight %lld of %lld is not written", describe(l).c_str(),
            static_cast<long long>(written), static_cast<long long>(floats));
    l.weights = packed.get();
    return *this;
}

const char* algorithm_name(int algorithm) {
    static const char* const names[] = {"dense", "direct", "F2", "F4", "narrow"};
    return names[algorithm];
}

const char* activation_name(int act) {
    static const char* const names[] = {"none", "relu", "leaky_relu", "tanh", "sigmoid"};
    return names[act];
}

std::string describe(const dcgan_layer& l) {
    char text[200];
    std::snprintf(text, sizeof text, "%s %s k%d s%d p%d %d→%d on %d×%d, %s%s%s%s%s",
                  algorithm_name(l.algorithm), l.transposed ? "up" : "down", l.kernel, l.stride, l.padding,
                  l.c_in, l.c_out, l.height, l.width, activation_name(l.act), l.bias ? ", bias" : "",
                  l.scale ? ", scale" : "", l.shift ? ", shift" : "", l.mean ? ", statistics" : "");
    return text;
}

void Totals::add(int algorithm, double error) {
    worst[algorithm] = std::max(worst[algorithm], error);
}

std::string Totals::summary() const {
    std::string text = std::to_string(runs) + " runs; largest error:";
    for (int algorithm = 0; algorithm < 5; ++algorithm) {
        char one[40];
        std::snprintf(one, sizeof one, " %s %.1e,", algorithm_name(algorithm), worst[algorithm]);
        if (worst[algorithm] > 0) text += one;
    }
    text.pop_back();
    return text;
}

// --- reference

std::vector<double> reference(const Layer& layer, const Tensor& x) {
    const dcgan_layer& l = layer.l;
    const long images = x.size[0], c_in = l.c_in, c_out = l.c_out;
    const std::vector<float> from = x.values();
    // The weights transposed to [tap][c_in][c_out], so that the inner loop over c_out is contiguous.
    std::vector<double> taps;
    taps.reserve(static_cast<size_t>(layer.weight.count()));
    for (long tap = 0; tap < l.kernel * l.kernel; ++tap)
        for (long i = 0; i < c_in; ++i)
            for (long o = 0; o < c_out; ++o)
                taps.push_back(layer.weight.at(l.transposed ? i : o, l.transposed ? o : i, tap / l.kernel,
                                               tap % l.kernel));
    std::vector<double> y(static_cast<size_t>(images * layer.out_height() * layer.out_width() * c_out), 0.0);
    each_connection(l, images, [&](long tap, long small, long large) {
        const double* w = taps.data() + tap * c_in * c_out;
        const float* const in = from.data() + (l.transposed ? small : large) * c_in;
        double* const to = y.data() + (l.transposed ? large : small) * c_out;
        for (long i = 0; i < c_in; ++i, w += c_out)
            for (long o = 0; o < c_out; ++o) to[o] += static_cast<double>(in[i]) * w[o];
    });
    for (size_t i = 0; i < y.size(); ++i) {
        const size_t c = i % static_cast<size_t>(c_out);
        if (l.bias) y[i] += l.bias[c];
        if (l.mean) y[i] = (y[i] - l.mean[c]) / std::sqrt(static_cast<double>(l.variance[c]) + l.epsilon);
        y[i] = y[i] * (l.scale ? l.scale[c] : 1.0) + (l.shift ? l.shift[c] : 0.0);
    }
    return y;
}

double activated(int act, double x) {
    switch (act) {
        case DCGAN_RELU:
            return x < 0 ? 0 : x;
        case DCGAN_LEAKY_RELU:
            return x < 0 ? x * static_cast<double>(SLOPE) : x;
        case DCGAN_TANH:
            return std::tanh(x);
        case DCGAN_SIGMOID:
            return 1 / (1 + std::exp(-x));
        default:
            return x;
    }
}

void run(const dcgan_layer* layers, int count, const Tensor& x, const Tensor& y, int threads) {
    const std::string description = describe(layers[0]) + (count > 1 ? " and following layers" : "");
    const dcgan_tensor from = x.view(), to = y.view();
    const int code = dcgan_run(layers, count, x.size[0], &from, &to, threads);
    require(code == 0, "%s: dcgan_run returns %d: %s", description.c_str(), code, dcgan_error());
    require(y.guards_intact(), "%s, %ld images, %d threads: wrote outside of y", description.c_str(),
            x.size[0], threads);
}

void run(const Layer& layer, const Tensor& x, const Tensor& y, int threads) {
    run(&layer.l, 1, x, y, threads);
}
