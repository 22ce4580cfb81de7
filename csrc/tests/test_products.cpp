// fprop and dgrad compared with their definition in float64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "op_case.h"

namespace {

const int SPATIAL[] = {DCGAN_DIRECT, DCGAN_F2, DCGAN_NARROW, DCGAN_F4};

// The raw products in float64, by the definition.
struct Reference {
    const OpCase& c;
    Sums u, dx_hat;

    explicit Reference(const OpCase& of) : c(of), u(of.y.count()), dx_hat(of.x.count()) {
        const dcgan_op& op = c.op;
        const std::vector<double> x_hat = c.x_hat(), du = c.du();
        const long channels = c.small_channels(), others = c.large_channels();
        const std::vector<double>& of_small = op.transposed ? x_hat : du;
        const std::vector<double>& of_large = op.transposed ? du : x_hat;
        Sums& to_small = op.transposed ? dx_hat : u;
        Sums& to_large = op.transposed ? u : dx_hat;
        std::vector<double> taps;  // [k][k][small channel][large channel]
        for (long tap = 0; tap < op.kernel * op.kernel; ++tap)
            for (long i = 0; i < channels; ++i)
                for (long j = 0; j < others; ++j)
                    taps.push_back(c.weight.at(i, j, tap / op.kernel, tap % op.kernel));
        each_connection(op, c.images, [&](long tap, long small, long large) {
            const long s = small * channels, l = large * others;
            const double* w = taps.data() + tap * channels * others;
            for (long i = 0; i < channels; ++i)
                for (long j = 0; j < others; ++j, ++w) {
                    to_small.add(s + i, of_large[static_cast<size_t>(l + j)] * *w);
                    to_large.add(l + j, of_small[static_cast<size_t>(s + i)] * *w);
                }
        });
    }

    Sums expected_y() const {
        const dcgan_op& op = c.op;
        Sums expected = u;
        if (op.statistics) return expected;
        for (size_t i = 0; i < expected.values.size(); ++i) {
            const size_t o = i % static_cast<size_t>(op.c_out);
            const double factor = op.out_scale ? op.out_scale[o] : 1.0;
            const double term = op.out_shift ? op.out_shift[o] : 0.0;
            expected.values[i] = activated(op.out_act, expected.values[i] * factor + term);
            expected.squares[i] = expected.squares[i] * factor * factor + term * term;
        }
        return expected;
    }
    // Mean and variance.
    std::vector<Sums> expected_statistics() const {
        const dcgan_op& op = c.op;
        std::vector<Sums> expected(2, Sums(op.c_out));
        const double pixels = static_cast<double>(c.images * c.out.height * c.out.width);
        const auto channel = [&](size_t i) { return i % static_cast<size_t>(op.c_out); };
        for (size_t i = 0; i < u.values.size(); ++i) expected[0].values[channel(i)] += u.values[i] / pixels;
        for (size_t i = 0; i < u.values.size(); ++i) {
            const double off = u.values[i] - expected[0].values[channel(i)];
            expected[1].values[channel(i)] += off * off / pixels;
            expected[0].squares[channel(i)] += u.squares[i] / pixels;
        }
        for (size_t o = 0; o < expected[1].squares.size(); ++o)
            expected[1].squares[o] = expected[0].squares[o] * expected[0].squares[o];
        return expected;
    }
    // dx, dcenter, dscale, dshift.
    std::vector<Sums> expected_gradients() const {
        const dcgan_op& op = c.op;
        std::vector<Sums> expected = {dx_hat, Sums(op.c_in), Sums(op.c_in), Sums(op.c_in)};
        for (long i = 0; i < c.x.count(); ++i) {
            const size_t at = static_cast<size_t>(i);
            const long o = i % op.c_in;
            const bool negative = c.pre_activation(i) < 0;
            const double low = op.in_act == DCGAN_RELU ? 0.0 : static_cast<double>(SLOPE);
            const double slope = op.in_act != DCGAN_NONE && negative ? low : 1.0;
            const double factor = slope * (op.scale ? op.scale[o] : 1.0);
            expected[0].values[at] *= factor;
            expected[0].squares[at] *= factor * factor;
            if (!op.scale) continue;
            const double g = dx_hat.values[at] * slope;
            expected[1].add(o, -g * op.scale[o]);
            expected[2].add(o, g * (c.x.data[i] - static_cast<double>(op.center[o])));
            expected[3].add(o, g);
        }
        return expected;
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

Results fprop(const OpCase& c, int threads) {
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
Results dgrad(const OpCase& c, int threads, bool with_sums = true) {
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

void compare(const OpCase& c, const char* product, const std::function<Results(int)>& run,
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
                const double e = error(t.values(), expected[i]);
                // A variance is a square, so its relative error is twice that of the values.
                require(e <= (std::strcmp(name, "variance") == 0 ? 2 : 1) * PRODUCT_BOUND,
                        "%s: relative error %.2e in %s", description.c_str(), e, name);
                totals.add(c.op.algorithm, e);
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
void compare(OpCase& c, const int* algorithms, long count, Totals& totals) {
    const Reference reference(c);
    std::vector<Sums> forward = {reference.expected_y()};
    if (c.op.statistics)
        for (Sums& sums : reference.expected_statistics()) forward.push_back(std::move(sums));
    const std::vector<Sums> backward = reference.expected_gradients();
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
                OpCase c(random, transposed, 4, 2, 1, channels[i], channels[j], map, 1 + (i + 2 * j) % 3,
                         layouts[(i + 2 * j) % 4]);
                compare(c.randomize(random), SPATIAL + (i + j / 2) % 2 * 2, 2, totals);
            }
    // Every prologue and epilogue, with full and with partial vectors.
    for (int act = DCGAN_NONE; act <= DCGAN_LEAKY_RELU; ++act)
        for (const bool affine : {false, true})
            for (int out = DCGAN_NONE; out <= DCGAN_SIGMOID + 1; ++out) {
                const bool transposed = (act + out + affine) % 2;
                OpCase c(random, transposed, 4, 2, 1, transposed ? 16 : 3, transposed ? 3 : 16, {6, 5}, 2);
                c.with_prologue(random, act, affine);
                if (out > DCGAN_SIGMOID)
                    c.with_statistics(random);
                else
                    c.with_epilogue(random, out, out % 2, affine);
                compare(c, SPATIAL, 4, totals);
            }
    const int dense = DCGAN_DENSE;
    for (const int kernel : {1, 2, 3, 4, 7})
        for (long i = 0; i < 6; ++i)
            for (const bool transposed : {false, true}) {
                const long side = transposed ? 1 : kernel;
                OpCase c(random, transposed, kernel, 1 + static_cast<int>(i % 2), 0, channels[i],
                         channels[(5 * i + kernel) % 6], {side, side}, 1 + (i + kernel) % 5,
                         layouts[(i + kernel) % 4]);
                compare(c.randomize(random), &dense, 1, totals);
            }
    // The gradient of only one of the statistics.
    for (const bool of_mean : {false, true}) {
        OpCase c = example(random, of_mean);
        (of_mean ? c.op.dvariance : c.op.dmean) = nullptr;
        if (of_mean) c.op.mean = nullptr;
        compare(c, SPATIAL, 2, totals);
    }
    // Several blocks of images, shared by all threads or one per thread; the last block is smaller.
    for (const bool transposed : {false, true}) {
        OpCase c(random, transposed, 4, 2, 1, transposed ? 9 : 3, transposed ? 3 : 9,
                 transposed ? Size{15, 16} : Size{31, 32}, 229);
        const int some[] = {DCGAN_F4, DCGAN_NARROW};
        compare(c.with_prologue(random, DCGAN_RELU, true).with_statistics(random), some, 2, totals);
        const long side = transposed ? 1 : 4;
        OpCase d(random, transposed, 4, 1, 0, transposed ? 9 : 130, transposed ? 130 : 9, {side, side}, 600);
        compare(d.with_prologue(random, DCGAN_LEAKY_RELU, true).with_statistics(random), &dense, 1, totals);
    }
    // Transformed F(4×4) weights of more than 16 MB, which are streamed.
    for (const bool transposed : {false, true}) {
        const int f4 = DCGAN_F4;
        OpCase c(random, transposed, 4, 2, 1, transposed ? 270 : 163, transposed ? 163 : 270,
                 transposed ? Size{5, 2} : Size{11, 4}, 2);
        compare(c.with_prologue(random, DCGAN_RELU, true).with_statistics(random), &f4, 1, totals);
        OpCase d(random, transposed, 4, 2, 1, 260, 170, transposed ? Size{3, 5} : Size{7, 10}, 1);
        compare(d.with_epilogue(random, DCGAN_TANH, true, true), &f4, 1, totals);
    }
    report("training: %s", totals.summary().c_str());
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
            OpCase c(random, transposed, 4, is_dense ? 1 : 2, is_dense ? 0 : 1, 3, 17,
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
        OpCase cases[] = {example(random, false), example(random, true)};
        const auto bits = [&](int which, int threads) {
            std::vector<uint32_t> all = fprop(cases[which], threads).bits();
            for (const uint32_t word : dgrad(cases[which], threads).bits()) all.push_back(word);
            return all;
        };
        std::vector<uint32_t> expected[2][4];
        for (int which = 0; which < 2; ++which)
            for (int threads = 1; threads < 4; ++threads) expected[which][threads] = bits(which, threads);
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller)
            callers.emplace_back([&, caller] {
                for (int round = 0; round < 4; ++round) {
                    const int which = (caller + round) % 2, threads = 1 + (caller + round) % 3;
                    require(bits(which, threads) == expected[which][threads],
                            "training: different bits with 4 concurrent callers");
                    if (round % 2) dcgan_release();
                }
            });
        for (std::thread& caller : callers) caller.join();
        // A forked child runs on one thread, whatever the `threads` argument is.
        in_child("training", [&] {
            for (const int which : {0, 1})
                require(bits(which, 2) == expected[which][1],
                        "training: a forked child and one thread give different bits");
        });
    }
    report("training with concurrent callers and in a forked child: identical bits");
}
