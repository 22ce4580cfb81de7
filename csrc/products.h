// The products of one layer in training: fprop and dgrad, and the input maps of wgrad (see dcgan.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace dcgan {

// fprop, or dgrad (the fprop of the adjoint layer): blocks of images run through prologue, product, epilogue.
//
// Weights are packed inside the call; F(4×4) weights that are too large for that are streamed (streamed.h).
// Each unit of work has its own partial sums over pixels, which are merged in the order of the units.
class Product {
 public:
    // The op must support the product; abi.cpp checks that. `prologue`: of the input map, x or du.
    Product(const Engine& engine, const dcgan_op& op, bool dgrad, Prologue prologue, int64_t images,
            int threads);

    struct Maps {
        Source in;       // x, or du
        const float* x;  // dgrad: the layer's input, if x̂ depends on it
        float* out;      // y, or dx
        // Two rows of one double per channel of `out`, or null. fprop with statistics: mean and variance;
        // dgrad with center, scale and shift: Σ g and Σ g·(x - center).
        double* sums;
    };

    size_t bytes() const;  // size of the memory that run() needs
    // `packed`: the previous use of `memory` was a run of a product that differs at most in its vectors and
    // maps, so that the packed weights are there.
    void run(const Maps& maps, const float* weight, const int64_t strides[4], float* memory,
             bool packed = false) const;

 private:
    void run_blocks(const Maps& maps, const PartialSums* partials, const float* weight,
                    const int64_t strides[4], float* memory, bool packed) const;
    void merge_statistics(const float* sums, double* merged) const;
    void merge_adjoint(const float* sums, double* merged) const;

    const Engine& engine_;
    const dcgan_op& op_;
    const bool dgrad_;
    const int64_t images_;
    const int threads_;
    dcgan_layer layer_;  // for dgrad the adjoint layer
    Job job_;            // one block
    const bool has_prologue_;
    bool streamed_;
    bool per_thread_ = false;                     // whether each thread runs its own blocks
    int64_t block_ = 0, blocks_ = 0, units_ = 0;  // images per block; blocks; units per block
    // In floats.
    size_t sums_ = 0, packed_ = 0, materialized_ = 0, scratch_ = 0;
};

// The sources of x̂ and du. If the statistics have gradients, the prologue's vectors for du are written to
// `vectors` (3·c_out floats); with null, only the kind of the prologue is valid.
Source source_of_x(const dcgan_op& op, const float* x);
Source source_of_du(const dcgan_op& op, int64_t images, const float* dy, const float* y, float* vectors);

// The op as a layer, without its prologue.
dcgan_layer layer_of(const dcgan_op& op);

}  // namespace dcgan
