// dcgan_differ: changes are detected, equal memory is not reported, and nothing is read out of bounds.
#include <cstring>
#include <vector>

#include "support.h"

namespace {

// Heap blocks of exactly `bytes`, so that a sanitizer detects out-of-bounds reads.
struct Pair {
    std::vector<unsigned char> now, before;
    explicit Pair(size_t bytes) : now(bytes, 7), before(bytes, 7) {}
    dcgan_pair view() const { return {now.data(), before.data(), static_cast<int64_t>(now.size())}; }
};

bool differs(const std::vector<Pair>& pairs, int lines) {
    std::vector<dcgan_pair> views;
    for (const Pair& pair : pairs) views.push_back(pair.view());
    const int code = dcgan_differ(views.data(), static_cast<int>(views.size()), lines);
    require(code == 0 || code == 1, "dcgan_differ returns %d: %s", code, dcgan_error());
    return code == 1;
}

}  // namespace

void test_value_guard() {
    long compared = 0;
    for (const size_t bytes : {1, 4, 63, 64, 65, 127, 128, 2047, 2048})  // compared completely
        for (size_t at = 0; at < bytes; at += at < 130 ? 1 : 61) {
            Pair pair(bytes);
            require(!differs({pair}, 32), "%zu equal bytes are reported as different", bytes);
            pair.now[at] ^= 1;
            require(differs({pair}, 32), "a change of byte %zu of %zu is not detected", at, bytes);
            require(differs({Pair(100), pair}, 32),
                    "a change of byte %zu of %zu of a second pair is not detected", at, bytes);
            compared += 3;
        }
    for (const size_t bytes : {2049, 2113, 100003, 1 << 20}) {
        Pair pair(bytes);
        for (int i = 0; i < 100; ++i)
            require(!differs({pair}, 32), "%zu equal bytes are reported as different", bytes);
        for (size_t line = 0; line < bytes; line += 64) pair.now[line] ^= 1;
        require(differs({pair}, 1), "a change of every line of %zu bytes is not detected", bytes);
        // A change of half of the lines is missed by 40 lines once in 10¹² calls.
        Pair half(bytes);
        std::memset(half.now.data() + bytes / 2, 1, bytes - bytes / 2);
        for (int i = 0; i < 100; ++i)
            require(differs({half}, 40), "a change of half of %zu bytes is not detected", bytes);
        // A change of a single line is detected eventually, since every call samples different lines.
        Pair one(bytes);
        one.now[bytes - 1] ^= 1;
        long calls = 1;
        while (!differs({one}, 32))
            require(++calls < 1000000, "a change of the last of %zu bytes is never detected", bytes);
        compared += 202 + calls;
    }
    const Pair pair(8);
    const dcgan_pair good = pair.view();
    require(dcgan_differ(nullptr, 0, 1) == 0, "zero pairs are reported as different: %s", dcgan_error());
    expect_rejected("dcgan_differ", dcgan_differ(&good, -1, 1), "count");
    expect_rejected("dcgan_differ", dcgan_differ(&good, 1, 0), "lines");
    expect_rejected("dcgan_differ", dcgan_differ(nullptr, 1, 1), "pairs");
    dcgan_pair bad = good;
    bad.now = nullptr;
    expect_rejected("dcgan_differ", dcgan_differ(&bad, 1, 1), "now");
    bad = good;
    bad.before = nullptr;
    expect_rejected("dcgan_differ", dcgan_differ(&bad, 1, 1), "before");
    bad = good;
    bad.bytes = -1;
    expect_rejected("dcgan_differ", dcgan_differ(&bad, 1, 1), "bytes");
    report("value guard: %ld comparisons, 6 invalid arguments rejected", compared);
}
