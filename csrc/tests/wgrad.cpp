// The gradient of a layer's weights against its definition, in double.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "support.h"

namespace {

// As that of a layer (layers.cpp), to which F4's transforms of du add about as much again as those of x̂.
constexpr double BOUND = 5e-6;

using Floats = std::unique_ptr<float[]>;

Floats around(Random& random, long count, float middle) {
    Floats values(new float[static_cast<size_t>(count)]);
    for (long i = 0; i < count; ++i) values[static_cast<size_t>(i)] = middle + uniform(random, 0.5f);
    return values;
}

// A dcgan_op with what it points to and its maps.
struct Case {
    dcgan_op op{};
    long images, out_height, out_width;
    Floats center, scale, shift, out_scale, mean, dmean, dvariance;
    Tensor x, dy, y;
    // dweight in the order of its definition, and the size it would have if all products had independent
    // signs: what rounding is measured by where they cancel.
    std::vector<double> want;
    double size = 0;

    Case(Random& random, bool transposed, int kernel, int stride, int padding, long c_in, long c_out,
         long height, long width, long count)
        : images(count),
          out_height(transposed ? (height - 1) * stride - 2 * padding + kernel
                                : (height + 2 * padding - kernel) / stride + 1),
          out_width(transposed ? (width - 1) * stride - 2 * padding + kernel
                               : (width + 2 * padding - kernel) / stride + 1),
          x(Tensor::random(random, Layout::NHWC, count, c_in, height, width)),
          dy(Tensor::random(random, Layout::NHWC, count, c_out, out_height, out_width)),
          y(Tensor::random(random, Layout::NHWC, count, c_out, out_height, out_width)) {
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

    Case& before(Random& random, int act, bool affine) {
        op.in_act = act;
        if (!affine) return *this;
        center = around(random, op.c_in, 0.0f);
        scale = around(random, op.c_in, 1.0f);
        shift = around(random, op.c_in, 0.0f);
        op.center = center.get();
        op.scale = scale.get();
        op.shift = shift.get();
        return *this;
    }
    Case& after(Random& random, int act, bool scaled) {
        op.out_act = act;
        if (!scaled) return *this;
        out_scale = around(random, op.c_out, 1.0f);
        op.out_scale = out_scale.get();
        return *this;
    }
    Case& statistics(Random& random) {
        op.statistics = 1;
        const float pixels = static_cast<float>(images * out_height * out_width);
        mean = around(random, op.c_out, 0.0f);
        dmean = around(random, op.c_out, 0.0f);
        dvariance = around(random, op.c_out, 0.0f);
        for (long c = 0; c < op.c_out; ++c) {  // of a size to be missed, however many pixels share them
            dmean[static_cast<size_t>(c)] *= pixels;
            dvariance[static_cast<size_t>(c)] *= pixels;
        }
        op.mean = mean.get();
        op.dmean = dmean.get();
        op.dvariance = dvariance.get();
        return *this;
    }
    // What a layer has besides its shape, drawn.
    Case& dress(Random& random) {
        const auto pick = [&](unsigned long choices) { return static_cast<int>(random() % choices); };
        before(random, pick(3), pick(2) > 0);
        if (pick(2)) return statistics(random);
        return after(random, pick(DCGAN_SIGMOID + 1), pick(2) > 0);
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

    // By its definition: tap k joins pixel p of the small map with p·stride - padding + k of the large one.
    Case& define() {
        const std::vector<double> in = x_hat(), out = du();
        const std::vector<double>&small = op.transposed ? in : out, &large = op.transposed ? out : in;
        const long small_h = op.transposed ? op.height : out_height,
                   small_w = op.transposed ? op.width : out_width;
        const long large_h = op.transposed ? out_height : op.height,
                   large_w = op.transposed ? out_width : op.width;
        const long taps = op.kernel * op.kernel;
        // [k][k][first][second], so that the inner loop is one over memory.
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
                    want.push_back(sums[static_cast<size_t>((tap * first() + i) * second() + j)]);
                    squares += want.back() * want.back();
                }
        size = std::sqrt(std::max(size, squares));
        return *this;
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
    double worst[5] = {};  // error by algorithm
};

// Every instruction set, by one, two and seven threads.
void compare(Case& c, int algorithm, Layout layout, Totals& totals) {
    c.op.algorithm = algorithm;
    const std::string what = c.describe(algorithm, layout);
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        std::vector<uint32_t> one;
        // The first run is in memory that is fresh (NaN in the checked build), the others in what it leaves.
        dcgan_release();
        for (const int threads : {1, 2, 7}) {
            const Tensor dweight = Tensor::output(layout, c.first(), c.second(), c.op.kernel, c.op.kernel);
            const int code = dcgan_wgrad(&c.op, c.images, c.x.data, c.dy.data, c.y.data, dweight.data,
                                         dweight.strides, threads);
            require(code == 0, "%s: gives %d: %s", what.c_str(), code, dcgan_error());
            require(dweight.guards_intact(), "%s, %d threads: wrote outside of dweight", what.c_str(),
                    threads);
            ++totals.runs;
            const std::vector<uint32_t> bits = dweight.bits();
            if (threads > 1) {
                require(bits == one, "%s: %d threads give other bits than one", what.c_str(), threads);
                continue;
            }
            double difference = 0;
            for (size_t i = 0; i < bits.size(); ++i) {
                float got;
                std::memcpy(&got, &bits[i], sizeof got);
                difference += (got - c.want[i]) * (got - c.want[i]);
            }
            // Where ReLU leaves nothing, 0 of 0.
            const double error = difference == 0 ? 0 : std::sqrt(difference) / c.size;
            require(error <= BOUND, "%s: relative error %.2e", what.c_str(), error);
            totals.worst[algorithm] = std::max(totals.worst[algorithm], error);
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
    // All pairs of channels, both ways; along a row or a column of the pairs, all maps and layouts in turn.
    for (long i = 0; i < 8; ++i)
        for (long j = 0; j < 8; ++j)
            for (const bool transposed : {false, true}) {
                const auto& map = maps[(i + j) % (transposed ? 7 : 6)];  // a convolution needs 2×2
                Case c(random, transposed, 4, 2, 1, channels[i], channels[j], map[0], map[1],
                       1 + (i + 2 * j) % 5);
                c.dress(random).define();
                for (const int algorithm : {DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW})
                    compare(c, algorithm, layouts[(i + 2 * j + algorithm) % 4], totals);
            }
    // Every prologue of either map, where a vector is full and where it is not.
    for (int act = DCGAN_NONE; act <= DCGAN_LEAKY_RELU; ++act)
        for (const bool affine : {false, true})
            for (int out = DCGAN_NONE; out <= DCGAN_SIGMOID + 1; ++out)
                for (const int algorithm : {DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW}) {
                    const bool transposed = (act + out) % 2;
                    Case c(random, transposed, 4, 2, 1, transposed ? 16 : 3, transposed ? 3 : 16, 6, 5, 2);
                    c.before(random, act, affine);
                    if (out > DCGAN_SIGMOID)
                        c.statistics(random);
                    else
                        c.after(random, out, affine);
                    compare(c.define(), algorithm, Layout::NCHW, totals);
                }
    for (const int kernel : {1, 2, 3, 4, 7})
        for (long i = 0; i < 8; ++i)
            for (const bool transposed : {false, true}) {
                const long side = transposed ? 1 : kernel;
                Case c(random, transposed, kernel, 1 + static_cast<int>(i % 2), 0, channels[i],
                       channels[(3 * i + kernel) % 8], side, side, 1 + (i + kernel) % 5);
                compare(c.dress(random).define(), DCGAN_DENSE, layouts[(i + kernel) % 4], totals);
            }
    // So many tiles, pixels or images that they take several chunks, the last of them shorter.
    for (const bool transposed : {false, true}) {
        const auto chunks = [&](int algorithm, long few, long many, long height, long width, long images) {
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
            compare(c.before(random, DCGAN_RELU, true).statistics(random).define(), algorithm, Layout::NCHW,
                    totals);
        };
        chunks(DCGAN_F4, 17, 20, 17, 19, 23);
        chunks(DCGAN_DIRECT, 17, 20, 11, 12, 7);
        chunks(DCGAN_NARROW, 1, 64, 15, 21, 9);
        chunks(DCGAN_NARROW, 3, 33, 5, 150, 3);
    }
    for (const bool transposed : {false, true}) {
        const long side = transposed ? 1 : 4;
        Case c(random, transposed, 4, 1, 0, 20, 17, side, side, 600);
        compare(c.dress(random).define(), DCGAN_DENSE, Layout::NCHW, totals);
    }
    report("wgrad: %ld runs; largest error: dense %.1e, direct %.1e, F4 %.1e, narrow %.1e", totals.runs,
           totals.worst[0], totals.worst[1], totals.worst[3], totals.worst[4]);
}
