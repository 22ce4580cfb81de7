// A network in training: the forward and the backward pass of a chain of layers (see dcgan.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace dcgan {

class Training {
 public:
    // The layers must be compatible; abi.cpp checks that.
    Training(const Engine& engine, const dcgan_train_layer* layers, int count, int64_t images, int groups,
             float slope, int threads)
        : engine_(engine),
          layers_(layers),
          count_(count),
          images_(images / groups),
          groups_(groups),
          slope_(slope),
          threads_(threads) {}

    // A product of layer i as an op. A prologue has the statistics of this group of images.
    dcgan_op op(int i, int algorithm, int group = 0) const;

    // Whether a backward pass contains this product of layer i.
    bool has_dgrad(int i, bool needs_dx) const { return needs_dx || i > lowest(); }
    bool has_wgrad(int i) const { return layers_[i].dweight != nullptr; }

    // Sizes of the memory that the passes need.
    size_t forward_bytes() const;
    size_t backward_bytes(bool needs_dx) const;
    void forward(const float* x, float* memory) const;
    void backward(const float* x, const float* dy, float* dx, float* memory) const;

 private:
    // The parts of a backward pass's memory that precede that of its products, in floats.
    struct Parts {
        size_t sums, vectors, maps[2];
        size_t total() const { return sums + vectors + maps[0] + maps[1]; }
    };

    int lowest() const;               // layer with a gradient; count_ if there is none
    size_t channels() const;          // of the widest output, in whole cache lines
    int64_t map_floats(int i) const;  // of one image: the input of layer i, or the output of the last layer
    long pixels(int i) const;         // of the output of layer i, in a group
    float* stats(int i, int row, int group) const;
    void store_statistics(int i, int group, const double* moments) const;
    Parts parts(bool needs_dx) const;
    Prologue prologue_of_du(int i) const;
    Source source_of_du(int i, int group, const float* dy, const float* vectors) const;
    bool has_bias_gradient(int i) const { return !layers_[i].normalized && layers_[i].dbeta != nullptr; }
    void bias_gradient(int i, const float* dy, float* of_group, float* memory) const;
    void reduce_gradients(int i, const double* sums, float* vectors) const;

    const Engine& engine_;
    const dcgan_train_layer* const layers_;
    const int count_;
    const int64_t images_;  // of a group
    const int groups_;
    const float slope_;
    const int threads_;
};

// Updates the running statistics of one BatchNorm.
void track(const dcgan_running& norm, int groups);

}  // namespace dcgan
