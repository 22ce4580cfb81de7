#include "loss.h"

#include <algorithm>
#include <cmath>

namespace dcgan {

// Sums are float64, so that their order does not matter to float32. NaN propagates.
void bce(const float* logits, int64_t stride, int64_t size, int groups, const double* targets, float* loss,
         float* probability) {
    const double nan = std::nan("");
    for (int group = 0; group < groups; ++group) {
        double losses = 0, probabilities = 0;
        for (int64_t i = 0; i < size; ++i) {
            const double x = logits[(group * size + i) * stride], e = std::exp(-std::fabs(x));
            losses += (x > 0 ? (1 - targets[group]) * x : -targets[group] * x) + std::log1p(e);
            probabilities += (x < 0 ? e : 1.0) / (1 + e);
        }
        loss[group] = static_cast<float>(size > 0 ? losses / static_cast<double>(size) : nan);
        probability[group] = static_cast<float>(size > 0 ? probabilities / static_cast<double>(size) : nan);
    }
}

void bce_backward(const float* logits, int64_t stride, int64_t size, int groups, const double* targets,
                  const float* dloss, const float* dprobability, float* dlogits) {
    for (int group = 0; group < groups; ++group)
        for (int64_t i = 0; i < size; ++i) {
            const double x = logits[(group * size + i) * stride], e = std::exp(-std::fabs(x));
            const double small = e / (1 + e);  // min(p, 1 - p): p - t is computed from it, as p - 1 cancels
            const double difference = x < 0 ? small - targets[group] : (1 - targets[group]) - small;
            double dx = dloss == nullptr ? 0 : dloss[group] * difference;
            if (dprobability != nullptr) dx += dprobability[group] * small * (1 - small);
            dlogits[group * size + i] = static_cast<float>(dx / static_cast<double>(size));
        }
}

}  // namespace dcgan
