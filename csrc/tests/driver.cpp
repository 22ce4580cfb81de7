// Tests of the engine through its C ABI, for every instruction set that this machine runs.
//
//     make -C csrc/tests
//
// One line for each group of tests; the first failure ends them with a message and a non-zero status.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "support.h"

void test_layers();
void test_views();
void test_nonfinite();
void test_activations();
void test_chains();
void test_blocks();
void test_concurrency();
void test_workspace();
void test_forks();
void run_after_fork(const char* pool);
void test_arguments();
void test_peak();
void test_training();
void test_statistics();
void test_training_callers();
void test_training_arguments();
void test_wgrad();
void test_affine_arguments();
void test_samples();

// Fresh memory is NaN, so that a result made from scratch memory that was never written shows. And a
// workspace of hundreds of terabytes is refused, as malloc refuses it, not the end of the program.
extern "C" const char* __asan_default_options() {
    return "malloc_fill_byte=255:max_malloc_fill_size=1000000000:allocator_may_return_null=1";
}

int main(int count, char** arguments) {
    if (count == 3 && std::strcmp(arguments[1], "run-after-fork") == 0) {
        run_after_fork(arguments[2]);
        return 0;
    }
    require(dcgan_abi() == DCGAN_ABI, "dcgan_abi() gives %d, dcgan.h says %d", dcgan_abi(), DCGAN_ABI);
    for (const std::string& isa : words(dcgan_built())) {
        const bool here = std::find(isas().begin(), isas().end(), isa) != isas().end();
        report("%s: built, %srun on this machine", isa.c_str(), here ? "" : "not ");
    }
    test_arguments();
    test_activations();
    test_layers();
    test_training_arguments();
    test_training();
    test_statistics();
    test_training_callers();
    test_wgrad();
    test_affine_arguments();
    test_samples();
    test_views();
    test_nonfinite();
    test_chains();
    test_concurrency();
    test_workspace();
    test_peak();
    test_blocks();
    test_forks();
    return 0;
}
