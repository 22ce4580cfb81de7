#include "value_guard.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace dcgan {
namespace {

constexpr int64_t LINE = 64;
// Lines prefetched together before they are compared, so that their cache misses overlap.
constexpr int PREFETCHED = 32;

// Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014.
uint64_t splitmix(uint64_t& state) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

bool line_differs(const dcgan_pair& pair, int64_t offset) {
    const auto* const now = static_cast<const char*>(pair.now) + offset;
    const auto* const before = static_cast<const char*>(pair.before) + offset;
    return std::memcmp(now, before, static_cast<size_t>(std::min(LINE, pair.bytes - offset))) != 0;
}

}  // namespace

bool differ(const dcgan_pair* pairs, int count, int lines) {
    static std::atomic<uint64_t> calls{0};
    uint64_t state = calls.fetch_add(1, std::memory_order_relaxed) << 32;
    for (int i = 0; i < count; ++i) {
        const dcgan_pair& pair = pairs[i];
        const int64_t pair_lines = (pair.bytes + LINE - 1) / LINE;
        if (pair_lines <= lines) {
            if (std::memcmp(pair.now, pair.before, static_cast<size_t>(pair.bytes)) != 0) return true;
            continue;
        }
        for (int begin = 0; begin < lines; begin += PREFETCHED) {
            int64_t offsets[PREFETCHED];
            const int lines_here = std::min(PREFETCHED, lines - begin);
            for (int k = 0; k < lines_here; ++k) {
                // The high half of a 64-bit product is a random line number, without a division.
                const uint64_t line = ((splitmix(state) >> 32) * static_cast<uint64_t>(pair_lines)) >> 32;
                offsets[k] = static_cast<int64_t>(line) * LINE;
                __builtin_prefetch(static_cast<const char*>(pair.now) + offsets[k]);
                __builtin_prefetch(static_cast<const char*>(pair.before) + offsets[k]);
            }
            for (int k = 0; k < lines_here; ++k)
                if (line_differs(pair, offsets[k])) return true;
        }
    }
    return false;
}

}  // namespace dcgan
