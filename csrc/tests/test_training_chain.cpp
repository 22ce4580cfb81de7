// A network in training, compared with calls of its layers one by one, which test_products.cpp and
// test_wgrad.cpp compare with their definition.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "op_case.h"

namespace {

constexpr double EPSILON = 1e-5;

// The results of a network's passes, guarded.
struct Results {
    std::vector<Tensor> y, stats, dweight, dgamma, dbeta, dx;

    std::vector<uint32_t> bits() const {
        std::vector<uint32_t> all;
        for (const auto* tensors : {&y, &stats, &dweight, &dgamma, &dbeta, &dx})
            for (const Tensor& t : *tensors) {
                const std::vector<uint32_t> own = t.bits();
                all.insert(all.end(), own.begin(), own.end());
            }
        return all;
    }
    bool guards_intact() const {
        for (const auto* tensors : {&y, &stats, &dweight, &dgamma, &dbeta, &dx})
            for (const Tensor& t : *tensors)
                if (!t.guards_intact()) return false;
        return true;
    }
};

// Which results of a backward pass are requested.
struct Wanted {
    bool dx = true;
    std::function<bool(size_t)> dweight = [](size_t) { return true; };
    std::function<bool(size_t)> vectors = dweight;
};

struct Network {
    long images;
    int groups;
    std::vector<dcgan_train_layer> layers;
    std::vector<Tensor> weights;
    std::vector<Floats> gammas, betas;
    Tensor x{}, dy{};
    long first_image = 0;  // of x and dy that the passes start at

    Network(long images_of, int groups_of, long channels, Size map)
        : images(images_of), groups(groups_of), channels_(channels), map_(map) {}

    // Adds a layer with algorithms at random. Kernel 4 has stride 2 and padding 1; others are dense layers.
    // `plain`: without gamma and beta, or without a bias.
    Network& add(Random& random, bool transposed, int kernel, long c_out, int act, bool normalized,
                 bool plain = false) {
        const bool is_dense = kernel != 4;
        dcgan_train_layer l{};
        l.transposed = transposed;
        l.c_in = static_cast<int32_t>(channels_);
        l.c_out = static_cast<int32_t>(c_out);
        l.height = static_cast<int32_t>(map_.height);
        l.width = static_cast<int32_t>(map_.width);
        l.kernel = kernel;
        l.stride = is_dense ? 1 : 2;
        l.padding = is_dense ? 0 : 1;
        l.act = act;
        l.normalized = normalized;
        l.epsilon = EPSILON;
        const auto pick = [&](std::initializer_list<int> algorithms) {
            return is_dense ? DCGAN_DENSE : *(algorithms.begin() + random() % algorithms.size());
        };
        // The narrow algorithm computes no sums over the pixels of its larger map.
        const bool after_norm = !layers.empty() && layers.back().normalized;
        l.fprop = transposed && normalized ? pick({DCGAN_DIRECT, DCGAN_F2, DCGAN_F4})
                                           : pick({DCGAN_DIRECT, DCGAN_F2, DCGAN_F4, DCGAN_NARROW});
        l.dgrad = !transposed && after_norm ? pick({DCGAN_DIRECT, DCGAN_F2, DCGAN_F4})
                                            : pick({DCGAN_DIRECT, DCGAN_F2, DCGAN_F4, DCGAN_NARROW});
        l.wgrad = pick({DCGAN_DIRECT, DCGAN_F4, DCGAN_NARROW});
        const long small = transposed ? l.c_in : l.c_out, large = transposed ? l.c_out : l.c_in;
        const Layout layouts[] = {Layout::NCHW, Layout::NHWC, Layout::PADDED, Layout::SCATTERED};
        weights.push_back(Tensor::random(random, layouts[layers.size() % 4], small, large, kernel, kernel));
        l.weight = weights.back().data;
        std::copy_n(weights.back().strides, 4, l.weight_strides);
        gammas.push_back(normalized && !plain ? random_around(random, c_out, 1.0f) : nullptr);
        betas.push_back(plain ? nullptr : random_around(random, c_out, 0.0f));
        l.gamma = gammas.back().get();
        l.beta = betas.back().get();
        layers.push_back(l);
        channels_ = c_out;
        map_ = out_size(l);
        return *this;
    }
    // Draws x and dy after the last layer.
    Network& end(Random& random) {
        const dcgan_train_layer& first = layers.front();
        x = Tensor::random(random, Layout::NHWC, images, first.c_in, first.height, first.width);
        dy = Tensor::random(random, Layout::NHWC, images, channels_, map_.height, map_.width);
        return *this;
    }

    int count() const { return static_cast<int>(layers.size()); }

    Results forward(int threads) {
        Results r;
        for (dcgan_train_layer& l : layers) {
            const Size out = out_size(l);
            r.y.push_back(Tensor::output(Layout::NHWC, images, l.c_out, out.height, out.width));
            l.y = r.y.back().data;
            l.stats = nullptr;
            r.stats.push_back(vector_of(l.normalized ? 4 * groups * l.c_out : 0));
            if (l.normalized) l.stats = r.stats.back().data;
        }
        const int code = dcgan_train_forward(layers.data(), count(), images, groups, SLOPE,
                                             x.view(first_image).data, threads);
        require(code == 0, "%s: forward returns %d: %s", describe(threads).c_str(), code, dcgan_error());
        require(r.guards_intact(), "%s: forward wrote out of bounds", describe(threads).c_str());
        return r;
    }
    // Adds the gradients to the results of the forward pass.
    void backward(Results& r, int threads, const Wanted& wanted = {}) {
        for (size_t i = 0; i < layers.size(); ++i) {
            dcgan_train_layer& l = layers[i];
            r.dweight.push_back(weights_like(i));
            l.dweight = wanted.dweight(i) ? r.dweight.back().data : nullptr;
            std::copy_n(r.dweight.back().strides, 4, l.dweight_strides);
            r.dgamma.push_back(vector_of(l.normalized ? l.c_out : 0));
            r.dbeta.push_back(vector_of(l.c_out));
            l.dgamma = l.normalized && wanted.vectors(i) ? r.dgamma.back().data : nullptr;
            l.dbeta = wanted.vectors(i) ? r.dbeta.back().data : nullptr;
        }
        const dcgan_train_layer& first = layers.front();
        r.dx.push_back(Tensor::output(Layout::NHWC, images, first.c_in, first.height, first.width));
        const int code =
            dcgan_train_backward(layers.data(), count(), images, groups, SLOPE, x.view(first_image).data,
                                 dy.view(first_image).data, wanted.dx ? r.dx[0].data : nullptr, threads);
        require(code == 0, "%s: backward returns %d: %s", describe(threads).c_str(), code, dcgan_error());
        require(r.guards_intact(), "%s: backward wrote out of bounds", describe(threads).c_str());
    }
    Results both(int threads) {
        Results r = forward(threads);
        backward(r, threads);
        return r;
    }
    Tensor weights_like(size_t i) const {
        const Tensor& weight = weights[i];
        const Layout layouts[] = {Layout::NHWC, Layout::SCATTERED, Layout::NCHW, Layout::PADDED};
        return Tensor::output(layouts[i % 4], weight.size[0], weight.size[1], weight.size[2], weight.size[3]);
    }

    std::string describe(int threads) const {
        std::string all;
        for (const dcgan_train_layer& l : layers)
            all += std::string(l.transposed ? "up" : "down") + " k" + std::to_string(l.kernel) + " " +
                   std::to_string(l.c_in) + "→" + std::to_string(l.c_out) + " on " +
                   std::to_string(l.height) + "×" + std::to_string(l.width) + " " + algorithm_name(l.fprop) +
                   "/" + algorithm_name(l.dgrad) + "/" + algorithm_name(l.wgrad) +
                   (l.normalized ? " normalized " : " ") + activation_name(l.act) + "; ";
        return all + std::to_string(images) + " images in " + std::to_string(groups) + " groups, " +
               std::to_string(threads) + " threads";
    }

 private:
    long channels_;  // of the last layer's output, as map_
    Size map_;
};

// The relative L2 difference.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
    double off = 0, size = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        off += (a[i] - static_cast<double>(b[i])) * (a[i] - static_cast<double>(b[i]));
        size += static_cast<double>(b[i]) * b[i];
    }
    return off == 0 ? 0 : std::sqrt(off / size);
}

// Layer i as an op, whose prologue has the statistics in `r`.
dcgan_op op_of(const Network& network, const Results& r, size_t i, int algorithm) {
    const dcgan_train_layer& l = network.layers[i];
    dcgan_op op{};
    op.transposed = l.transposed, op.algorithm = algorithm;
    op.c_in = l.c_in, op.c_out = l.c_out, op.height = l.height, op.width = l.width;
    op.kernel = l.kernel, op.stride = l.stride, op.padding = l.padding;
    op.slope = SLOPE;
    op.statistics = l.normalized;
    op.out_act = l.normalized ? DCGAN_NONE : l.act;
    op.out_shift = l.normalized ? nullptr : l.beta;
    if (i > 0 && network.layers[i - 1].normalized) {
        op.in_act = network.layers[i - 1].act;
        op.center = r.stats[i - 1].data;
        op.scale = op.center + 2 * l.c_in;
        op.shift = op.center + 3 * l.c_in;
    }
    return op;
}

void compare_forward(const Network& network, const Results& r, int threads) {
    const std::string description = network.describe(threads);
    for (size_t i = 0; i < network.layers.size(); ++i) {
        const dcgan_train_layer& l = network.layers[i];
        const dcgan_op op = op_of(network, r, i, l.fprop);
        const Tensor& got = r.y[i];
        const Tensor y = Tensor::output(Layout::NHWC, got.size[0], got.size[1], got.size[2], got.size[3]);
        const Tensor mean = vector_of(l.c_out), variance = vector_of(l.c_out);
        const int code = dcgan_fprop(&op, network.images, i == 0 ? network.x.data : r.y[i - 1].data, l.weight,
                                     l.weight_strides, y.data, mean.data, variance.data, threads);
        require(code == 0, "fprop: %s", dcgan_error());
        require(y.bits() == got.bits(), "%s: y of layer %zu has different bits", description.c_str(), i);
        if (!l.normalized) continue;
        const float* const stats = r.stats[i].data;
        const size_t bytes = static_cast<size_t>(l.c_out) * sizeof(float);
        require(std::memcmp(stats, mean.data, bytes) == 0 &&
                    std::memcmp(stats + l.c_out, variance.data, bytes) == 0,
                "%s: statistics of layer %zu have different bits", description.c_str(), i);
        for (long c = 0; c < l.c_out; ++c) {
            const double scale = (l.gamma ? l.gamma[c] : 1.0) / std::sqrt(variance.data[c] + EPSILON);
            require(std::abs(stats[2 * l.c_out + c] - scale) <= 1e-7 * std::abs(scale),
                    "%s: scale of layer %zu", description.c_str(), i);
            require(stats[3 * l.c_out + c] == (l.beta ? l.beta[c] : 0.0f), "%s: shift of layer %zu",
                    description.c_str(), i);
        }
    }
}

// Down to the uppermost BatchNorm the bits are the same. Below it, the vectors of its gradient are rounded
// more often in the calls layer by layer.
double compare_backward(const Network& network, const Results& r, int threads) {
    const std::string description = network.describe(threads);
    bool exact = true;
    double worst = 0;
    const auto compare = [&](const Tensor& got, const Tensor& expected, const char* name, size_t i) {
        if (exact) {
            require(got.bits() == expected.bits(), "%s: %s of layer %zu has different bits",
                    description.c_str(), name, i);
            return;
        }
        const double off = difference(got.values(), expected.values());
        require(off <= PRODUCT_BOUND, "%s: %s of layer %zu differs by %.2e", description.c_str(), name, i,
                off);
        worst = std::max(worst, off);
    };
    Tensor dy = Tensor::output(Layout::NHWC, 0, 1, 1, 1);
    Floats dmean, dvariance;
    for (size_t i = network.layers.size(); i-- > 0;) {
        const dcgan_train_layer& l = network.layers[i];
        const bool last = i + 1 == network.layers.size();
        const float* const t = last ? network.dy.data : dy.data;
        const float* const input = i == 0 ? network.x.data : r.y[i - 1].data;
        dcgan_op op = op_of(network, r, i, l.wgrad);
        if (l.normalized) {
            op.mean = r.stats[i].data;
            op.dmean = dmean.get();
            op.dvariance = dvariance.get();
        }
        const Tensor dweight = network.weights_like(i);
        require(dcgan_wgrad(&op, network.images, input, t, r.y[i].data, dweight.data, dweight.strides,
                            nullptr, nullptr, nullptr, threads) == 0,
                "wgrad: %s", dcgan_error());
        compare(r.dweight[i], dweight, "dweight", i);
        if (!l.normalized) {
            const Tensor dbias = vector_of(l.c_out);
            require(dcgan_shift_gradient(&op, network.images, t, r.y[i].data, dbias.data, threads) == 0,
                    "shift_gradient: %s", dcgan_error());
            compare(r.dbeta[i], dbias, "dbeta", i);
        }
        op.algorithm = l.dgrad;
        Tensor dx = Tensor::output(Layout::NHWC, network.images, l.c_in, l.height, l.width);
        const Tensor dcenter = vector_of(l.c_in), dscale = vector_of(l.c_in), dshift = vector_of(l.c_in);
        const bool affine = op.scale != nullptr;
        require(dcgan_dgrad(&op, network.images, t, r.y[i].data, l.weight, l.weight_strides, input, dx.data,
                            affine ? dcenter.data : nullptr, affine ? dscale.data : nullptr,
                            affine ? dshift.data : nullptr, threads) == 0,
                "dgrad: %s", dcgan_error());
        if (i == 0) {
            compare(r.dx[0], dx, "dx", i);
            break;
        }
        dy = std::move(dx);
        if (!affine) continue;
        compare(r.dbeta[i - 1], dshift, "dbeta", i - 1);
        exact = false;
        const dcgan_train_layer& below = network.layers[i - 1];
        dmean = Floats(new float[static_cast<size_t>(l.c_in)]);
        dvariance = Floats(new float[static_cast<size_t>(l.c_in)]);
        const Tensor dgamma = vector_of(l.c_in);
        for (long c = 0; c < l.c_in; ++c) {
            const double inverse = 1.0 / std::sqrt(r.stats[i - 1].data[l.c_in + c] + EPSILON);
            const double gamma = below.gamma ? below.gamma[c] : 1.0;
            dgamma.data[c] = static_cast<float>(dscale.data[c] * inverse);
            const size_t at = static_cast<size_t>(c);
            dmean[at] = dcenter.data[c];
            dvariance[at] = static_cast<float>(-0.5 * gamma * inverse * inverse * inverse * dscale.data[c]);
        }
        compare(r.dgamma[i - 1], dgamma, "dgamma", i - 1);
    }
    return worst;
}

// Runs as many calls as there are groups, in order: the maps have the same bits, as have the sums of
// gradients.
void compare_groups(Network& network, const Results& r, int threads) {
    const std::string description = network.describe(threads);
    const int groups = network.groups;
    const long part = network.images / groups;
    std::vector<Results> parts;
    network.groups = 1;
    network.images = part;
    for (int group = 0; group < groups; ++group) {
        network.first_image = group * part;
        parts.push_back(network.both(threads));
    }
    network.first_image = 0;
    network.groups = groups;
    network.images = groups * part;
    const auto concatenated = [&](auto results) {
        std::vector<uint32_t> all;
        for (const Results& of_part : parts) {
            const std::vector<uint32_t> own = results(of_part).bits();
            all.insert(all.end(), own.begin(), own.end());
        }
        return all;
    };
    require(r.dx[0].bits() == concatenated([](const Results& p) -> const Tensor& { return p.dx[0]; }),
            "%s: dx differs from that of each group alone", description.c_str());
    for (size_t i = 0; i < network.layers.size(); ++i) {
        const dcgan_train_layer& l = network.layers[i];
        require(r.y[i].bits() == concatenated([&](const Results& p) -> const Tensor& { return p.y[i]; }),
                "%s: y of layer %zu differs from that of each group alone", description.c_str(), i);
        for (long row = 0; l.normalized && row < 4; ++row)
            for (int group = 0; group < groups; ++group)
                require(std::memcmp(r.stats[i].data + (row * groups + group) * l.c_out,
                                    parts[static_cast<size_t>(group)].stats[i].data + row * l.c_out,
                                    static_cast<size_t>(l.c_out) * sizeof(float)) == 0,
                        "%s: statistics of layer %zu differ from those of group %d alone",
                        description.c_str(), i, group);
        const auto summed = [&](auto results) {
            std::vector<float> all = results(parts[0]).values();
            for (size_t p = 1; p < parts.size(); ++p) {
                const std::vector<float> own = results(parts[p]).values();
                for (size_t at = 0; at < all.size(); ++at) all[at] += own[at];
            }
            return all;
        };
        require(
            r.dweight[i].values() == summed([&](const Results& p) -> const Tensor& { return p.dweight[i]; }),
            "%s: dweight of layer %zu is not the sum over the groups", description.c_str(), i);
        for (const auto member : {&Results::dgamma, &Results::dbeta}) {
            const double off =
                difference((r.*member)[i].values(),
                           summed([&](const Results& p) -> const Tensor& { return (p.*member)[i]; }));
            require(off <= 1e-6,
                    "%s: dgamma or dbeta of layer %zu differs by %.2e from the sum over the groups",
                    description.c_str(), i, off);
        }
    }
}

// Whatever is not requested is not written, and the rest has the same bits.
void compare_subsets(Network& network, const Results& r, int threads) {
    const std::string description = network.describe(threads);
    const size_t count = network.layers.size();
    std::vector<Wanted> subsets = {{true, [](size_t) { return false; }}, {false}};
    for (size_t i = 0; i < count; ++i) {
        const auto only = [i](size_t at) { return at == i; };
        const auto none = [](size_t) { return false; };
        subsets.push_back({false, only, none});
        subsets.push_back({false, none, only});
        subsets.push_back({i % 2 == 0, [i](size_t at) { return at != i; }});
    }
    for (const Wanted& wanted : subsets) {
        Results some;
        network.backward(some, threads, wanted);
        const auto same = [&](const Tensor& got, const Tensor& expected, bool is_wanted, const char* name) {
            require(is_wanted ? got.bits() == expected.bits() : got.untouched(),
                    "%s: %s differs in a backward of a subset", description.c_str(), name);
        };
        same(some.dx[0], r.dx[0], wanted.dx, "dx");
        for (size_t i = 0; i < count; ++i) {
            const bool vectors = wanted.vectors(i);
            same(some.dweight[i], r.dweight[i], wanted.dweight(i), "dweight");
            same(some.dgamma[i], r.dgamma[i], network.layers[i].normalized && vectors, "dgamma");
            same(some.dbeta[i], r.dbeta[i], vectors, "dbeta");
        }
    }
}

// Chains of every kind of layer, with odd maps and with vectors that are not full.
std::vector<Network> networks(Random& random, long images, int groups) {
    std::vector<Network> all;
    const auto start = [&](long channels, Size map) -> Network& {
        return all.emplace_back(images, groups, channels, map);
    };
    start(6, {1, 1})  // a generator
        .add(random, true, 3, 33, DCGAN_RELU, true)
        .add(random, true, 4, 17, DCGAN_RELU, true)
        .add(random, true, 4, 9, DCGAN_LEAKY_RELU, true, true)
        .add(random, true, 4, 3, DCGAN_TANH, false);
    start(3, {25, 27})  // a discriminator
        .add(random, false, 4, 9, DCGAN_LEAKY_RELU, false)
        .add(random, false, 4, 16, DCGAN_LEAKY_RELU, true)
        .add(random, false, 4, 33, DCGAN_LEAKY_RELU, true)
        .add(random, false, 3, 1, DCGAN_NONE, false);
    start(1, {9, 14})  // down and up again
        .add(random, false, 4, 5, DCGAN_NONE, true)
        .add(random, true, 4, 20, DCGAN_RELU, false)
        .add(random, false, 4, 7, DCGAN_NONE, false, true)
        .add(random, true, 4, 1, DCGAN_SIGMOID, false);
    start(4, {5, 7}).add(random, true, 4, 18, DCGAN_LEAKY_RELU, false);
    for (Network& network : all) network.end(random);
    return all;
}

}  // namespace

void test_training_chain() {
    Random random(17);
    long runs = 0;
    double worst = 0;
    const struct {
        long images;
        int groups;
    } cases[] = {{1, 1}, {3, 1}, {4, 2}, {6, 3}, {9, 1}, {9, 9}};
    for (const auto& [images, groups] : cases)
        for (Network& network : networks(random, images, groups))
            for (const std::string& isa : isas()) {
                dcgan_use_isa(isa.c_str());
                // The first run has fresh memory (NaN in the checked build), the others reuse it.
                dcgan_release();
                for (const int threads : {1, 2, 7}) {
                    const Results r = network.both(threads);
                    if (groups == 1) {
                        compare_forward(network, r, threads);
                        worst = std::max(worst, compare_backward(network, r, threads));
                    } else {
                        compare_groups(network, r, threads);
                    }
                    if (threads == 2) {
                        const Results again = network.both(threads);
                        require(again.bits() == r.bits(), "%s: a second run gives different bits",
                                network.describe(threads).c_str());
                        compare_subsets(network, again, threads);
                        dcgan_limit_threads(1);
                        require(network.both(threads).bits() == r.bits(),
                                "%s: different bits on a limited number of threads",
                                network.describe(threads).c_str());
                        dcgan_limit_threads(0);
                    }
                    ++runs;
                }
            }
    // Several blocks of images, which each thread runs alone or all threads run together; F(4×4) weights that
    // are too large to be stored transformed.
    const auto test_large = [&](Network& network) {
        network.end(random);
        for (const std::string& isa : isas()) {
            dcgan_use_isa(isa.c_str());
            dcgan_release();
            for (const int threads : {1, 2}) {
                const Results r = network.both(threads);
                compare_forward(network, r, threads);
                worst = std::max(worst, compare_backward(network, r, threads));
                ++runs;
            }
        }
    };
    Network blocks(30, 1, 16, {64, 64});
    blocks.add(random, false, 4, 16, DCGAN_LEAKY_RELU, true)
        .add(random, true, 4, 16, DCGAN_RELU, true)
        .add(random, false, 4, 3, DCGAN_NONE, false);
    test_large(blocks);
    Network streamed(3, 1, 9, {1, 1});
    streamed.add(random, true, 3, 210, DCGAN_RELU, true)
        .add(random, true, 4, 210, DCGAN_RELU, true)
        .add(random, false, 4, 210, DCGAN_LEAKY_RELU, true)
        .add(random, true, 4, 3, DCGAN_NONE, false);
    for (size_t i : {size_t{1}, size_t{2}})
        streamed.layers[i].fprop = streamed.layers[i].dgrad = streamed.layers[i].wgrad = DCGAN_F4;
    test_large(streamed);
    report("training chains: %ld runs, the bits of single layers; largest difference below a BatchNorm %.1e",
           runs, worst);
}

void test_training_chain_concurrency() {
    Random random(18);
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        std::vector<uint32_t> expected[4];
        std::vector<Network> own[4];
        for (int caller = 0; caller < 4; ++caller) {
            own[caller] = networks(random, 4, 2);
            expected[caller] = own[caller][static_cast<size_t>(caller)].both(1 + caller % 3).bits();
        }
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller)
            callers.emplace_back([&, caller] {
                Network& network = own[caller][static_cast<size_t>(caller)];
                for (int round = 0; round < 4; ++round) {
                    require(network.both(1 + caller % 3).bits() == expected[caller],
                            "%s: different bits with 4 concurrent callers",
                            network.describe(1 + caller % 3).c_str());
                    if (round % 2) dcgan_release();
                }
            });
        for (std::thread& caller : callers) caller.join();
        // A forked child runs on one thread, whatever the `threads` argument is.
        in_child("training chains", [&] {
            require(own[0][0].both(2).bits() == expected[0],
                    "training chains: a forked child and one thread give different bits");
        });
    }
    report("training chains with concurrent callers and in a forked child: identical bits");
}

void test_training_chain_arguments() {
    Random random(19);
    Network network(4, 2, 5, {8, 10});
    network.add(random, false, 4, 6, DCGAN_LEAKY_RELU, true)
        .add(random, true, 4, 7, DCGAN_TANH, false)
        .end(random);
    for (dcgan_train_layer& l : network.layers) l.fprop = l.dgrad = l.wgrad = DCGAN_DIRECT;
    const Results r = network.both(1);
    const std::vector<uint32_t> before = r.bits();
    struct Call {
        std::vector<dcgan_train_layer> layers;
        int count;
        int64_t images;
        int groups;
        float slope;
        const float *x, *dy;
        int threads;
    };
    const auto valid = [&] {
        return Call{network.layers, 2, 4, 2, SLOPE, network.x.data, network.dy.data, 1};
    };
    const auto forward = [](const Call& c) {
        return dcgan_train_forward(c.layers.data(), c.count, c.images, c.groups, c.slope, c.x, c.threads);
    };
    const auto backward = [&](const Call& c) {
        return dcgan_train_backward(c.layers.data(), c.count, c.images, c.groups, c.slope, c.x, c.dy,
                                    r.dx[0].data, c.threads);
    };
    const struct {
        const char* names;  // must occur in the error message
        bool of_forward, of_backward;
        std::function<void(Call&)> invalidate;
    } invalid[] = {
        {"count must be positive", true, true, [](Call& c) { c.count = 0; }},
        {"count must be positive", true, true, [](Call& c) { c.count = -1; }},
        {"images", true, true, [](Call& c) { c.images = -2; }},
        {"images", true, true, [](Call& c) { c.images = (int64_t{1} << 28) + 2; }},
        {"groups must divide the 4 images, got 3", true, true, [](Call& c) { c.groups = 3; }},
        {"groups", true, true, [](Call& c) { c.groups = 0; }},
        {"threads", true, true, [](Call& c) { c.threads = 0; }},
        {"layer 0: slope", true, true, [](Call& c) { c.slope = -0.1f; }},
        {"x is null", true, true, [](Call& c) { c.x = nullptr; }},
        {"dy is null", false, true, [](Call& c) { c.dy = nullptr; }},
        {"layer 0: transposed", true, true, [](Call& c) { c.layers[0].transposed = 2; }},
        {"layer 1: c_in", true, true, [](Call& c) { c.layers[1].c_in = 0; }},
        {"layer 1: algorithm 1 needs kernel 4", true, true, [](Call& c) { c.layers[1].kernel = -1; }},
        {"layer 1 takes [6, 4, 6], but layer 0 outputs [6, 4, 5]", true, true,
         [](Call& c) { c.layers[1].width = 6; }},
        {"layer 1 takes [5, 4, 5], but layer 0 outputs [6, 4, 5]", true, true,
         [](Call& c) { c.layers[1].c_in = 5; }},
        {"layer 1: algorithm", true, true, [](Call& c) { c.layers[1].fprop = 5; }},
        {"layer 1: algorithm", false, true, [](Call& c) { c.layers[1].dgrad = -1; }},
        {"layer 0: algorithm F(2×2)", false, true, [](Call& c) { c.layers[0].wgrad = DCGAN_F2; }},
        {"layer 0: act", true, true, [](Call& c) { c.layers[0].act = DCGAN_TANH; }},
        {"layer 0: act", true, true, [](Call& c) { c.layers[0].act = -1; }},
        {"layer 1: act", true, true, [](Call& c) { c.layers[1].act = DCGAN_SIGMOID + 1; }},
        {"layer 0: normalized must be 0 or 1", true, true, [](Call& c) { c.layers[0].normalized = 2; }},
        {"layer 1: normalized must be 0", true, true, [](Call& c) { c.layers[1].normalized = 1; }},
        {"layer 0: epsilon", true, true, [](Call& c) { c.layers[0].epsilon = -1e-5; }},
        {"layer 0: epsilon", true, true, [](Call& c) { c.layers[0].epsilon = std::nan(""); }},
        {"layer 1: weight is null", true, true, [](Call& c) { c.layers[1].weight = nullptr; }},
        {"layer 0: stats is null", true, true, [](Call& c) { c.layers[0].stats = nullptr; }},
        {"layer 0: y is null", true, true, [](Call& c) { c.layers[0].y = nullptr; }},
        {"layer 1: y is null", true, true, [](Call& c) { c.layers[1].y = nullptr; }},
        {"layer 0: gamma", true, true, [](Call& c) { c.layers[0].normalized = 0; }},
        {"layer 1: gamma and dgamma", true, true, [](Call& c) { c.layers[1].gamma = c.layers[0].gamma; }},
        {"layer 1: gamma and dgamma", true, true, [](Call& c) { c.layers[1].dgamma = c.layers[0].dgamma; }},
    };
    long cases = 0;
    const auto expect_unwritten = [&](const char* names) {
        require(r.bits() == before, "a call with an invalid %s writes", names);
        ++cases;
    };
    for (const auto& i : invalid) {
        Call c = valid();
        i.invalidate(c);
        if (i.of_forward) expect_rejected("dcgan_train_forward", forward(c), i.names);
        if (i.of_backward) expect_rejected("dcgan_train_backward", backward(c), i.names);
        expect_unwritten(i.names);
    }
    expect_rejected("dcgan_train_forward", dcgan_train_forward(nullptr, 2, 4, 2, SLOPE, network.x.data, 1),
                    "layers is null");
    expect_rejected(
        "dcgan_train_backward",
        dcgan_train_backward(nullptr, 2, 4, 2, SLOPE, network.x.data, network.dy.data, nullptr, 1),
        "layers is null");
    // Algorithms that do not compute the sums of a BatchNorm; products that are not needed are not checked.
    Call c = valid();
    c.layers[0].dgrad = c.layers[0].wgrad = -1;
    c.layers[0].dweight = nullptr;
    require(dcgan_train_backward(c.layers.data(), 2, 4, 2, SLOPE, c.x, c.dy, nullptr, 1) == 0, "%s",
            dcgan_error());
    c = valid();
    c.layers[1].act = DCGAN_NONE, c.layers[1].y = nullptr;
    require(backward(c) == 0, "a last layer without an activation: %s", dcgan_error());
    require(forward(valid()) == 0 && backward(valid()) == 0 && r.bits() == before, "valid arguments: %s",
            dcgan_error());
    Call narrow = valid();
    narrow.layers[0] = narrow.layers[1];
    narrow.layers[0].normalized = 1, narrow.layers[0].act = DCGAN_RELU,
    narrow.layers[0].stats = r.stats[0].data;
    narrow.layers[0].fprop = DCGAN_NARROW;
    expect_rejected("dcgan_train_forward", forward(narrow), "layer 0: the narrow transposed");
    expect_unwritten("algorithm");
    // Zero images are valid, and a no-op.
    c = valid();
    c.images = 0;
    require(forward(c) == 0 && backward(c) == 0, "zero images: %s", dcgan_error());
    expect_unwritten("number of images");
    {  // A workspace that cannot be allocated is rejected before anything is read.
        Call huge = valid();
        huge.images = int64_t{1} << 20, huge.groups = 1, huge.threads = 1024;
        for (dcgan_train_layer& l : huge.layers) {
            l.c_in = l.c_out = 65536;
            l.height = l.width = 8192, l.transposed = 1;
        }
        huge.layers.pop_back(), huge.layers.push_back(huge.layers[0]);
        huge.layers[1].height = huge.layers[1].width = 16384;
        huge.layers[1].normalized = 0;
        huge.layers[1].gamma = nullptr, huge.layers[1].dgamma = nullptr;
        for (const int code : {forward(huge), backward(huge)}) {
            require(code == DCGAN_EMEMORY, "a workspace of terabytes: %d: %s", code, dcgan_error());
            require(std::strstr(dcgan_error(), "workspace") != nullptr,
                    "that error does not name the workspace: %s", dcgan_error());
        }
        expect_unwritten("size");
    }
    report("training chain arguments: %ld invalid cases rejected", cases);
}
