// The workspace of a thread, kept between calls, and sizes of its parts.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace dcgan {

constexpr size_t HUGE_PAGE = size_t{2} << 20;

constexpr int64_t DOUBLE = sizeof(double) / sizeof(float);  // floats of a double

// A number of floats, rounded up to whole cache lines.
inline size_t whole_lines(int64_t floats) {
    return static_cast<size_t>((floats + 15) / 16 * 16);
}

// Requests huge pages where whole ones fit into [data, data + bytes): with 4 KB pages, sequential reads of
// megabytes would miss the TLB on every page.
inline void huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    static_cast<void>(data), static_cast<void>(bytes);
#endif
}

// Memory kept between calls: page faults on fresh memory cost more than the arithmetic of a small layer.
class Workspace {
 public:
    ~Workspace() { release(); }

    float* get(size_t bytes) {
        if (bytes <= size_) return data_;
        release();
        const size_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        void* const p = std::aligned_alloc(HUGE_PAGE, rounded);
        if (p == nullptr) return nullptr;
        huge_pages(p, rounded);
        data_ = static_cast<float*>(p);
        size_ = rounded;
        return data_;
    }

    void release() {
        std::free(data_);
        data_ = nullptr;
        size_ = 0;
    }

 private:
    float* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace dcgan
