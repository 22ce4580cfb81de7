// The products of one layer in training: fprop, dgrad and wgrad (see dcgan.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace dcgan {

// fprop, or dgrad, which is the adjoint layer's fprop: blocks of images through prologue, product and
// epilogue.
//
// Weights are packed in the call; those of F(4×4) that would be too many are streamed (streamed.h). Sums over
// pixels are gathered by unit of work and merged in the order of the units.
class Product {
 public:
    // Of an op and product that abi.cpp has checked.
    Product(const Engine& engine, const dcgan_op& op, bool dgrad, int64_t images, int threads);

    struct Maps {
        const float* in;  // x, or dy
        const float* y;   // of a dgrad
        const float* x;   // of a dgrad
        float* out;       // y, or dx
        // fprop: mean and variance; dgrad: dcenter, dscale, dshift. Null for what is not wanted.
        float* vectors[3];
    };

    size_t bytes() const;  // of the memory that run() takes
    void run(const Maps& maps, const float* weight, const int64_t strides[4], float* memory) const;

 private:
    void run_blocks(const Maps& maps, const Source& source, const Gather* gather, const float* weight,
                    const int64_t strides[4], float* memory) const;
    void merge_statistics(const float* sums, float* mean, float* variance) const;
    void merge_adjoint(const float* sums, float* dcenter, float* dscale, float* dshift) const;

    const Engine& engine_;
    const dcgan_op& op_;
    const bool dgrad_;
    const int64_t images_;
    const int threads_;
    dcgan_layer layer_;  // as the product computes it
    Job job_;            // of a block
    bool copy_;          // whether there is a prologue
    bool streamed_, apart_ = false;
    int64_t block_ = 0, blocks_ = 0, units_ = 0;  // images of a block; blocks; units of a block
    // In floats.
    size_t sums_ = 0, vectors_ = 0, packed_ = 0, filled_ = 0, scratch_ = 0;
};

// The sources of x̂ and du. Where statistics have gradients, du's vectors are made in `vectors` (3·c_out
// floats); with null there only the prologue's kind is told.
Source source_of_x(const dcgan_op& op, const float* x);
Source source_of_du(const dcgan_op& op, int64_t images, const float* dy, const float* y, float* vectors);

// The layer whose weights' gradient is asked for.
dcgan_layer layer_of(const dcgan_op& op);

}  // namespace dcgan
