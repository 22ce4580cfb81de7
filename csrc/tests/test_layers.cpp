// Each algorithm on single layers, compared with the definition in float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "support.h"

static const int SPATIAL[] = {DCGAN_DIRECT, DCGAN_F2, DCGAN_F4, DCGAN_NARROW};
static const int ACTIVATIONS = DCGAN_SIGMOID + 1;

// The bound on a layer's relative L2 error, from the unit roundoff of float32, u = 6e-8. A sum of K products
// with independent signs has an error of about u·√K times the size of a product, which is u relative to the
// sum. The K blocks, the transforms of F4 (the largest contribution: each dimension about triples the error)
// and the epilogue add up to about 10 u. 5e-6 is 80 u, far above that, and far below a single wrong element,
// which contributes 1/√n = 2e-3 to the largest output here (n = 2e5).
static constexpr double BOUND = 5e-6;

struct Error {
    double relative;
    long first_nonfinite;  // index in [N, H, W, C], or -1
};

static Error error(const Layer& layer, const std::vector<double>& sums, const Tensor& y) {
    double difference = 0, total = 0;
    const std::vector<float> values = y.values();
    Error e{0, -1};
    for (size_t i = 0; i < sums.size(); ++i) {
        const float got = values[i];
        if (!std::isfinite(got) && e.first_nonfinite < 0) e.first_nonfinite = static_cast<long>(i);
        const double expected = activated(layer.l.act, sums[i]);
        difference += (got - expected) * (got - expected);
        total += expected * expected;
    }
    e.relative = std::sqrt(difference / total);
    return e;
}

static void compare(const Layer& layer, const Tensor& x, const std::vector<double>& sums, Layout layout,
                    Totals& totals) {
    const dcgan_layer& l = layer.l;
    std::vector<uint32_t> one;
    // The first run has fresh memory (NaN in the checked build), the others reuse it.
    dcgan_release();
    for (const int threads : {1, 2, 7}) {
        const Tensor y = Tensor::output(layout, x.size[0], l.c_out, layer.out_height(), layer.out_width());
        run(layer, x, y, threads);
        ++totals.runs;
        if (threads == 1) {
            const Error e = error(layer, sums, y);
            require(e.relative <= BOUND,
                    "%s, %ld images, output %s: relative error %.2e; first non-finite element: %ld",
                    describe(l).c_str(), x.size[0], name(layout), e.relative, e.first_nonfinite);
            totals.add(l.algorithm, e.relative);
            one = y.bits();
        } else {
            require(y.bits() == one,
                    "%s, %ld images, output %s: %d threads and one thread give different bits",
                    describe(l).c_str(), x.size[0], name(layout), threads);
        }
    }
}

// Enough images for 100 output elements: a single sum may cancel almost completely, so that its relative
// error is large; the norm of a hundred does not.
static long images_for(const Layer& layer, long at_least) {
    const long elements = layer.l.c_out * layer.out_height() * layer.out_width();
    return std::max(at_least, (100 + elements - 1) / elements);
}

// Computes the reference once and compares every instruction set and algorithm with it.
static void one_case(Random& random, Layer& layer, long images, const int* algorithms, long count,
                     Totals& totals) {
    const Tensor x =
        Tensor::random(random, Layout::NHWC, images, layer.l.c_in, layer.l.height, layer.l.width);
    const std::vector<double> sums = reference(layer, x);
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        for (long i = 0; i < count; ++i)
            compare(layer.pack(algorithms[i], 1 + static_cast<int>(i % 2)), x, sums, Layout::NHWC, totals);
    }
}

void test_layers() {
    Random random(1);
    Totals totals;
    const long channels[] = {1, 3, 5, 7, 16, 17, 33, 100};
    const Size maps[] = {{2, 2}, {3, 5}, {4, 4}, {7, 2}, {8, 8}, {11, 16}, {1, 1}};
    const auto pick = [&](int choices) {
        return static_cast<int>(random() % static_cast<unsigned long>(choices));
    };
    // Chooses the layer's parameters and activation at random.
    const auto randomize = [&](Layer& layer) {
        const bool scale = pick(3) > 0, shift = pick(3) > 0, statistics = pick(2) > 0, bias = pick(2) > 0;
        layer.affine(random, scale, shift, statistics, bias).activation(pick(ACTIVATIONS));
    };
    const auto layout = [&] { return pick(2) ? Layout::NCHW : Layout::NHWC; };
    // All pairs of channels in both directions; the maps cycle along the rows and columns of the pairs.
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j)
            for (const bool transposed : {false, true}) {
                const Size map = maps[(i + j) % (transposed ? 7 : 6)];  // a convolution needs at least 2×2
                Layer layer(random, transposed, 4, 2, 1, channels[i], channels[j], map.height, map.width,
                            layout());
                randomize(layer);
                one_case(random, layer, images_for(layer, 1 + pick(3)), SPATIAL, 4, totals);
            }
    // A K that takes several K blocks in every algorithm, the last one shorter.
    for (const bool transposed : {false, true}) {
        Layer layer(random, transposed, 4, 2, 1, 300, 20, 4, 6, Layout::NHWC);
        layer.affine(random, true, true).activation(DCGAN_LEAKY_RELU);
        one_case(random, layer, 2, SPATIAL, 4, totals);
    }
    const int dense = DCGAN_DENSE;
    for (const int kernel : {1, 2, 3, 4, 7})
        for (const long c_in : channels)
            for (const bool transposed : {false, true}) {
                const long side = transposed ? 1 : kernel;
                Layer layer(random, transposed, kernel, 1 + pick(2), 0, c_in, channels[pick(8)], side, side,
                            layout());
                randomize(layer);
                one_case(random, layer, images_for(layer, 1 + pick(7)), &dense, 1, totals);
            }
    report("layers: %s", totals.summary().c_str());
}

void test_views() {
    Random random(2);
    Totals totals;
    const Layout any[] = {Layout::PADDED, Layout::NCHW, Layout::SCATTERED};
    const struct {
        int algorithm;
        bool transposed;
        long c_in, c_out, height, width;
    } cases[] = {
        {DCGAN_DIRECT, false, 5, 33, 7, 6}, {DCGAN_DIRECT, true, 17, 7, 3, 5},
        {DCGAN_F2, false, 5, 33, 7, 6},     {DCGAN_F2, true, 17, 7, 3, 5},
        {DCGAN_F4, false, 5, 33, 7, 6},     {DCGAN_F4, true, 17, 7, 3, 5},
        {DCGAN_NARROW, false, 1, 33, 7, 6}, {DCGAN_NARROW, false, 3, 5, 8, 9},
        {DCGAN_NARROW, true, 17, 1, 3, 5},  {DCGAN_NARROW, true, 33, 3, 8, 9},
        {DCGAN_DENSE, false, 5, 33, 3, 3},  {DCGAN_DENSE, true, 17, 7, 1, 1},
    };
    for (const auto& c : cases) {
        const bool dense = c.algorithm == DCGAN_DENSE, narrow = c.algorithm == DCGAN_NARROW;
        Layer layer(random, c.transposed, dense ? 3 : 4, dense ? 1 : 2, dense ? 0 : 1, c.c_in, c.c_out,
                    c.height, c.width);
        layer.affine(random, true, true).activation(DCGAN_TANH);
        for (const Layout from : any)
            for (const Layout to : any) {
                if (from != Layout::PADDED && !(narrow && !c.transposed)) continue;
                if (to != Layout::PADDED && !(narrow && c.transposed)) continue;
                const Tensor x = Tensor::random(random, from, 3, c.c_in, c.height, c.width);
                const std::vector<double> sums = reference(layer, x);
                for (const std::string& isa : isas()) {
                    dcgan_use_isa(isa.c_str());
                    compare(layer.pack(c.algorithm), x, sums, to, totals);
                }
            }
        // One image expanded to several by a stride of 0.
        Tensor x = Tensor::random(random, Layout::NHWC, 1, c.c_in, c.height, c.width);
        x.size[0] = 5;
        x.strides[0] = 0;
        const std::vector<double> sums = reference(layer, x);
        for (const std::string& isa : isas()) {
            dcgan_use_isa(isa.c_str());
            compare(layer.pack(c.algorithm), x, sums, Layout::NHWC, totals);
        }
    }
    report("views: %ld runs", totals.runs);
}

void test_nonfinite() {
    Random random(3);
    const float infinity = std::numeric_limits<float>::infinity();
    const float poisons[] = {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity};
    const long images = 3, poisoned = 1;
    long runs = 0;
    for (const int algorithm : {DCGAN_DENSE, DCGAN_DIRECT, DCGAN_F2, DCGAN_F4, DCGAN_NARROW})
        for (const bool transposed : {false, true})
            // Saturating activations are not tested, since they map infinite sums to finite values.
            for (const int act : {DCGAN_NONE, DCGAN_RELU, DCGAN_LEAKY_RELU}) {
                const bool dense = algorithm == DCGAN_DENSE;
                const long c_in = act == DCGAN_RELU ? 17 : 5, c_out = act == DCGAN_RELU ? 5 : 19;
                const long height = !dense ? 6 : transposed ? 1 : 4, width = !dense ? 9 : height;
                Layer layer(random, transposed, 4, dense ? 1 : 2, dense ? 0 : 1, c_in, c_out, height, width);
                layer.affine(random, true, true).activation(act);
                const Tensor x = Tensor::random(random, Layout::NHWC, images, c_in, height, width);
                layer.l.algorithm = algorithm;
                const std::string description = describe(layer.l);
                for (const std::string& isa : isas()) {
                    dcgan_use_isa(isa.c_str());
                    layer.pack(algorithm);
                    const auto output = [&] {
                        return Tensor::output(Layout::NHWC, images, c_out, layer.out_height(),
                                              layer.out_width());
                    };
                    const Tensor clean = output();
                    run(layer, x, clean, 1);
                    const std::vector<uint32_t> clean_bits = clean.bits();
                    for (int round = 0; round < 12; ++round) {
                        // Poison one, two or three elements; in the first rounds, those in the corners.
                        std::vector<std::pair<float*, float>> saved;
                        for (int i = 0; i <= round % 3; ++i) {
                            const auto below = [&](long limit) {
                                return static_cast<long>(random() % static_cast<unsigned long>(limit));
                            };
                            const long h = round < 4 ? round / 2 * (height - 1) : below(height);
                            const long w = round < 4 ? round % 2 * (width - 1) : below(width);
                            float& element = x.at(poisoned, below(c_in), h, w);
                            saved.emplace_back(&element, element);
                            element = poisons[(round + i) % 3];
                        }
                        const std::vector<double> sums = reference(layer, x);
                        const Tensor y = output();
                        run(layer, x, y, 1 + round % 2);
                        ++runs;
                        const std::vector<uint32_t> bits = y.bits();
                        const std::vector<float> values = y.values();
                        const size_t per_image = bits.size() / images;
                        for (size_t i = 0; i < bits.size(); ++i) {
                            const float got = values[i];
                            const double expected = activated(act, sums[i]);
                            if (i / per_image != poisoned)
                                require(
                                    bits[i] == clean_bits[i],
                                    "%s: a non-finite input in image %ld changes element %zu of image %zu",
                                    description.c_str(), poisoned, i % per_image, i / per_image);
                            else if (!std::isfinite(expected))
                                require(!std::isfinite(got), "%s: element %zu is %g, expected %g",
                                        description.c_str(), i % per_image, got, expected);
                            // Winograd may spread NaN and Inf over a tile (and Inf - Inf is NaN, also after
                            // ReLU).
                            else if (algorithm != DCGAN_F2 && algorithm != DCGAN_F4)
                                require(std::isfinite(got), "%s: element %zu is %g, expected %g",
                                        description.c_str(), i % per_image, got, expected);
                        }
                        // Restore in reverse order, as an element may have been chosen twice.
                        for (auto s = saved.rbegin(); s != saved.rend(); ++s) *s->first = s->second;
                    }
                }
            }
    report("NaN and Inf: %ld runs", runs);
}

// With an input of zeros every sum is 0 and the result is act(shift), for every algorithm: the shifts are the
// values on which an activation is tested.
void test_activations() {
    Random random(4);
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> values = {0.0f, infinity, std::numeric_limits<float>::quiet_NaN(),
                                 std::numeric_limits<float>::max()};
    for (const float x : {1e-38f, 1e-30f, 1e-8f, 1e-4f, 0.1f,  0.3499999f, 0.35f,  0.5f,   1.0f,   5.0f, 9.0f,
                          17.0f,  50.0f,  86.9f, 87.0f, 87.1f, 88.0f,      100.0f, 104.0f, 200.0f, 1e10f})
        values.push_back(x);
    const size_t special = values.size();
    for (size_t i = 0; i < special; ++i) values.push_back(-values[i]);
    // A sweep of magnitudes from 1e-3 to 100, the range of typical sums.
    for (int i = 0; i < 400; ++i)
        for (const float sign : {-1.0f, 1.0f})
            values.push_back(sign * std::pow(10.0f, -3.0f + static_cast<float>(i) * 5.0f / 400));
    const long count = static_cast<long>(values.size());

    // e^x has a relative error of 1e-7; the division and the additions add a few roundings of 6e-8. Results
    // below the smallest normal number may be that number or 0.
    const double relative = 4e-7, absolute = 2e-38;
    double worst = 0;
    long runs = 0;
    for (const bool transposed : {false, true})
        for (const int algorithm : {DCGAN_DENSE, DCGAN_DIRECT, DCGAN_F2, DCGAN_F4, DCGAN_NARROW}) {
            const bool dense = algorithm == DCGAN_DENSE;
            const long side = !dense ? 3 : transposed ? 1 : 4;
            Layer layer(random, transposed, 4, dense ? 1 : 2, dense ? 0 : 1, 2, count, side, side);
            layer.affine(random, false, true);
            std::copy(values.begin(), values.end(), layer.shift.get());
            const Tensor x = Tensor::input(Layout::NHWC, 1, 2, side, side);
            std::fill(x.data, x.data + x.count(), 0.0f);
            for (const std::string& isa : isas()) {
                dcgan_use_isa(isa.c_str());
                layer.pack(algorithm);
                for (int act = 0; act < ACTIVATIONS; ++act) {
                    layer.activation(act);
                    const std::string description = describe(layer.l);
                    const Tensor y =
                        Tensor::output(Layout::NHWC, 1, count, layer.out_height(), layer.out_width());
                    run(layer, x, y, 1);
                    ++runs;
                    for (long i = 0; i < y.count(); ++i) {
                        const float value = values[static_cast<size_t>(i % count)], got = y.data[i];
                        const double expected = activated(act, value);
                        const char* const message = "%s: the activation of %.9g is %.9g, expected %.9g";
                        if (std::isfinite(expected)) {
                            const double difference = std::abs(got - expected);
                            require(difference <= relative * std::abs(expected) + absolute, message,
                                    description.c_str(), value, got, expected);
                            if (std::abs(expected) > 1e-30)
                                worst = std::max(worst, difference / std::abs(expected));
                        } else {
                            require(std::isnan(expected) ? std::isnan(got) : got == expected, message,
                                    description.c_str(), value, got, expected);
                        }
                    }
                }
            }
        }
    report("activations: %ld runs of %ld values; largest relative error %.1e", runs, count, worst);
}
