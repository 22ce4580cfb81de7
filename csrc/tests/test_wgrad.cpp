// The gradients of a layer's weights and of its epilogue's scale and shift, compared with their definition in
// float64.
#include <algorithm>

#include "op_case.h"

namespace {

Tensor weights_like(const OpCase& c, Layout layout) {
    return Tensor::output(layout, c.small_channels(), c.large_channels(), c.op.kernel, c.op.kernel);
}

// The gradients in float64, by the definition; those of scale and shift without statistics.
struct Reference {
    Sums dweight, dout_scale, dout_shift;

    explicit Reference(const OpCase& c)
        : dweight(c.weight.count()), dout_scale(c.op.c_out), dout_shift(c.op.c_out) {
        const dcgan_op& op = c.op;
        const std::vector<double> x_hat = c.x_hat(), du = c.du();
        const std::vector<double>& of_small = op.transposed ? x_hat : du;
        const std::vector<double>& of_large = op.transposed ? du : x_hat;
        const long channels = c.small_channels(), others = c.large_channels(), taps = op.kernel * op.kernel;
        each_connection(op, c.images, [&](long tap, long small, long large) {
            const double* const s = of_small.data() + small * channels;
            const double* const l = of_large.data() + large * others;
            for (long i = 0; i < channels; ++i) {
                const long row = (i * taps + tap) * others;  // of [small channel][k][k][large channel]
                for (long j = 0; j < others; ++j) dweight.add(row + j, s[i] * l[j]);
            }
        });
        if (op.statistics) return;
        // du and dweight contain the scale, and e does not.
        const auto inverse = [&](long o) { return op.out_scale ? 1.0 / op.out_scale[o] : 1.0; };
        for (size_t i = 0; i < du.size(); ++i) {
            const long o = static_cast<long>(i) % op.c_out;
            dout_shift.add(o, du[i] * inverse(o));
        }
        size_t at = 0;
        for (long i = 0; i < channels; ++i)
            for (long tap = 0; tap < taps; ++tap)
                for (long j = 0; j < others; ++j, ++at) {
                    const long o = op.transposed ? j : i;
                    const double w = c.weight.at(i, j, tap / op.kernel, tap % op.kernel) * inverse(o);
                    dout_scale.values[static_cast<size_t>(o)] += w * dweight.values[at];
                    dout_scale.squares[static_cast<size_t>(o)] += w * w * dweight.squares[at];
                }
    }
};

// Tests the same call with dout_scale, and dcgan_shift_gradient.
void compare_affine(const OpCase& c, const Reference& reference, const std::string& description,
                    Layout layout, int threads, std::vector<uint32_t>& one) {
    const Tensor dweight = weights_like(c, layout), dscale = vector_of(c.op.c_out),
                 dshift = vector_of(c.op.c_out);
    const int code = dcgan_wgrad(&c.op, c.images, c.x.data, c.dy.data, c.y.data, dweight.data,
                                 dweight.strides, c.weight.data, c.weight.strides, dscale.data, threads);
    require(code == 0, "%s, dout_scale: returns %d: %s", description.c_str(), code, dcgan_error());
    const int other = dcgan_shift_gradient(&c.op, c.images, c.dy.data, c.y.data, dshift.data, threads);
    require(other == 0, "%s, dout_shift: returns %d: %s", description.c_str(), other, dcgan_error());
    std::vector<uint32_t> all;
    const struct {
        const char* name;
        const Tensor& got;
        const Sums& expected;
    } results[] = {{"dweight with dout_scale", dweight, reference.dweight},
                   {"dout_scale", dscale, reference.dout_scale},
                   {"dout_shift", dshift, reference.dout_shift}};
    for (const auto& r : results) {
        require(r.got.guards_intact(), "%s: wrote out of bounds of %s", description.c_str(), r.name);
        const double e = error(r.got.values(), r.expected);
        require(e <= PRODUCT_BOUND, "%s: relative error %.2e in %s", description.c_str(), e, r.name);
        const std::vector<uint32_t> bits = r.got.bits();
        all.insert(all.end(), bits.begin(), bits.end());
    }
    if (one.empty()) one = all;
    require(all == one, "%s: different bits than with one thread", description.c_str());
}

// Tests every instruction set with one, two and seven threads.
void compare(OpCase& c, const Reference& reference, int algorithm, Layout layout, Totals& totals) {
    c.op.algorithm = algorithm;
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        std::vector<uint32_t> one, one_affine;
        // The first run has fresh memory (NaN in the checked build), the others reuse it.
        dcgan_release();
        for (const int threads : {1, 2, 7}) {
            const std::string description = c.describe(std::string("wgrad to ") + name(layout), threads);
            const Tensor dweight = weights_like(c, layout);
            const int code = dcgan_wgrad(&c.op, c.images, c.x.data, c.dy.data, c.y.data, dweight.data,
                                         dweight.strides, nullptr, nullptr, nullptr, threads);
            require(code == 0, "%s: returns %d: %s", description.c_str(), code, dcgan_error());
            require(dweight.guards_intact(), "%s: wrote out of bounds of dweight", description.c_str());
            ++totals.runs;
            if (!c.op.statistics) compare_affine(c, reference, description, layout, threads, one_affine);
            if (one.empty()) {
                const double e = error(dweight.values(), reference.dweight);
                require(e <= PRODUCT_BOUND, "%s: relative error %.2e", description.c_str(), e);
                totals.add(algorithm, e);
                one = dweight.bits();
            }
            require(dweight.bits() == one, "%s: different bits than with one thread", description.c_str());
        }
    }
}

}  // namespace

void test_wgrad() {
    Random random(11);
    Totals totals;
    const long channels[] = {1, 3, 5, 7, 16, 17, 33, 100};
    const Size maps[] = {{2, 2}, {3, 5}, {4, 4}, {7, 2}, {8, 8}, {9, 19}, {1, 1}};
    const Layout layouts[] = {Layout::NCHW, Layout::NHWC, Layout::PADDED, Layout::SCATTERED};
    // All pairs of channels in both directions; maps and layouts cycle along the rows and columns of the
    // pairs.
    for (long i = 0; i < 8; ++i)
        for (long j = 0; j < 8; ++j)
            for (const bool transposed : {false, true}) {
                const Size map = maps[(i + j) % (transposed ? 7 : 6)];  // a convolution needs at least 2×2
                OpCase c(random, transposed, 4, 2, 1, channels[i], channels[j], map, 1 + (i + 2 * j) % 5);
                const Reference reference(c.randomize(random));
                for (const int algorithm : {DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW})
                    compare(c, reference, algorithm, layouts[(i + 2 * j + algorithm) % 4], totals);
            }
    // Every prologue of either map, with full and with partial vectors.
    for (int act = DCGAN_NONE; act <= DCGAN_LEAKY_RELU; ++act)
        for (const bool affine : {false, true})
            for (int out = DCGAN_NONE; out <= DCGAN_SIGMOID + 1; ++out)
                for (const int algorithm : {DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW}) {
                    const bool transposed = (act + out) % 2;
                    OpCase c(random, transposed, 4, 2, 1, transposed ? 16 : 3, transposed ? 3 : 16, {6, 5},
                             2);
                    c.with_prologue(random, act, affine);
                    if (out > DCGAN_SIGMOID)
                        c.with_statistics(random);
                    else
                        c.with_epilogue(random, out, affine);
                    compare(c, Reference(c), algorithm, Layout::NCHW, totals);
                }
    for (const int kernel : {1, 2, 3, 4, 7})
        for (long i = 0; i < 8; ++i)
            for (const bool transposed : {false, true}) {
                const long side = transposed ? 1 : kernel;
                OpCase c(random, transposed, kernel, 1 + static_cast<int>(i % 2), 0, channels[i],
                         channels[(3 * i + kernel) % 8], {side, side}, 1 + (i + kernel) % 5);
                compare(c, Reference(c.randomize(random)), DCGAN_DENSE, layouts[(i + kernel) % 4], totals);
            }
    // Enough tiles, pixels or images for several K blocks, the last one shorter.
    for (const bool transposed : {false, true}) {
        const auto test_k_blocks = [&](int algorithm, long few, long many, long height, long width,
                                       long images) {
            const long c_in = transposed ? many : few, c_out = transposed ? few : many;
            const bool dense = algorithm == DCGAN_DENSE;
            const Size map = transposed ? Size{height, width}
                             : dense    ? Size{4, 4}
                                        : Size{2 * height, 2 * width + 1};
            OpCase c(random, transposed, 4, dense ? 1 : 2, dense ? 0 : 1, c_in, c_out, map, images);
            c.with_prologue(random, DCGAN_RELU, true).with_statistics(random);
            compare(c, Reference(c), algorithm, Layout::NCHW, totals);
        };
        test_k_blocks(DCGAN_F4, 17, 20, 17, 19, 23);
        test_k_blocks(DCGAN_DIRECT, 17, 20, 11, 12, 7);
        test_k_blocks(DCGAN_NARROW, 1, 64, 15, 21, 9);
        test_k_blocks(DCGAN_NARROW, 3, 33, 5, 150, 3);
    }
    for (const bool transposed : {false, true}) {
        const long side = transposed ? 1 : 4;
        OpCase c(random, transposed, 4, 1, 0, 20, 17, {side, side}, 600);
        compare(c, Reference(c.randomize(random)), DCGAN_DENSE, Layout::NCHW, totals);
    }
    // Weights with the layout of dweight, so that output channels, input channels or taps are contiguous in
    // both; then a map of a million pixels with one channel, whose sum of ones is exact.
    for (const Layout layout : layouts)
        for (const bool transposed : {false, true}) {
            OpCase c(random, transposed, 4, 2, 1, 19, 21, {4, 6}, 2);
            c.with_epilogue(random, DCGAN_TANH, true);
            Tensor weight = Tensor::input(layout, c.small_channels(), c.large_channels(), 4, 4);
            for (long i = 0; i < c.small_channels(); ++i)
                for (long j = 0; j < c.large_channels(); ++j)
                    for (long tap = 0; tap < 16; ++tap)
                        weight.at(i, j, tap / 4, tap % 4) = c.weight.at(i, j, tap / 4, tap % 4);
            c.weight = std::move(weight);
            compare(c, Reference(c), DCGAN_F4, layout, totals);
        }
    {
        OpCase c(random, true, 4, 2, 1, 1, 1, {512, 512}, 1);
        c.op.algorithm = DCGAN_DIRECT;
        std::fill(c.dy.data, c.dy.data + c.dy.count(), 1.0f);
        float sum = 0;
        require(dcgan_shift_gradient(&c.op, 1, c.dy.data, nullptr, &sum, 2) == 0, "%s", dcgan_error());
        require(sum == 1048576.0f, "the sum of %ld ones is %.1f", c.dy.count(), static_cast<double>(sum));
    }
    report("wgrad: %s", totals.summary().c_str());
}
