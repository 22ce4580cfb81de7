// The gradients of a layer's weights and of its epilogue's scale and shift, compared with their definition in
// float64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "support.h"

namespace {

// As in test_layers.cpp; the F4 transforms of du add about as much error as those of x̂.
constexpr double BOUND = 5e-6;

using Floats = std::unique_ptr<float[]>;

Floats random_around(Random& random, long count, float middle) {
    Floats values(new float[static_cast<size_t>(count)]);
    for (long i = 0; i < count; ++i) values[static_cast<size_t>(i)] = middle + uniform(random, 0.5f);
    return values;
}

// A dcgan_op that owns its parameters and maps.
struct Case {
    dcgan_op op{};
    long images, out_height, out_width;
    Floats center, scale, shift, out_scale, mean, dmean, dvariance;
    Tensor x, dy, y, weight;
    // The reference dweight, and the norm that it would have if all products had independent signs, relative
    // to which rounding errors are measured where they cancel.
    std::vector<double> expected;
    double size = 0;
    // The same for dout_scale and dout_shift, without statistics.
    std::vector<double> expected_scale, expected_shift;
    double scale_size = 0, shift_size = 0;

    Case(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
         long height, long width, long count)
        : images(count),
          out_height(transposed ? (height - 1) * stride - 2 * padding + kernel
                                : (height + 2 * padding - kernel) / stride + 1),
          out_width(transposed ? (width - 1) * stride - 2 * padding + kernel
                               : (width + 2 * padding - kernel) / stride + 1),
          x(Tensor::random(random, Layout::NHWC, count, c_in, height, width)),
          dy(Tensor::random(random, Layout::NHWC, count, c_out, out_height, out_width)),
          y(Tensor::random(random, Layout::NHWC, count, c_out, out_height, out_width)),
          weight(Tensor::random(random, Layout::NCHW, transposed ? c_in : c_out, transposed ? c_out : c_in,
                                kernel, kernel)) {
        op.transposed = transposed;
        op.c_in = static_cast<int32_t>(c_in);
        op.c_out = static_cast<int32_t>(c_out);
        op.height = static_cast<int32_t>(height);
        op.width = static_cast<int32_t>(width);
        op.kernel = kernel;
        op.stride = stride;
        op.padding = padding;
        op.slope = SLOPE;
    }

    Case& with_prologue(Random& random, int act, bool affine) {
        op.in_act = act;
        if (!affine) return *this;
        center = random_around(random, op.c_in, 0.0f);
        scale = random_around(random, op.c_in, 1.0f);
        shift = random_around(random, op.c_in, 0.0f);
        op.center = center.get();
        op.scale = scale.get();
        op.shift = shift.get();
        return *this;
    }
    Case& with_epilogue(Random& random, int act, bool scaled) {
        op.out_act = act;
        if (!scaled) return *this;
        out_scale = random_around(random, op.c_out, 1.0f);
        op.out_scale = out_scale.get();
        return *this;
    }
    Case& with_statistics(Random& random) {
        op.statistics = 1;
        const float pixels = static_cast<float>(images * out_height * out_width);
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
    // Chooses the prologue and epilogue at random.
    Case& randomize(Random& random) {
        const auto pick = [&](unsigned long choices) { return static_cast<int>(random() % choices); };
        with_prologue(random, pick(3), pick(2) > 0);
        if (pick(2)) return with_statistics(random);
        return with_epilogue(random, pick(DCGAN_SIGMOID + 1), pick(2) > 0);
    }

    long first() const { return op.transposed ? op.c_in : op.c_out; }
    long second() const { return op.transposed ? op.c_out : op.c_in; }

    // x̂ and du as [pixel][channel].
    std::vector<double> x_hat() const {
        std::vector<double> all;
        for (long i = 0; i < x.count(); ++i) {
            const long c = i % op.c_in;
            double value = x.data[i];
            if (op.scale) value = (value - op.center[c]) * op.scale[c] + op.shift[c];
            all.push_back(activated(op.in_act, value));
        }
        return all;
    }
    std::vector<double> du() const {
        std::vector<double> all;
        const double pixels = static_cast<double>(images * out_height * out_width);
        for (long i = 0; i < dy.count(); ++i) {
            const long c = i % op.c_out;
            const double out = y.data[i];
            double value = dy.data[i];
            if (op.statistics) {
                value += op.dmean[c] / pixels + 2 * op.dvariance[c] / pixels * (out - op.mean[c]);
            } else {
                if (op.out_act == DCGAN_RELU) value *= out > 0;
                if (op.out_act == DCGAN_LEAKY_RELU) value *= out > 0 ? 1.0 : static_cast<double>(SLOPE);
                if (op.out_act == DCGAN_TANH) value *= 1 - out * out;
                if (op.out_act == DCGAN_SIGMOID) value *= out * (1 - out);
                if (op.out_scale) value *= op.out_scale[c];
            }
            all.push_back(value);
        }
        return all;
    }

    // By the definition: tap k connects pixel p of the small map with p·stride - padding + k of the large
    // one.
    Case& compute_reference() {
        const std::vector<double> in = x_hat(), out = du();
        const std::vector<double>&small = op.transposed ? in : out, &large = op.transposed ? out : in;
        const long small_h = op.transposed ? op.height : out_height,
                   small_w = op.transposed ? op.width : out_width;
        const long large_h = op.transposed ? out_height : op.height,
                   large_w = op.transposed ? out_width : op.width;
        const long taps = op.kernel * op.kernel;
        // [k][k][first][second], so that the inner loop is contiguous.
        std::vector<double> sums(static_cast<size_t>(taps * first() * second()), 0.0);
        for (long n = 0; n < images; ++n)
            for (long p = 0; p < small_h; ++p)
                for (long q = 0; q < small_w; ++q)
                    for (long tap = 0; tap < taps; ++tap) {
                        const long r = p * op.stride - op.padding + tap / op.kernel;
                        const long c = q * op.stride - op.padding + tap % op.kernel;
                        if (r < 0 || r >= large_h || c < 0 || c >= large_w) continue;
                        const double* const s = small.data() + ((n * small_h + p) * small_w + q) * first();
                        const double* const l = large.data() + ((n * large_h + r) * large_w + c) * second();
                        double* to = sums.data() + tap * first() * second();
                        for (long i = 0; i < first(); ++i)
                            for (long j = 0; j < second(); ++j) {
                                const double product = s[i] * l[j];
                                *to++ += product;
                                size += product * product;
                            }
                    }
        double squares = 0;
        for (long i = 0; i < first(); ++i)
            for (long tap = 0; tap < taps; ++tap)
                for (long j = 0; j < second(); ++j) {
                    expected.push_back(sums[static_cast<size_t>((tap * first() + i) * second() + j)]);
                    squares += expected.back() * expected.back();
                }
        if (!op.statistics) compute_affine_reference(out, sums);
        size = std::sqrt(std::max(size, squares));
        return *this;
    }
    // From du and the sums of compute_reference(), both of which contain the scale that e does not.
    void compute_affine_reference(const std::vector<double>& out, const std::vector<double>& sums) {
        const auto unscaled = [&](double value, long c) {
            return op.out_scale ? value / op.out_scale[c] : value;
        };
        expected_scale.assign(static_cast<size_t>(op.c_out), 0.0);
        expected_shift.assign(static_cast<size_t>(op.c_out), 0.0);
        for (size_t i = 0; i < out.size(); ++i) {
            const long c = static_cast<long>(i) % op.c_out;
            const double e = unscaled(out[i], c);
            expected_shift[static_cast<size_t>(c)] += e;
            shift_size += e * e;
        }
        size_t at = 0;
        for (long tap = 0; tap < op.kernel * op.kernel; ++tap)
            for (long i = 0; i < first(); ++i)
                for (long j = 0; j < second(); ++j) {
                    const long c = op.transposed ? j : i;
                    const double w = weight.at(i, j, tap / op.kernel, tap % op.kernel);
                    expected_scale[static_cast<size_t>(c)] += w * unscaled(sums[at++], c);
                }
        // The products counted in `size`, times weights with a mean square of 1/3; the scale is about 1.
        scale_size = std::sqrt(size / 3);
        shift_size = std::sqrt(shift_size);
        for (const double value : expected_scale) scale_size = std::max(scale_size, std::abs(value));
    }

    std::string describe(int algorithm, Layout layout) const {
        char text[200];
        std::snprintf(
            text, sizeof text, "wgrad, %s %s k%d s%d p%d %d→%d on %d×%d, %ld images, %s%s, %s%s, to %s",
            algorithm_name(algorithm), op.transposed ? "up" : "down", op.kernel, op.stride, op.padding,
            op.c_in, op.c_out, op.height, op.width, images, activation_name(op.in_act),
            op.scale ? " of affine" : "", op.statistics ? "statistics" : activation_name(op.out_act),
            op.out_scale ? ", scaled" : "", name(layout));
        return text;
    }
};

struct Totals {
    long runs = 0;
    double worst[5] = {};  // largest error by algorithm
};

double error(const std::vector<uint32_t>& bits, const std::vector<double>& expected, double size) {
    double difference = 0;
    for (size_t i = 0; i < bits.size(); ++i) {
        float got;
        std::memcpy(&got, &bits[i], sizeof got);
        difference += (got - expected[i]) * (got - expected[i]);
    }
    return difference == 0 ? 0 : std::sqrt(difference) / size;  // 0 / 0 where ReLU clears everything
}

// Tests the same call with dout_scale, and dcgan_shift_gradient.
void compare_affine(const Case& c, const std::string& description, Layout layout, int threads,
                    std::vector<uint32_t>& one) {
    const Tensor dweight = Tensor::output(layout, c.first(), c.second(), c.op.kernel, c.op.kernel);
    const Tensor dscale = Tensor::output(Layout::NHWC, 1, c.op.c_out, 1, 1);
    const Tensor dshift = Tensor::output(Layout::NHWC, 1, c.op.c_out, 1, 1);
    const int code = dcgan_wgrad(&c.op, c.images, c.x.data, c.dy.data, c.y.data, dweight.data,
                                 dweight.strides, c.weight.data, c.weight.strides, dscale.data, threads);
    require(code == 0, "%s, dout_scale: returns %d: %s", description.c_str(), code, dcgan_error());
    const int other = dcgan_shift_gradient(&c.op, c.images, c.dy.data, c.y.data, dshift.data, threads);
    require(other == 0, "%s, dout_shift: returns %d: %s", description.c_str(), other, dcgan_error());
    std::vector<uint32_t> all;
    const struct {
        const char* name;
        const Tensor& got;
        const std::vector<double>& expected;
        double size;
    } results[] = {{"dweight with dout_scale", dweight, c.expected, c.size},
                   {"dout_scale", dscale, c.expected_scale, c.scale_size},
                   {"dout_shift", dshift, c.expected_shift, c.shift_size}};
    for (const auto& r : results) {
        require(r.got.guards_intact(), "%s, %d threads: wrote out of bounds of %s", description.c_str(),
                threads, r.name);
        const std::vector<uint32_t> bits = r.got.bits();
        const double e = error(bits, r.expected, r.size);
        require(e <= BOUND, "%s: relative error %.2e in %s", description.c_str(), e, r.name);
        all.insert(all.end(), bits.begin(), bits.end());
    }
    if (one.empty()) one = all;
    require(all == one, "%s: %d threads and one thread give different bits", description.c_str(), threads);
}

// Tests every instruction set with one, two and seven threads.
void compare(Case& c, int algorithm, Layout layout, Totals& totals) {
    c.op.algorithm = algorithm;
    const std::string description = c.describe(algorithm, layout);
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        std::vector<uint32_t> one, one_affine;
        // The first run has fresh memory (NaN in the checked build), the others reuse it.
        dcgan_release();
        for (const int threads : {1, 2, 7}) {
            const Tensor dweight = Tensor::output(layout, c.first(), c.second(), c.op.kernel, c.op.kernel);
            const int code = dcgan_wgrad(&c.op, c.images, c.x.data, c.dy.data, c.y.data, dweight.data,
                                         dweight.strides, nullptr, nullptr, nullptr, threads);
            require(code == 0, "%s: returns %d: %s", description.c_str(), code, dcgan_error());
            require(dweight.guards_intact(), "%s, %d threads: wrote out of bounds of dweight",
                    description.c_str(), threads);
            ++totals.runs;
            if (!c.op.statistics) compare_affine(c, description, layout, threads, one_affine);
            const std::vector<uint32_t> bits = dweight.bits();
            if (threads > 1) {
                require(bits == one, "%s: %d threads and one thread give different bits", description.c_str(),
                        threads);
                continue;
            }
            const double e = error(bits, c.expected, c.size);
            require(e <= BOUND, "%s: relative error %.2e", description.c_str(), e);
            totals.worst[algorithm] = std::max(totals.worst[algorithm], e);
            one = bits;
        }
    }
}

}  // namespace

void test_wgrad() {
    Random random(11);
    Totals totals;
    const long channels[] = {1, 3, 5, 7, 16, 17, 33, 100};
    const long maps[][2] = {{2, 2}, {3, 5}, {4, 4}, {7, 2}, {8, 8}, {9, 19}, {1, 1}};
    const Layout layouts[] = {Layout::NCHW, Layout::NHWC, Layout::PADDED, Layout::SCATTERED};
    // All pairs of channels in both directions; maps and layouts cycle along the rows and columns of the
    // pairs.
    for (long i = 0; i < 8; ++i)
        for (long j = 0; j < 8; ++j)
            for (const bool transposed : {false, true}) {
                const auto& map = maps[(i + j) % (transposed ? 7 : 6)];  // a convolution needs at least 2×2
                Case c(random, transposed, 4, 2, 1, channels[i], channels[j], map[0], map[1],
                       1 + (i + 2 * j) % 5);
                c.randomize(random).compute_reference();
                for (const int algorithm : {DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW})
                    compare(c, algorithm, layouts[(i + 2 * j + algorithm) % 4], totals);
            }
    // Every prologue of either map, with full and with partial vectors.
    for (int act = DCGAN_NONE; act <= DCGAN_LEAKY_RELU; ++act)
        for (const bool affine : {false, true})
            for (int out = DCGAN_NONE; out <= DCGAN_SIGMOID + 1; ++out)
                for (const int algorithm : {DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW}) {
                    const bool transposed = (act + out) % 2;
                    Case c(random, transposed, 4, 2, 1, transposed ? 16 : 3, transposed ? 3 : 16, 6, 5, 2);
                    c.with_prologue(random, act, affine);
                    if (out > DCGAN_SIGMOID)
                        c.with_statistics(random);
                    else
                        c.with_epilogue(random, out, affine);
                    compare(c.compute_reference(), algorithm, Layout::NCHW, totals);
                }
    for (const int kernel : {1, 2, 3, 4, 7})
        for (long i = 0; i < 8; ++i)
            for (const bool transposed : {false, true}) {
                const long side = transposed ? 1 : kernel;
                Case c(random, transposed, kernel, 1 + static_cast<int>(i % 2), 0, channels[i],
                       channels[(3 * i + kernel) % 8], side, side, 1 + (i + kernel) % 5);
                compare(c.randomize(random).compute_reference(), DCGAN_DENSE, layouts[(i + kernel) % 4],
                        totals);
            }
    // Enough tiles, pixels or images for several K blocks, the last one shorter.
    for (const bool transposed : {false, true}) {
        const auto test_k_blocks = [&](int algorithm, long few, long many, long height, long width,
                                       long images) {
            const long c_in = transposed ? many : few, c_out = transposed ? few : many;
            const bool dense = algorithm == DCGAN_DENSE;
            Case c(random, transposed, 4, dense ? 1 : 2, dense ? 0 : 1, c_in, c_out,
                   transposed ? height
                   : dense    ? 4
                              : 2 * height,
                   transposed ? width
                   : dense    ? 4
                              : 2 * width + 1,
                   images);
            compare(c.with_prologue(random, DCGAN_RELU, true).with_statistics(random).compute_reference(),
                    algorithm, Layout::NCHW, totals);
        };
        test_k_blocks(DCGAN_F4, 17, 20, 17, 19, 23);
        test_k_blocks(DCGAN_DIRECT, 17, 20, 11, 12, 7);
        test_k_blocks(DCGAN_NARROW, 1, 64, 15, 21, 9);
        test_k_blocks(DCGAN_NARROW, 3, 33, 5, 150, 3);
    }
    for (const bool transposed : {false, true}) {
        const long side = transposed ? 1 : 4;
        Case c(random, transposed, 4, 1, 0, 20, 17, side, side, 600);
        compare(c.randomize(random).compute_reference(), DCGAN_DENSE, Layout::NCHW, totals);
    }
    // Weights with the layout of dweight, so that output channels, input channels or taps are contiguous in
    // both; then a map of a million pixels with one channel, whose sum of ones is exact.
    for (const Layout layout : layouts)
        for (const bool transposed : {false, true}) {
            Case c(random, transposed, 4, 2, 1, 19, 21, 4, 6, 2);
            c.with_epilogue(random, DCGAN_TANH, true);
            Tensor weight = Tensor::input(layout, c.first(), c.second(), 4, 4);
            for (long i = 0; i < c.first(); ++i)
                for (long j = 0; j < c.second(); ++j)
                    for (long tap = 0; tap < 16; ++tap)
                        weight.at(i, j, tap / 4, tap % 4) = c.weight.at(i, j, tap / 4, tap % 4);
            c.weight = std::move(weight);
            compare(c.compute_reference(), DCGAN_F4, layout, totals);
        }
    {
        Case c(random, true, 4, 2, 1, 1, 1, 512, 512, 1);
        c.op.algorithm = DCGAN_DIRECT;
        std::fill(c.dy.data, c.dy.data + c.dy.count(), 1.0f);
        float sum = 0;
        require(dcgan_shift_gradient(&c.op, 1, c.dy.data, nullptr, &sum, 2) == 0, "%s", dcgan_error());
        require(sum == 1048576.0f, "the sum of %ld ones is %.1f", c.dy.count(), static_cast<double>(sum));
    }
    report("wgrad: %ld runs; largest error: dense %.1e, direct %.1e, F4 %.1e, narrow %.1e", totals.runs,
           totals.worst[0], totals.worst[1], totals.worst[3], totals.worst[4]);
}

void test_wgrad_arguments() {
    Random random(12);
    Case c(random, false, 4, 2, 1, 5, 6, 6, 8, 2);
    c.with_epilogue(random, DCGAN_TANH, true);
    c.op.algorithm = DCGAN_F4;
    const Tensor dweight = Tensor::output(Layout::NCHW, 6, 5, 4, 4);
    const Tensor sums = Tensor::output(Layout::NHWC, 1, 6, 1, 1);
    struct Call {
        dcgan_op op;
        int64_t images;
        const float *x, *dy, *y, *weight;
        const int64_t* strides;
        int threads;
        float* dout_shift;
    };
    const auto valid = [&] {
        return Call{c.op, 2, c.x.data, c.dy.data, c.y.data, c.weight.data, c.weight.strides, 1, sums.data};
    };
    const auto wgrad = [&](const Call& a) {
        return dcgan_wgrad(&a.op, a.images, a.x, a.dy, a.y, dweight.data, dweight.strides, a.weight,
                           a.strides, sums.data, a.threads);
    };
    const auto shift = [](const Call& a) {
        return dcgan_shift_gradient(&a.op, a.images, a.dy, a.y, a.dout_shift, a.threads);
    };
    const struct {
        const char* names;  // must occur in the error message
        bool of_wgrad, of_shift;
        std::function<void(Call&)> invalidate;
    } invalid[] = {
        {"statistics", true, true,
         [](Call& a) { a.op.statistics = 1, a.op.out_act = DCGAN_NONE, a.op.out_scale = nullptr; }},
        {"weight is null", true, false, [](Call& a) { a.weight = nullptr; }},
        {"weight_strides is null", true, false, [](Call& a) { a.strides = nullptr; }},
        {"dout_shift is null", false, true, [](Call& a) { a.dout_shift = nullptr; }},
        {"dy is null", true, true, [](Call& a) { a.dy = nullptr; }},
        {"y is null", true, true, [](Call& a) { a.y = nullptr; }},
        {"c_out", true, true, [](Call& a) { a.op.c_out = 0; }},
        {"images", true, true, [](Call& a) { a.images = -1; }},
        {"threads", true, true, [](Call& a) { a.threads = 0; }},
    };
    long cases = 0;
    for (const auto& w : invalid) {
        Call a = valid();
        w.invalidate(a);
        for (const bool of_shift : {false, true}) {
            if (!(of_shift ? w.of_shift : w.of_wgrad)) continue;
            const int code = of_shift ? shift(a) : wgrad(a);
            require(code == DCGAN_EARGUMENT && std::strstr(dcgan_error(), w.names) != nullptr,
                    "an invalid %s returns %d: %s", w.names, code, dcgan_error());
            ++cases;
        }
        require(dweight.untouched() && sums.untouched(), "a call with an invalid %s writes", w.names);
    }
    require(dcgan_shift_gradient(nullptr, 1, c.dy.data, c.y.data, sums.data, 1) == DCGAN_EARGUMENT,
            "dcgan_shift_gradient accepts a null op");
    Call none = valid();
    none.images = 0;
    require(wgrad(none) == 0 && shift(none) == 0 && sums.untouched(), "zero images: %s", dcgan_error());
    require(wgrad(valid()) == 0 && shift(valid()) == 0, "valid arguments: %s", dcgan_error());
    report("wgrad arguments: %ld invalid cases rejected", cases);
}
