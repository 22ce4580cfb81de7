// A chain of layers over blocks of images.
//
// Two sizes of block. The outer one is as large as it takes for weights that do not fit L3 (an F(4×4) layer
// of 512 channels has 52 MB of them) to be read once for many images. Runs of lighter layers go over the
// outer block in smaller inner blocks, whose activations stay in L3 from layer to layer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace dcgan {

constexpr int MAX_LAYERS = 64;

// Height (or width) of a layer's output.
int64_t out_side(const dcgan_layer& layer, int64_t in);

class Chain {
 public:
    // Of layers that fit each other, as abi.cpp checks.
    Chain(const Engine& engine, const dcgan_layer* layers, int count, int64_t images, int threads);

    size_t bytes() const;  // of the memory that run() takes
    void run(const dcgan_tensor& x, const dcgan_tensor& y, float* memory) const;

 private:
    struct Group {
        int begin, end;   // layers
        int64_t block;    // images
        bool apart;       // each thread takes blocks of its own
        size_t inner[2];  // floats of the two buffers between a block's layers
    };

    void run(const Group& group, const View& x, const View& y, int64_t images, float* inner, float* scratch,
             const dcgan_layer* folded) const;
    void run_block(const Group& group, View x, View y, int64_t images, int threads, float* inner,
                   float* scratch, const dcgan_layer* folded) const;

    const Engine& engine_;
    const dcgan_layer* const layers_;
    const int count_, threads_;
    const int64_t images_;
    int64_t block_;  // images of the outer block
    Group groups_[MAX_LAYERS];
    int group_count_ = 0;
    // In floats: scratch of a thread, buffers between groups, those within one, a layer's scale.
    size_t scratch_ = 0, outer_[2] = {0, 0}, inner_ = 0, affine_ = 0;
};

}  // namespace dcgan
