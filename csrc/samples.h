// Whether tensors still hold the bytes they held before, by samples: a few microseconds where to compare all
// of them takes a millisecond.
#pragma once

#include <cstdint>

#include "dcgan.h"

namespace dcgan {

// Compares `lines` lines of 64 bytes of each pair, at random places that are others at every call, or all of
// a pair that is no larger than that. Changes to a share f of a pair's lines are missed with probability (1 -
// f)^lines.
bool differ(const dcgan_pair* pairs, int count, int lines);

}  // namespace dcgan
