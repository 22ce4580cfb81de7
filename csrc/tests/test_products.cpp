// fprop and dgrad compared with their definition in float64, and the rejection of invalid arguments.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>

#include "support.h"

namespace {

// As in test_layers.cpp. A dgrad is also a single product, of a du that is exact up to a few roundings.
constexpr double BOUND = 5e-6;
const int SPATIAL[] = {DCGAN_DIRECT, DCGAN_F2, DCGAN_NARROW, DCGAN_F4};

using Floats = std::unique_ptr<float[]>;
using Doubles = std::vector<double>;

Floats random_around(Random& random, long count, float middle) {
    Floats values(new float[static_cast<size_t>(count)]);
    for (long i = 0; i < count; ++i) values[static_cast<size_t>(i)] = middle + uniform(random, 0.5f);
    return values;
}

// Sums, and the sums of the squares of their terms. The latter give the size that the sums would have without
// cancellation, relative to which rounding errors are measured where a sum cancels.
struct Sums {
    Doubles values, squares;

    explicit Sums(long count) : values(static_cast<size_t>(count)), squares(static_cast<size_t>(count)) {}
    void add(long i, double term) {
        values[static_cast<size_t>(i)] += term;
        squares[static_cast<size_t>(i)] += term * term;
    }
};

double error(const std::vector<uint32_t>& bits, const Sums& expected) {
    double difference = 0, values = 0, squares = 0;
    for (size_t i = 0; i < bits.size(); ++i) {
        float got;
        std::memcpy(&got, &bits[i], sizeof got);
        difference += (got - expected.values[i]) * (got - expected.values[i]);
        values += expected.values[i] * expected.values[i];
        squares += expected.squares[i];
    }
    return difference == 0 ? 0 : std::sqrt(difference / std::max(values, squares));  // NaN propagates
}

struct Size {
    long height, width;
};

// A dcgan_op that owns its parameters and maps, with the reference results.
struct Case {
    dcgan_op op{};
    long images;
    Size in, out;
    Floats center, scale, shift, out_scale, out_shift, mean, dmean, dvariance;
    Tensor weight, x, dy, y;
    Sums u, dx_hat;  // the raw products

    Case(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
         Size map, long count, Layout weights = Layout::NCHW)
        : images(count),
          in(map),
          out{side(transposed, kernel, stride, padding, map.height),
              side(transposed, kernel, stride, padding, map.width)},
          weight(Tensor::random(random, weights, transposed ? c_in : c_out, transposed ? c_out : c_in, kernel,
                                kernel)),
          x(Tensor::random(random, Layout::NHWC, count, c_in, in.height, in.width)),
          dy(Tensor::random(random, Layout::NHWC, count, c_out, out.height, out.width)),
          y(Tensor::random(random, Layout::NHWC, count, c_out, out.height, out.width)),
          u(y.count()),
          dx_hat(x.count()) {
        op.transposed = transposed;
        op.c_in = static_cast<int32_t>(c_in);
        op.c_out = static_cast<int32_t>(c_out);
        op.height = static_cast<int32_t>(in.height);
        op.width = static_cast<int32_t>(in.width);
        op.kernel = kernel;
        op.stride = stride;
        op.padding = padding;
        op.slope = SLOPE;
    }

    static long side(bool transposed, int kernel, int stride, int padding, long side) {
        return transposed ? (side - 1) * stride - 2 * padding + kernel
                          : (side + 2 * padding - kernel) / stride + 1;
    }

    Case& with_prologue(Random& random, int act, bool affine) {
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
    Case& with_epilogue(Random& random, int act, bool with_scale, bool with_shift) {
        op.out_act = act;
        if (with_scale) out_scale = random_around(random, op.c_out, 1.0f);
        if (with_shift) out_shift = random_around(random, op.c_out, 0.0f);
        op.out_scale = out_scale.get();
        op.out_shift = out_shift.get();
        return *this;
    }
    Case& with_statistics(Random& random) {
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
    // Chooses the prologue and epilogue at random.
    Case& randomize(Random& random) {
        const auto pick = [&](unsigned long choices) { return static_cast<int>(random() % choices); };
        with_prologue(random, pick(3), pick(2) > 0);
        if (pick(2)) return with_statistics(random);
        const bool with_scale = pick(2) > 0, with_shift = pick(2) > 0;
        return with_epilogue(random, pick(DCGAN_SIGMOID + 1), with_scale, with_shift);
    }

    bool has_prologue() const { return op.scale != nullptr || op.in_act != DCGAN_NONE; }
    // Whether the gradient depends on y.
    bool reads_y() const { return op.statistics ? op.dmean || op.dvariance : op.out_act != DCGAN_NONE; }

    double pre_activation(long i) const {
        const long c = i % op.c_in;
        const double value = x.data[i];
        return op.scale ? (value - op.center[c]) * op.scale[c] + op.shift[c] : value;
    }
    double du(long i) const {
        const long c = i % op.c_out;
        const double at = y.data[i], pixels = static_cast<double>(images * out.height * out.width);
        double value = dy.data[i];
        if (op.statistics) {
            if (op.dmean) value += op.dmean[c] / pixels;
            if (op.dvariance) value += 2 * op.dvariance[c] / pixels * (at - op.mean[c]);
            return value;
        }
        if (op.out_act == DCGAN_RELU) value *= at > 0;
        if (op.out_act == DCGAN_LEAKY_RELU) value *= at > 0 ? 1.0 : static_cast<double>(SLOPE);
        if (op.out_act == DCGAN_TANH) value *= 1 - at * at;
        if (op.out_act == DCGAN_SIGMOID) value *= at * (1 - at);
        return op.out_scale ? value * op.out_scale[c] : value;
    }

    // By the definition: tap k connects pixel p of the small map with p·stride - padding + k of the large
    // one.
    Case& compute_reference() {
        Doubles x_hat, gradient;
        for (long i = 0; i < x.count(); ++i) x_hat.push_back(activated(op.in_act, pre_activation(i)));
        for (long i = 0; i < dy.count(); ++i) gradient.push_back(du(i));
        const long channels = op.transposed ? op.c_in : op.c_out, others = op.transposed ? op.c_out : op.c_in;
        const Size small = op.transposed ? in : out, large = op.transposed ? out : in;
        const Doubles& of_small = op.transposed ? x_hat : gradient;
        const Doubles& of_large = op.transposed ? gradient : x_hat;
        Sums& to_small = op.transposed ? dx_hat : u;
        Sums& to_large = op.transposed ? u : dx_hat;
        Doubles taps;  // [k][k][small channel][large channel]
        for (long tap = 0; tap < op.kernel * op.kernel; ++tap)
            for (long i = 0; i < channels; ++i)
                for (long j = 0; j < others; ++j)
                    taps.push_back(weight.at(i, j, tap / op.kernel, tap % op.kernel));
        for (long n = 0; n < images; ++n)
            for (long p = 0; p < small.height; ++p)
                for (long q = 0; q < small.width; ++q)
                    for (long tap = 0; tap < op.kernel * op.kernel; ++tap) {
                        const long r = p * op.stride - op.padding + tap / op.kernel;
                        const long c = q * op.stride - op.padding + tap % op.kernel;
                        if (r < 0 || r >= large.height || c < 0 || c >= large.width) continue;
                        const long s = ((n * small.height + p) * small.width + q) * channels;
                        const long l = ((n * large.height + r) * large.width + c) * others;
                        const double* w = taps.data() + tap * channels * others;
                        for (long i = 0; i < channels; ++i)
                            for (long j = 0; j < others; ++j, ++w) {
                                to_small.add(s + i, of_large[static_cast<size_t>(l + j)] * *w);
                                to_large.add(l + j, of_small[static_cast<size_t>(s + i)] * *w);
                            }
                    }
        return *this;
    }

    Sums expected_y() const {
        Sums expected = u;
        if (op.statistics) return expected;
        for (size_t i = 0; i < expected.values.size(); ++i) {
            const size_t c = i % static_cast<size_t>(op.c_out);
            const double factor = op.out_scale ? op.out_scale[c] : 1.0;
            const double term = op.out_shift ? op.out_shift[c] : 0.0;
            expected.values[i] = activated(op.out_act, expected.values[i] * factor + term);
            expected.squares[i] = expected.squares[i] * factor * factor + term * term;
        }
        return expected;
    }
    // Mean and variance.
    std::vector<Sums> expected_statistics() const {
        std::vector<Sums> expected(2, Sums(op.c_out));
        const double pixels = static_cast<double>(images * out.height * out.width);
        const auto channel = [&](size_t i) { return i % static_cast<size_t>(op.c_out); };
        for (size_t i = 0; i < u.values.size(); ++i) expected[0].values[channel(i)] += u.values[i] / pixels;
        for (size_t i = 0; i < u.values.size(); ++i) {
            const double off = u.values[i] - expected[0].values[channel(i)];
            expected[1].values[channel(i)] += off * off / pixels;
            expected[0].squares[channel(i)] += u.squares[i] / pixels;
        }
        for (size_t c = 0; c < expected[1].squares.size(); ++c)
            expected[1].squares[c] = expected[0].squares[c] * expected[0].squares[c];
        return expected;
    }
    // dx, dcenter, dscale, dshift.
    std::vector<Sums> expected_gradients() const {
        std::vector<Sums> expected = {dx_hat, Sums(op.c_in), Sums(op.c_in), Sums(op.c_in)};
        for (long i = 0; i < x.count(); ++i) {
            const size_t at = static_cast<size_t>(i);
            const long c = i % op.c_in;
            const bool negative = pre_activation(i) < 0;
            const double low = op.in_act == DCGAN_RELU ? 0.0 : static_cast<double>(SLOPE);
            const double slope = op.in_act != DCGAN_NONE && negative ? low : 1.0;
            const double factor = slope * (op.scale ? op.scale[c] : 1.0);
            expected[0].values[at] *= factor;
            expected[0].squares[at] *= factor * factor;
            if (!op.scale) continue;
            const double g = dx_hat.values[at] * slope;
            expected[1].add(c, -g * op.scale[c]);
            expected[2].add(c, g * (x.data[i] - static_cast<double>(op.center[c])));
            expected[3].add(c, g);
        }
        return expected;
    }

    std::string describe(const char* product, int threads) const {
        char text[250];
        std::snprintf(
            text, sizeof text, "%s, %s %s k%d s%d p%d %d→%d on %d×%d, %ld images, %s%s, %s%s%s, %d threads",
            product, algorithm_name(op.algorithm), op.transposed ? "up" : "down", op.kernel, op.stride,
            op.padding, op.c_in, op.c_out, op.height, op.width, images, activation_name(op.in_act),
            op.scale ? " of affine" : "", op.statistics ? "statistics" : activation_name(op.out_act),
            op.out_scale ? ", scaled" : "", op.out_shift ? ", shifted" : "", threads);
        return text;
    }
};

// The outputs of one call, guarded, and their concatenated bits.
struct Results {
    std::vector<Tensor> tensors;

    std::vector<uint32_t> bits() const {
        std::vector<uint32_t> all;
        for (const Tensor& t : tensors) {
            const std::vector<uint32_t> own = t.bits();
            all.insert(all.end(), own.begin(), own.end());
        }
        return all;
    }
};

Tensor vector_of(long count) {
    return Tensor::output(Layout::NHWC, 1, count, 1, 1);
}

Results fprop(const Case& c, int threads) {
    Results r;
    r.tensors.push_back(Tensor::output(Layout::NHWC, c.images, c.op.c_out, c.out.height, c.out.width));
    if (c.op.statistics)
        for (int i = 0; i < 2; ++i) r.tensors.push_back(vector_of(c.op.c_out));
    const bool gathers = c.op.statistics;
    const int code =
        dcgan_fprop(&c.op, c.images, c.x.data, c.weight.data, c.weight.strides, r.tensors[0].data,
                    gathers ? r.tensors[1].data : nullptr, gathers ? r.tensors[2].data : nullptr, threads);
    require(code == 0, "%s: returns %d: %s", c.describe("fprop", threads).c_str(), code, dcgan_error());
    return r;
}

// Passes null for all optional pointers that are not needed.
Results dgrad(const Case& c, int threads, bool with_sums = true) {
    Results r;
    r.tensors.push_back(Tensor::output(Layout::NHWC, c.images, c.op.c_in, c.in.height, c.in.width));
    const bool sums = with_sums && c.op.scale != nullptr;
    if (sums)
        for (int i = 0; i < 3; ++i) r.tensors.push_back(vector_of(c.op.c_in));
    const auto sum = [&](size_t i) { return sums ? r.tensors[i].data : nullptr; };
    const int code = dcgan_dgrad(&c.op, c.images, c.dy.data, c.reads_y() ? c.y.data : nullptr, c.weight.data,
                                 c.weight.strides, c.has_prologue() ? c.x.data : nullptr, r.tensors[0].data,
                                 sum(1), sum(2), sum(3), threads);
    require(code == 0, "%s: returns %d: %s", c.describe("dgrad", threads).c_str(), code, dcgan_error());
    return r;
}

struct Totals {
    long runs = 0;
    double worst[5] = {};  // largest error by algorithm
};

void compare(const Case& c, const char* product, const std::function<Results(int)>& run,
             const std::vector<Sums>& expected, Totals& totals) {
    static const char* const names[][4] = {{"y", "mean", "variance", ""},
                                           {"dx", "dcenter", "dscale", "dshift"}};
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        // The first run has fresh memory (NaN in the checked build), the others reuse it.
        dcgan_release();
        for (const int threads : {1, 2, 7}) {
            const std::string description = c.describe(product, threads);
            const Results first = run(threads);
            ++totals.runs;
            for (size_t i = 0; i < first.tensors.size(); ++i) {
                const char* const name = names[product[0] == 'd'][i];
                const Tensor& t = first.tensors[i];
                require(t.guards_intact(), "%s: wrote out of bounds of %s", description.c_str(), name);
                const double e = error(t.bits(), expected[i]);
                // A variance is a square, so its relative error is twice that of the values.
                require(e <= (std::strcmp(name, "variance") == 0 ? 2 : 1) * BOUND,
                        "%s: relative error %.2e in %s", description.c_str(), e, name);
                totals.worst[c.op.algorithm] = std::max(totals.worst[c.op.algorithm], e);
            }
            if (threads != 2 || totals.runs % 3 != 0) continue;
            require(run(threads).bits() == first.bits(), "%s: a second run gives different bits",
                    description.c_str());
            dcgan_release();
            require(run(threads).bits() == first.bits(), "%s: different bits after dcgan_release",
                    description.c_str());
            totals.runs += 2;
        }
    }
}

// Tests both products with all algorithms that support them.
void compare(Case& c, const int* algorithms, long count, Totals& totals) {
    std::vector<Sums> forward = {c.expected_y()};
    if (c.op.statistics)
        for (Sums& sums : c.expected_statistics()) forward.push_back(std::move(sums));
    const std::vector<Sums> backward = c.expected_gradients();
    for (long i = 0; i < count; ++i) {
        c.op.algorithm = algorithms[i];
        // The vectors of the narrow algorithm's epilogue run along pixels, so it cannot sum over them.
        const bool narrow = algorithms[i] == DCGAN_NARROW;
        const bool has_fprop = !(narrow && c.op.transposed && c.op.statistics);
        const bool has_dgrad = !(narrow && !c.op.transposed && c.has_prologue());
        for (const int product : {DCGAN_FPROP, DCGAN_DGRAD}) {
            const bool has = product == DCGAN_FPROP ? has_fprop : has_dgrad;
            const char* const name = product == DCGAN_FPROP ? "fprop" : "dgrad";
            require((dcgan_op_supports(&c.op, product) == 0) == has, "%s: dcgan_op_supports returns %d: %s",
                    c.describe(name, 0).c_str(), dcgan_op_supports(&c.op, product), dcgan_error());
            if (!has) continue;
            if (product == DCGAN_FPROP)
                compare(c, name, [&](int threads) { return fprop(c, threads); }, forward, totals);
            else
                compare(c, name, [&](int threads) { return dgrad(c, threads); }, backward, totals);
        }
        if (has_dgrad && c.op.scale != nullptr)
            require(dgrad(c, 2, false).bits() == dgrad(c, 2).tensors[0].bits(),
                    "%s: dx differs without dcenter, dscale and dshift", c.describe("dgrad", 2).c_str());
    }
}

Case example(Random& random, bool transposed) {
    Case c(random, transposed, 4, 2, 1, 9, 6, transposed ? Size{5, 4} : Size{7, 10}, 3);
    c.with_prologue(random, DCGAN_LEAKY_RELU, true).with_statistics(random);
    c.op.algorithm = DCGAN_F4;
    return c;
}

}  // namespace

void test_training() {
    Random random(12);
    Totals totals;
    const long channels[] = {1, 3, 5, 16, 17, 33};
    const Size maps[] = {{2, 2}, {3, 5}, {4, 4}, {7, 2}, {8, 8}, {9, 19}, {1, 1}};
    const Layout layouts[] = {Layout::NCHW, Layout::NHWC, Layout::PADDED, Layout::SCATTERED};
    // All pairs of channels in both directions; maps and layouts cycle along the rows and columns of the
    // pairs, each with half of the algorithms.
    for (long i = 0; i < 6; ++i)
        for (long j = 0; j < 6; ++j)
            for (const bool transposed : {false, true}) {
                const Size map = maps[(i + j) % (transposed ? 7 : 6)];  // a convolution needs at least 2×2
                Case c(random, transposed, 4, 2, 1, channels[i], channels[j], map, 1 + (i + 2 * j) % 3,
                       layouts[(i + 2 * j) % 4]);
                compare(c.randomize(random).compute_reference(), SPATIAL + (i + j / 2) % 2 * 2, 2, totals);
            }
    // Every prologue and epilogue, with full and with partial vectors.
    for (int act = DCGAN_NONE; act <= DCGAN_LEAKY_RELU; ++act)
        for (const bool affine : {false, true})
            for (int out = DCGAN_NONE; out <= DCGAN_SIGMOID + 1; ++out) {
                const bool transposed = (act + out + affine) % 2;
                Case c(random, transposed, 4, 2, 1, transposed ? 16 : 3, transposed ? 3 : 16, {6, 5}, 2);
                c.with_prologue(random, act, affine);
                if (out > DCGAN_SIGMOID)
                    c.with_statistics(random);
                else
                    c.with_epilogue(random, out, out % 2, affine);
                compare(c.compute_reference(), SPATIAL, 4, totals);
            }
    const int dense = DCGAN_DENSE;
    for (const int kernel : {1, 2, 3, 4, 7})
        for (long i = 0; i < 6; ++i)
            for (const bool transposed : {false, true}) {
                const long side = transposed ? 1 : kernel;
                Case c(random, transposed, kernel, 1 + static_cast<int>(i % 2), 0, channels[i],
                       channels[(5 * i + kernel) % 6], {side, side}, 1 + (i + kernel) % 5,
                       layouts[(i + kernel) % 4]);
                compare(c.randomize(random).compute_reference(), &dense, 1, totals);
            }
    // The gradient of only one of the statistics.
    for (const bool of_mean : {false, true}) {
        Case c = example(random, of_mean);
        (of_mean ? c.op.dvariance : c.op.dmean) = nullptr;
        if (of_mean) c.op.mean = nullptr;
        compare(c.compute_reference(), SPATIAL, 2, totals);
    }
    // Several blocks of images, shared by all threads or one per thread; the last block is smaller.
    for (const bool transposed : {false, true}) {
        Case c(random, transposed, 4, 2, 1, transposed ? 9 : 3, transposed ? 3 : 9,
               transposed ? Size{15, 16} : Size{31, 32}, 229);
        const int some[] = {DCGAN_F4, DCGAN_NARROW};
        compare(c.with_prologue(random, DCGAN_RELU, true).with_statistics(random).compute_reference(), some,
                2, totals);
        const long side = transposed ? 1 : 4;
        Case d(random, transposed, 4, 1, 0, transposed ? 9 : 130, transposed ? 130 : 9, {side, side}, 600);
        compare(d.with_prologue(random, DCGAN_LEAKY_RELU, true).with_statistics(random).compute_reference(),
                &dense, 1, totals);
    }
    // Transformed F(4×4) weights of more than 16 MB, which are streamed.
    for (const bool transposed : {false, true}) {
        const int f4 = DCGAN_F4;
        Case c(random, transposed, 4, 2, 1, transposed ? 270 : 163, transposed ? 163 : 270,
               transposed ? Size{5, 2} : Size{11, 4}, 2);
        compare(c.with_prologue(random, DCGAN_RELU, true).with_statistics(random).compute_reference(), &f4, 1,
                totals);
        Case d(random, transposed, 4, 2, 1, 260, 170, transposed ? Size{3, 5} : Size{7, 10}, 1);
        compare(d.with_epilogue(random, DCGAN_TANH, true, true).compute_reference(), &f4, 1, totals);
    }
    report("training: %ld runs; largest error: dense %.1e, direct %.1e, F2 %.1e, F4 %.1e, narrow %.1e",
           totals.runs, totals.worst[0], totals.worst[1], totals.worst[2], totals.worst[3], totals.worst[4]);
}

// Values whose mean is 1000 standard deviations, copied by weights of 0 and 1.
void test_statistics() {
    Random random(13);
    double worst = 0;
    for (const bool transposed : {false, true})
        for (const int algorithm : {DCGAN_DENSE, DCGAN_DIRECT, DCGAN_F2, DCGAN_F4, DCGAN_NARROW}) {
            const bool is_dense = algorithm == DCGAN_DENSE;
            if (algorithm == DCGAN_NARROW && transposed) continue;
            const long side = transposed ? 1 : 4;
            Case c(random, transposed, 4, is_dense ? 1 : 2, is_dense ? 0 : 1, 3, 17,
                   is_dense ? Size{side, side} : Size{6, 10}, 37);
            std::fill(c.weight.data, c.weight.data + c.weight.count(), 0.0f);
            for (long o = 0; o < 17; ++o)  // each output pixel copies one input pixel
                for (long tap = 0; tap < 16; ++tap) {
                    const bool middle = tap / 4 % 3 != 0 && tap % 4 % 3 != 0;
                    const bool one = transposed ? is_dense || middle : tap == 5;
                    if (!one) continue;
                    (transposed ? c.weight.at(o % 3, o, tap / 4, tap % 4)
                                : c.weight.at(o, o % 3, tap / 4, tap % 4)) = 1.0f;
                }
            for (long i = 0; i < c.x.count(); ++i) c.x.data[i] = 1732.0f + uniform(random, 3.0f);
            c.op.statistics = 1;
            c.op.algorithm = algorithm;
            for (const std::string& isa : isas())
                for (const int threads : {1, 2, 7}) {
                    dcgan_use_isa(isa.c_str());
                    const Results r = fprop(c, threads);
                    const Tensor& y = r.tensors[0];
                    const long pixels = y.count() / 17;
                    for (long o = 0; o < 17; ++o) {
                        double mean = 0, variance = 0;
                        for (long i = o; i < y.count(); i += 17)
                            mean += y.data[i] / static_cast<double>(pixels);
                        for (long i = o; i < y.count(); i += 17)
                            variance += (y.data[i] - mean) * (y.data[i] - mean) / static_cast<double>(pixels);
                        const std::string description = c.describe("fprop", threads);
                        require(std::abs(r.tensors[1].data[o] / mean - 1) <= 1e-6,
                                "%s: mean %.9g, expected %.9g", description.c_str(), r.tensors[1].data[o],
                                mean);
                        // A relative error of 6e-5 is attainable (one rounding of the mean, times 1000);
                        // E[y²] - E[y]² would have 1000 times that error.
                        const double off = std::abs(r.tensors[2].data[o] / variance - 1);
                        require(off <= 1e-3, "%s: variance %.9g, expected %.9g", description.c_str(),
                                r.tensors[2].data[o], variance);
                        worst = std::max(worst, off);
                    }
                }
        }
    report("statistics: mean of 1000 standard deviations; largest error of a variance %.1e", worst);
}

void test_training_concurrency() {
    Random random(14);
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        Case cases[] = {example(random, false), example(random, true)};
        std::vector<uint32_t> expected[2][4];
        for (int which = 0; which < 2; ++which)
            for (int threads = 1; threads < 4; ++threads) {
                expected[which][threads] = fprop(cases[which], threads).bits();
                for (const uint32_t word : dgrad(cases[which], threads).bits())
                    expected[which][threads].push_back(word);
            }
        const auto matches = [&](int which, int threads) {
            std::vector<uint32_t> got = fprop(cases[which], threads).bits();
            for (const uint32_t word : dgrad(cases[which], threads).bits()) got.push_back(word);
            return got == expected[which][threads];
        };
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller)
            callers.emplace_back([&, caller] {
                for (int round = 0; round < 4; ++round) {
                    require(matches((caller + round) % 2, 1 + (caller + round) % 3),
                            "training: different bits with 4 concurrent callers");
                    if (round % 2) dcgan_release();
                }
            });
        for (std::thread& caller : callers) caller.join();
        // A forked child runs on one thread, whatever the `threads` argument is.
        std::fflush(stdout);
        const pid_t child = fork();
        require(child >= 0, "fork failed");
        if (child == 0) {
            alarm(10);
            for (const int which : {0, 1}) {
                std::vector<uint32_t> got = fprop(cases[which], 2).bits();
                for (const uint32_t word : dgrad(cases[which], 2).bits()) got.push_back(word);
                require(got == expected[which][1],
                        "training: a forked child and one thread give different bits");
            }
            std::_Exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "training: a forked child hangs or fails");
    }
    report("training with concurrent callers and in a forked child: identical bits");
}

// --- arguments

namespace {

// All arguments of dcgan_fprop and dcgan_dgrad: valid until a case invalidates one.
struct Call {
    dcgan_op op;
    int64_t images;
    const float *x, *weight, *dy, *saved_y;  // saved_y: y of the forward pass
    const int64_t* strides;
    float *y, *mean, *variance, *dx, *dcenter, *dscale, *dshift;
    int threads = 1;
};

struct InvalidArgument {
    const char* names;  // must occur in the error message
    std::function<void(Call&)> invalidate;
};

const float NUMBERS[64] = {};

const InvalidArgument OP[] = {
    {"transposed", [](Call& c) { c.op.transposed = 2; }},
    {"c_in", [](Call& c) { c.op.c_in = 0; }},
    {"c_in", [](Call& c) { c.op.c_in = 65537; }},
    {"c_out", [](Call& c) { c.op.c_out = -1; }},
    {"height", [](Call& c) { c.op.height = 0; }},
    {"width", [](Call& c) { c.op.width = 16385; }},
    {"map", [](Call& c) { c.op.height = 1; }},
    {"kernel", [](Call& c) { c.op.kernel = 3; }},
    {"stride", [](Call& c) { c.op.stride = 1; }},
    {"padding", [](Call& c) { c.op.padding = 0; }},
    {"algorithm", [](Call& c) { c.op.algorithm = -1; }},
    {"algorithm", [](Call& c) { c.op.algorithm = 5; }},
    {"in_act", [](Call& c) { c.op.in_act = -1; }},
    {"in_act", [](Call& c) { c.op.in_act = DCGAN_TANH; }},
    {"in_act", [](Call& c) { c.op.in_act = DCGAN_SIGMOID; }},
    {"act", [](Call& c) { c.op.statistics = 0, c.op.out_act = -1; }},
    {"act", [](Call& c) { c.op.statistics = 0, c.op.out_act = 5; }},
    {"slope", [](Call& c) { c.op.slope = -0.1f; }},
    {"slope", [](Call& c) { c.op.slope = std::nanf(""); }},
    {"center", [](Call& c) { c.op.center = nullptr; }},
    {"scale", [](Call& c) { c.op.scale = nullptr; }},
    {"shift", [](Call& c) { c.op.shift = nullptr; }},
    {"statistics", [](Call& c) { c.op.out_act = DCGAN_RELU; }},
    {"out_scale", [](Call& c) { c.op.out_scale = NUMBERS; }},
    {"out_shift", [](Call& c) { c.op.out_shift = NUMBERS; }},
};
const InvalidArgument BOTH[] = {
    {"images", [](Call& c) { c.images = -1; }},
    {"images", [](Call& c) { c.images = (int64_t{1} << 28) + 1; }},
    {"threads", [](Call& c) { c.threads = 0; }},
    {"threads", [](Call& c) { c.threads = -2; }},
    {"threads", [](Call& c) { c.threads = 5000; }},
    {"weight", [](Call& c) { c.weight = nullptr; }},
    {"strides", [](Call& c) { c.strides = nullptr; }},
};
const InvalidArgument FPROP[] = {
    {"x is null", [](Call& c) { c.x = nullptr; }},
    {"y is null", [](Call& c) { c.y = nullptr; }},
    {"mean is null", [](Call& c) { c.mean = nullptr; }},
    {"variance is null", [](Call& c) { c.variance = nullptr; }},
};
const InvalidArgument DGRAD[] = {
    {"dy is null", [](Call& c) { c.dy = nullptr; }},
    {"dx is null", [](Call& c) { c.dx = nullptr; }},
    {"y is null", [](Call& c) { c.saved_y = nullptr; }},
    {"y is null", [](Call& c) { c.saved_y = nullptr, c.op.dmean = nullptr; }},
    {"y is null", [](Call& c) { c.saved_y = nullptr, c.op.statistics = 0, c.op.out_act = DCGAN_TANH; }},
    {"mean is null", [](Call& c) { c.op.mean = nullptr; }},
    {"x is null", [](Call& c) { c.x = nullptr; }},
    {"x is null",
     [](Call& c) {
         c.x = nullptr;
         c.op.center = c.op.scale = c.op.shift = nullptr;
         c.dcenter = c.dscale = c.dshift = nullptr;
     }},
    {"dcenter", [](Call& c) { c.dcenter = nullptr; }},
    {"dscale", [](Call& c) { c.dscale = nullptr; }},
    {"dshift", [](Call& c) { c.dshift = nullptr; }},
    {"dcenter", [](Call& c) { c.op.center = c.op.scale = c.op.shift = nullptr; }},
};

void expect_rejected(const char* function, int code, const char* names) {
    require(code == DCGAN_EARGUMENT, "%s with an invalid %s returns %d: %s", function, names, code,
            dcgan_error());
    require(std::strstr(dcgan_error(), names) != nullptr, "%s: the error does not name %s: %s", function,
            names, dcgan_error());
}

}  // namespace

void test_training_arguments() {
    Random random(15);
    long cases = 0;
    const Case shared_case = example(random, false);
    const Case& c = shared_case;
    const Tensor y = Tensor::output(Layout::NHWC, c.images, c.op.c_out, c.out.height, c.out.width);
    const Tensor dx = Tensor::output(Layout::NHWC, c.images, c.op.c_in, c.in.height, c.in.width);
    const Tensor mean = vector_of(c.op.c_out), variance = vector_of(c.op.c_out);
    const Tensor dcenter = vector_of(c.op.c_in), dscale = vector_of(c.op.c_in), dshift = vector_of(c.op.c_in);
    const auto valid = [&] {
        return Call{c.op,     c.images,         c.x.data,    c.weight.data, c.dy.data,
                    c.y.data, c.weight.strides, y.data,      mean.data,     variance.data,
                    dx.data,  dcenter.data,     dscale.data, dshift.data};
    };
    const auto call_fprop = [](const Call& a) {
        return dcgan_fprop(&a.op, a.images, a.x, a.weight, a.strides, a.y, a.mean, a.variance, a.threads);
    };
    const auto call_dgrad = [](const Call& a) {
        return dcgan_dgrad(&a.op, a.images, a.dy, a.saved_y, a.weight, a.strides, a.x, a.dx, a.dcenter,
                           a.dscale, a.dshift, a.threads);
    };
    const auto untouched = [&](const char* names) {
        for (const Tensor* t : {&y, &dx, &mean, &variance, &dcenter, &dscale, &dshift})
            require(t->untouched(), "a call with an invalid %s writes", names);
        ++cases;
    };
    const auto check = [&](const InvalidArgument& invalid, bool of_op, bool of_fprop, bool of_dgrad) {
        Call a = valid();
        invalid.invalidate(a);
        if (of_op) {
            expect_rejected("dcgan_op_supports", dcgan_op_supports(&a.op, DCGAN_FPROP), invalid.names);
            expect_rejected("dcgan_op_supports", dcgan_op_supports(&a.op, DCGAN_DGRAD), invalid.names);
        }
        if (of_fprop) expect_rejected("dcgan_fprop", call_fprop(a), invalid.names);
        if (of_dgrad) expect_rejected("dcgan_dgrad", call_dgrad(a), invalid.names);
        untouched(invalid.names);
    };
    for (const InvalidArgument& invalid : OP) check(invalid, true, true, true);
    for (const InvalidArgument& invalid : BOTH) check(invalid, false, true, true);
    for (const InvalidArgument& invalid : FPROP) check(invalid, false, true, false);
    for (const InvalidArgument& invalid : DGRAD) check(invalid, false, false, true);

    Call a = valid();
    expect_rejected("dcgan_fprop",
                    dcgan_fprop(nullptr, 1, a.x, a.weight, a.strides, a.y, a.mean, a.variance, 1), "op");
    expect_rejected("dcgan_dgrad",
                    dcgan_dgrad(nullptr, 1, a.dy, a.saved_y, a.weight, a.strides, a.x, a.dx, a.dcenter,
                                a.dscale, a.dshift, 1),
                    "op");
    expect_rejected("dcgan_op_supports", dcgan_op_supports(nullptr, DCGAN_FPROP), "op");
    for (const int product : {-1, 3})
        expect_rejected("dcgan_op_supports", dcgan_op_supports(&a.op, product), "product");
    a.op.algorithm = DCGAN_NARROW;
    expect_rejected("dcgan_dgrad", call_dgrad(a), "narrow");
    a.op.transposed = 1;
    expect_rejected("dcgan_fprop", call_fprop(a), "narrow");
    untouched("algorithm");
    // Zero images are valid, and a no-op.
    a = valid();
    a.images = 0;
    require(call_fprop(a) == 0 && call_dgrad(a) == 0, "zero images: %s", dcgan_error());
    untouched("number of images");
    {  // A workspace that cannot be allocated is rejected before anything is read.
        Call b = valid();
        b.op.transposed = 1, b.op.algorithm = DCGAN_DIRECT;
        b.op.c_in = b.op.c_out = 65536;
        b.op.height = b.op.width = 8192;
        b.threads = 1024;
        for (const int code : {call_fprop(b), call_dgrad(b)}) {
            require(code == DCGAN_EMEMORY, "a workspace of terabytes: %d: %s", code, dcgan_error());
            require(std::strstr(dcgan_error(), "workspace") != nullptr,
                    "that error does not name the workspace: %s", dcgan_error());
        }
        untouched("size");
    }
    // Without the optional pointers.
    a = valid();
    a.op.dmean = a.op.dvariance = a.op.mean = nullptr;
    a.saved_y = nullptr;
    a.dcenter = a.dscale = a.dshift = nullptr;
    require(call_fprop(a) == 0 && call_dgrad(a) == 0, "valid arguments: %s", dcgan_error());
    report("training arguments: %ld invalid cases rejected", cases);
}
