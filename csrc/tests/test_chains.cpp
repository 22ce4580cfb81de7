// Chains of layers, blocks of images, concurrent callers, forks and the workspace.
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "support.h"

struct Chain {
    std::vector<Layer> layers;
    std::vector<int> algorithms;
    Layout from, to;

    void add(Random& random, int algorithm, bool up, int kernel, long c_in, long c_out, long side, int act,
             bool scale = false, bool shift = false, bool statistics = false, bool bias = false) {
        const bool dense = algorithm == DCGAN_DENSE;
        layers.emplace_back(random, up, kernel, dense ? 1 : 2, dense ? 0 : 1, c_in, c_out, side, side);
        layers.back().affine(random, scale, shift, statistics, bias).activation(act);
        algorithms.push_back(algorithm);
    }
    // Packs all layers for the instruction set in use.
    std::vector<dcgan_layer> pack() {
        std::vector<dcgan_layer> all;
        for (size_t i = 0; i < layers.size(); ++i) all.push_back(layers[i].pack(algorithms[i]).l);
        return all;
    }
    Tensor input(Random& random, long images) const {
        const dcgan_layer& l = layers.front().l;
        return Tensor::random(random, from, images, l.c_in, l.height, l.width);
    }
    Tensor output(long images) const {
        const Layer& last = layers.back();
        return Tensor::output(to, images, last.l.c_out, last.out_height(), last.out_width());
    }
    // The result of running each layer in a separate call.
    std::vector<uint32_t> layer_by_layer(const Tensor& x) const {
        std::vector<Tensor> maps;
        for (const Layer& layer : layers) {
            const bool last = &layer == &layers.back();
            maps.push_back(Tensor::output(last ? to : Layout::NHWC, x.size[0], layer.l.c_out,
                                          layer.out_height(), layer.out_width()));
            run(layer, maps.size() == 1 ? x : maps[maps.size() - 2], maps.back(), 1);
        }
        return maps.back().bits();
    }
    std::string describe() const {
        std::string all;
        for (const Layer& layer : layers) all += (all.empty() ? "" : "; ") + ::describe(layer.l);
        return all;
    }
};

// From a latent vector to an NCHW image, with every algorithm.
static Chain generator(Random& random) {
    Chain chain{{}, {}, Layout::NHWC, Layout::NCHW};
    chain.add(random, DCGAN_DENSE, true, 4, 10, 33, 1, DCGAN_RELU, true, true);
    chain.add(random, DCGAN_F4, true, 4, 33, 17, 4, DCGAN_RELU, true, true, true, true);
    chain.add(random, DCGAN_F2, true, 4, 17, 12, 8, DCGAN_LEAKY_RELU, false, true);
    chain.add(random, DCGAN_DIRECT, true, 4, 12, 9, 16, DCGAN_RELU, true, false, true);
    chain.add(random, DCGAN_NARROW, true, 4, 9, 3, 32, DCGAN_TANH, false, false, false, true);
    return chain;
}

// From an NCHW image to one number, with every algorithm.
static Chain discriminator(Random& random) {
    Chain chain{{}, {}, Layout::NCHW, Layout::NHWC};
    chain.add(random, DCGAN_NARROW, false, 4, 3, 9, 64, DCGAN_LEAKY_RELU);
    chain.add(random, DCGAN_DIRECT, false, 4, 9, 12, 32, DCGAN_LEAKY_RELU, true, true, true, true);
    chain.add(random, DCGAN_F2, false, 4, 12, 17, 16, DCGAN_LEAKY_RELU, true, true);
    chain.add(random, DCGAN_F4, false, 4, 17, 33, 8, DCGAN_LEAKY_RELU, false, false, true);
    chain.add(random, DCGAN_DENSE, false, 4, 33, 1, 4, DCGAN_SIGMOID, false, false, false, true);
    return chain;
}

static void run_image(const std::vector<dcgan_layer>& layers, const Tensor& x, const Tensor& y, long image,
                      int threads) {
    const dcgan_tensor from = x.view(image), to = y.view(image);
    const int code = dcgan_run(layers.data(), static_cast<int>(layers.size()), 1, &from, &to, threads);
    require(code == 0, "image %ld: dcgan_run returns %d: %s", image, code, dcgan_error());
}

void test_chains() {
    Random random(5);
    long runs = 0;
    for (const bool is_generator : {true, false}) {
        Chain chain = is_generator ? generator(random) : discriminator(random);
        const long images = 5;
        const Tensor x = chain.input(random, images);
        for (const std::string& isa : isas()) {
            dcgan_use_isa(isa.c_str());
            const std::vector<dcgan_layer> layers = chain.pack();
            const int count = static_cast<int>(layers.size());
            const std::vector<uint32_t> expected = chain.layer_by_layer(x);
            for (const int threads : {1, 2, 7}) {
                const Tensor y = chain.output(images);
                run(layers.data(), count, x, y, threads);
                require(y.bits() == expected, "%s: %d threads and layer-by-layer calls give different bits",
                        chain.describe().c_str(), threads);
            }
            for (const int limit : {1, 2}) {
                require(dcgan_limit_threads(limit) == 0, "dcgan_limit_threads: %s", dcgan_error());
                const Tensor y = chain.output(images);
                run(layers.data(), count, x, y, 7);
                require(y.bits() == expected, "%s: different bits with 7 threads limited to %d",
                        chain.describe().c_str(), limit);
            }
            dcgan_limit_threads(0);
            const Tensor y = chain.output(images);
            for (long i = 0; i < images; ++i) run_image(layers, x, y, i, 2);
            require(y.bits() == expected, "%s: image-by-image calls give different bits",
                    chain.describe().c_str());
            // A released workspace is allocated again.
            dcgan_release();
            const Tensor again = chain.output(images);
            run(layers.data(), count, x, again, 2);
            require(again.bits() == expected, "%s: different bits after dcgan_release",
                    chain.describe().c_str());
            runs += 7;
        }
    }
    report("chains: %ld runs, identical bits layer by layer, image by image and with 1, 2 and 7 threads",
           runs);
}

// Chains for which one call takes several blocks of images, the last one smaller. Scratch memory that
// suffices for a whole block need not suffice for a smaller one, which is split into different units of work.
void test_blocks() {
    Random random(6);
    struct {
        Chain chain;
        std::vector<long> images;  // in ascending order
        int64_t between;           // floats per image between two layers
    } cases[] = {
        // Large maps between two layers with small weights. Depending on the number of images and threads,
        // each
        // thread runs separate blocks, or all threads share every block.
        {{{}, {}, Layout::NHWC, Layout::NHWC}, {25, 26, 49, 97}, 256 * 16 * 16},
        // The middle layer has 17 MB of weights, for which blocks are larger and shared by all threads.
        {{{}, {}, Layout::NHWC, Layout::NHWC}, {33}, 132 * 32 * 32},
    };
    cases[0].chain.add(random, DCGAN_DENSE, true, 16, 3, 256, 1, DCGAN_RELU, true, true, true);
    cases[0].chain.add(random, DCGAN_F4, false, 4, 256, 3, 16, DCGAN_TANH);
    cases[1].chain.add(random, DCGAN_DIRECT, true, 4, 2, 132, 16, DCGAN_RELU);
    cases[1].chain.add(random, DCGAN_DENSE, false, 32, 132, 32, 32, DCGAN_LEAKY_RELU, true, true, true);
    cases[1].chain.add(random, DCGAN_DENSE, true, 2, 32, 3, 1, DCGAN_TANH);
    for (auto& c : cases) {
        const long max_images = c.images.back();
        const Tensor all = c.chain.input(random, max_images);
        for (const std::string& isa : isas()) {
            dcgan_use_isa(isa.c_str());
            const std::vector<dcgan_layer> layers = c.chain.pack();
            const int count = static_cast<int>(layers.size());
            const int64_t workspace = dcgan_workspace(layers.data(), count, max_images, 1);
            require(workspace < max_images * c.between * 4,
                    "%s: %ld images are one block, but this test needs several", c.chain.describe().c_str(),
                    max_images);
            const std::vector<uint32_t> expected = c.chain.layer_by_layer(all);
            const size_t per_image = expected.size() / static_cast<size_t>(max_images);
            for (const long images : c.images)
                for (const int threads : {1, 2, 7}) {
                    const Tensor y = c.chain.output(images);
                    const dcgan_tensor from = all.view(), to = y.view();
                    const int code = dcgan_run(layers.data(), count, images, &from, &to, threads);
                    const std::vector<uint32_t> got = y.bits();
                    const auto differs = std::mismatch(got.begin(), got.end(), expected.begin()).first;
                    require(code == 0 && y.guards_intact() && differs == got.end(),
                            "%s: %ld images in blocks, %d threads: code %d, image %td differs",
                            c.chain.describe().c_str(), images, threads, code,
                            (differs - got.begin()) / static_cast<long>(per_image));
                }
            const Tensor y = c.chain.output(max_images);
            for (long i = 0; i < max_images; ++i) run_image(layers, all, y, i, 1);
            require(y.bits() == expected, "%s: image-by-image calls give different bits",
                    c.chain.describe().c_str());
        }
    }
    dcgan_release();
    report("blocks: several per call, identical bits layer by layer and image by image");
}

void test_concurrency() {
    Random random(7);
    const long images = 3;
    const int callers = 4, rounds = 4;
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        Chain chains[] = {generator(random), discriminator(random)};
        const Tensor x[] = {chains[0].input(random, images), chains[1].input(random, images)};
        const std::vector<dcgan_layer> layers[] = {chains[0].pack(), chains[1].pack()};
        const std::vector<uint32_t> expected[] = {chains[0].layer_by_layer(x[0]),
                                                  chains[1].layer_by_layer(x[1])};
        const auto call = [&](int caller) {
            for (int round = 0; round < rounds; ++round) {
                const int which = (caller + round) % 2, threads = 1 + (caller + round) % 3;
                const Tensor y = chains[which].output(images);
                run(layers[which].data(), static_cast<int>(layers[which].size()), x[which], y, threads);
                require(y.bits() == expected[which], "%s: different bits with %d concurrent callers",
                        chains[which].describe().c_str(), callers);
                if (round % 2) dcgan_release();
            }
            // Error messages are per thread.
            require(dcgan_error()[0] == '\0', "a thread without an error has the message: %s", dcgan_error());
            dcgan_run(nullptr, caller, 1, nullptr, nullptr, 1);
            require(std::strstr(dcgan_error(), "layers") != nullptr, "a failing thread has the message: %s",
                    dcgan_error());
        };
        std::vector<std::thread> threads;
        for (int caller = 0; caller < callers; ++caller) threads.emplace_back(call, caller);
        for (std::thread& thread : threads) thread.join();
        // The callers may themselves be threads of an OpenMP region.
#pragma omp parallel for num_threads(2) schedule(static, 1)
        for (int which = 0; which < 2; ++which) {
            const Tensor y = chains[which].output(images);
            run(layers[which].data(), static_cast<int>(layers[which].size()), x[which], y, 2);
            require(y.bits() == expected[which], "%s: different bits inside an OpenMP region",
                    chains[which].describe().c_str());
        }
    }
    report("concurrency: %d concurrent callers, %d runs each", callers, rounds);
}

void test_workspace() {
    Random random(8);
    // Blocks have equal sizes, so with many images a block is nearly as large as it can be.
    const int64_t some = 20000, many = 1000000, limit = int64_t{48} << 20;
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        const auto check = [&](const std::string& description, const dcgan_layer* layers, int count) {
            for (const int threads : {1, 2, 7}) {
                const int64_t less = dcgan_workspace(layers, count, some, threads);
                const int64_t more = dcgan_workspace(layers, count, many, threads);
                require(less > 0 && more > 0 && more <= limit &&
                            std::abs(static_cast<double>(more - less)) <= 0.05 * static_cast<double>(less),
                        "%s, %d threads: the workspace is %lld bytes for %lld images, but %lld for %lld",
                        description.c_str(), threads, static_cast<long long>(less),
                        static_cast<long long>(some), static_cast<long long>(more),
                        static_cast<long long>(many));
            }
            require(dcgan_workspace(layers, count, 0, 1) == 0,
                    "%s: the workspace for zero images is not empty", description.c_str());
        };
        for (const bool is_generator : {true, false}) {
            Chain chain = is_generator ? generator(random) : discriminator(random);
            const std::vector<dcgan_layer> layers = chain.pack();
            check(chain.describe(), layers.data(), static_cast<int>(layers.size()));
            for (const dcgan_layer& layer : layers) check(describe(layer), &layer, 1);
        }
    }
    report("workspace: bounded, nearly the same for %lld and %lld images", static_cast<long long>(some),
           static_cast<long long>(many));
}

void test_peak() {
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        for (const int threads : {1, 2}) {
            const double peak = dcgan_peak(threads, 0.01);
            require(std::isfinite(peak) && peak > 0, "dcgan_peak(%d, 0.01) returns %g", threads, peak);
        }
    }
    report("peak: positive");
}

// --- forks

static void same_bits_in_child(const char* when) {
    Random random(9);
    const long images = 3;
    Chain chain = generator(random);
    const Tensor x = chain.input(random, images);
    const auto bits = [&](int threads) {
        const std::vector<dcgan_layer> layers = chain.pack();
        const Tensor y = chain.output(images);
        run(layers.data(), static_cast<int>(layers.size()), x, y, threads);
        return y.bits();
    };
    const std::vector<uint32_t> expected = bits(2);
    in_child(when, [&] {
        require(bits(2) == expected, "a forked child gives different bits: %s", when);
        for (Layer& layer : chain.layers) layer.pack(layer.l.algorithm, 2);
        require(dcgan_peak(2, 0.01) > 0, "dcgan_peak fails in a forked child: %s", when);
    });
}

// Runs in a separate process in which the engine has not run yet: an OpenMP pool that was created otherwise
// does not survive the fork either.
void run_after_fork(const char* pool) {
    if (std::strcmp(pool, "peak") == 0) {
        dcgan_peak(2, 0.01);
    } else {
        int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)
        ++threads;
        require(threads == 2, "%d OpenMP threads instead of 2", threads);
    }
    in_child(pool, [] {
        Random random(10);
        Chain chain = generator(random);
        const std::vector<dcgan_layer> layers = chain.pack();
        const Tensor x = chain.input(random, 1), y = chain.output(1);
        run(layers.data(), static_cast<int>(layers.size()), x, y, 2);
    });
}

void test_forks() {
    for (const std::string& isa : isas()) {
        dcgan_use_isa(isa.c_str());
        same_bits_in_child("after runs on several threads");
    }
    for (const char* pool : {"peak", "host"}) {
        std::fflush(stdout);
        const pid_t child = fork();
        require(child >= 0, "fork failed");
        if (child == 0) {
            execl("/proc/self/exe", "driver", "run-after-fork", pool, nullptr);
            std::_Exit(2);
        }
        int status = 0;
        waitpid(child, &status, 0);
        require(WIFEXITED(status) && WEXITSTATUS(status) == 0,
                "a child forked after %s, before any other run, failed (see above)",
                std::strcmp(pool, "peak") == 0 ? "dcgan_peak on 2 threads"
                                               : "an OpenMP region of the host process");
    }
    report("forks: children run and give identical bits");
}
