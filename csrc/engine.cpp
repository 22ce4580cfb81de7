// The engine of one instruction set: the algorithms, compiled with its flags (see vec.h), behind one table.
#include "engine.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <time.h>

#include "affine.h"
#include "dense.h"
#include "direct.h"
#include "narrow.h"
#include "streamed.h"
#include "wgrad.h"
#include "winograd.h"

namespace dcgan::DCGAN_ISA {

template <class F>
static auto with_algorithm(const dcgan_layer& l, const F& f) {
    switch (l.algorithm) {
        case DCGAN_DENSE:
            return f(Dense{});
        case DCGAN_DIRECT:
            return f(Direct{});
        case DCGAN_F2:
            return f(Winograd<F2>{});
        case DCGAN_F4:
            return f(Winograd<F4>{});
        default:
            return f(Narrow{});
    }
}

static long packed_size(const dcgan_layer& l) {
    return with_algorithm(l, [&](auto algorithm) { return decltype(algorithm)::packed_size(l); });
}

static void pack(const dcgan_layer& l, const float* weight, const int64_t strides[4], float* packed,
                 int threads) {
    const Weights w(l, weight, strides);
    with_algorithm(l, [&](auto algorithm) { decltype(algorithm)::pack(l, w, packed, threads); });
}

static long scratch_size(const Job& job, int threads) {
    return with_algorithm(*job.layer,
                          [&](auto algorithm) { return decltype(algorithm)::scratch_size(job, threads); });
}

static void run(const Job& job, int threads, float* scratch, long scratch_stride) {
    with_algorithm(*job.layer,
                   [&](auto algorithm) { decltype(algorithm)::run(job, threads, scratch, scratch_stride); });
}

static long units(const Job& job, int threads) {
    return with_algorithm(*job.layer,
                          [&](auto algorithm) { return decltype(algorithm)::plan(job, threads).units(); });
}

static long shift_memory(const Source& e, long pixels) {
    return ShiftGradient(e, pixels).memory();
}

static void shift_gradient(const Source& e, long pixels, int threads, float* memory, float* dshift) {
    ShiftGradient(e, pixels).run(threads, memory, dshift);
}

static void scale_gradient(const dcgan_layer& l, const float* weight, const int64_t strides[4],
                           float* dweight, const int64_t dweight_strides[4], int threads, float* dscale) {
    ScaleGradient(l, weight, strides, dweight, dweight_strides).run(threads, dscale);
}

// 12 independent dependency chains hide the latency of an FMA on every target.
static double multiply_adds(double seconds) {
    volatile float one = 1.0f, tiny = 1e-9f;  // volatile, so that the compiler cannot fold the loop
    const vec factor = splat(one), term = splat(tiny);
    vec sums[12];
    for (long i = 0; i < 12; ++i) sums[i] = splat(static_cast<float>(i));
    const auto now = [] {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
    };
    const double start = now();
    double rounds = 0, elapsed = 0;
    while (elapsed < seconds) {
        for (long i = 0; i < 20000; ++i) {
#pragma GCC unroll 12
            for (long j = 0; j < 12; ++j) sums[j] = sums[j] * factor + term;
        }
        rounds += 20000.0 * 12 * LANES;
        elapsed = now() - start;
    }
    vec all{};
    for (long i = 0; i < 12; ++i) all += sums[i];
    volatile float sink = all[0];
    static_cast<void>(sink);
    return rounds / elapsed;
}

static double peak(int threads, double seconds) {
    double total = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(+ : total)
#endif
    total += multiply_adds(seconds);
    return total;
}

}  // namespace dcgan::DCGAN_ISA

namespace dcgan {

#define DCGAN_TABLE_OF(isa) engine_##isa
#define DCGAN_TABLE(isa) DCGAN_TABLE_OF(isa)
#define DCGAN_NAME_OF(isa) #isa
#define DCGAN_NAME(isa) DCGAN_NAME_OF(isa)

const Engine DCGAN_TABLE(DCGAN_ISA) = {DCGAN_NAME(DCGAN_ISA),
                                       DCGAN_ISA::PANEL,
                                       DCGAN_ISA::packed_size,
                                       DCGAN_ISA::pack,
                                       DCGAN_ISA::scratch_size,
                                       DCGAN_ISA::run,
                                       DCGAN_ISA::units,
                                       DCGAN_ISA::fill,
                                       DCGAN_ISA::Streamed::memory,
                                       DCGAN_ISA::Streamed::units,
                                       DCGAN_ISA::Streamed::run,
                                       DCGAN_ISA::WeightGradient::memory,
                                       DCGAN_ISA::WeightGradient::run,
                                       DCGAN_ISA::shift_memory,
                                       DCGAN_ISA::shift_gradient,
                                       DCGAN_ISA::scale_gradient,
                                       DCGAN_ISA::peak};

}  // namespace dcgan
