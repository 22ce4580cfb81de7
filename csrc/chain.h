// A chain of layers, run over blocks of images.
//
// There are two block sizes. The outer block is large, so that weights that exceed L3 (52 MB for an F(4×4)
// layer of 512 channels) are read once for many images. Groups of layers with smaller weights process it in
// inner blocks, whose activations stay in L3 from layer to layer.
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
    // The layers must be compatible; abi.cpp checks that.
    Chain(const Engine& engine, const dcgan_layer* layers, int count, int64_t images, int threads);

    size_t bytes() const;  // size of the memory that run() needs
    void run(const dcgan_tensor& x, const dcgan_tensor& y, float* memory) const;

 private:
    struct Group {
        int begin, end;   // layers
        int64_t block;    // images per inner block
        bool per_thread;  // whether each thread runs its own blocks
        size_t inner[2];  // floats of the two buffers between the layers of a block
    };

    void run(const Group& group, const View& x, const View& y, int64_t images, float* inner, float* scratch,
             const dcgan_layer* folded) const;
    void run_block(const Group& group, View x, View y, int64_t images, int threads, float* inner,
                   float* scratch, const dcgan_layer* folded) const;

    const Engine& engine_;
    const dcgan_layer* const layers_;
    const int count_, threads_;
    const int64_t images_;
    int64_t block_;  // images per outer block
    Group groups_[MAX_LAYERS];
    int group_count_ = 0;
    // In floats: scratch per thread, buffers between groups, buffers within a group, one layer's scale.
    size_t scratch_ = 0, outer_[2] = {0, 0}, inner_ = 0, affine_ = 0;
};

}  // namespace dcgan
