// Binary cross-entropy on logits with the Sigmoid folded in (dcgan.h has the formulas). A batch of logits is
// too small for anything but a plain loop, but from Python the loss would be a dozen calls.
#pragma once

#include <cstdint>

namespace dcgan {

void bce(const float* logits, int64_t stride, int64_t size, int groups, const double* targets, float* loss,
         float* probability);
void bce_backward(const float* logits, int64_t stride, int64_t size, int groups, const double* targets,
                  const float* dloss, const float* dprobability, float* dlogits);

}  // namespace dcgan
