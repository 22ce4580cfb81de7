// Tests of the engine through its C ABI, for every instruction set that this machine supports.
//
//     make -C csrc/tests
//
// Each group of tests prints one line; the first failure prints a message and exits with a non-zero status.
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
void test_training_concurrency();
void test_training_arguments();
void test_wgrad();
void test_wgrad_arguments();
void test_training_chain();
void test_training_chain_concurrency();
void test_training_chain_arguments();
void test_value_guard();

// Fills allocated memory with NaN, so that results computed from uninitialized scratch are detected, and
// makes an allocation of hundreds of terabytes fail as it does with malloc, instead of aborting the program.
extern "C" const char* __asan_default_options() {
    return "malloc_fill_byte=255:max_malloc_fill_size=1000000000:allocator_may_return_null=1";
}

int main(int count, char** arguments) {
    if (count == 3 && std::strcmp(arguments[1], "run-after-fork") == 0) {
        run_after_fork(arguments[2]);
        return 0;
    }
    require(dcgan_abi() == DCGAN_ABI, "dcgan_abi() returns %d, dcgan.h has %d", dcgan_abi(), DCGAN_ABI);
    for (const std::string& isa : split(dcgan_built())) {
        const bool here = std::find(isas().begin(), isas().end(), isa) != isas().end();
        report("%s: built, %ssupported by this machine", isa.c_str(), here ? "" : "not ");
    }
    test_arguments();
    test_activations();
    test_layers();
    test_training_arguments();
    test_training();
    test_statistics();
    test_training_concurrency();
    test_wgrad();
    test_wgrad_arguments();
    test_training_chain_arguments();
    test_training_chain();
    test_training_chain_concurrency();
    test_value_guard();
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
