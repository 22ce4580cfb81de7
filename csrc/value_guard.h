// Checks by sampling whether tensors are unchanged: this takes a few microseconds where comparing all of
// their bytes takes a millisecond.
#pragma once

#include <cstdint>

#include "dcgan.h"

namespace dcgan {

// Compares `lines` random 64-byte lines of each pair, different ones in every call, or the whole pair if it
// has no more lines than that. A change to a fraction f of a pair's lines is missed with probability
// (1 - f)^lines.
bool differ(const dcgan_pair* pairs, int count, int lines);

}  // namespace dcgan
