// The first two steps of ladder.py: a convolution by its definition, and by im2col and GEMM.
// The following steps are those of the native engine (csrc/).
//
//     convolution              y[n][o][p][q] = Σ x[n][c][p·s - pad + i][q·s - pad + j]·w[o][c][i][j]
//     transposed convolution   its adjoint: x[n][c][r][t]·w[c][o][i][j] is added to
//                              y[n][o][r·s - pad + i][t·s - pad + j]
//
// ladder.py compiles this file for the machine it runs on, without -ffast-math, which would reorder sums.
#include <algorithm>
#include <vector>

namespace {

struct Layer {
    int transposed, images, c_in, c_out, height, width, kernel, stride, padding;

    int out(int in) const {
        return transposed ? (in - 1) * stride - 2 * padding + kernel
                          : (in + 2 * padding - kernel) / stride + 1;
    }
};

// --- The GEMM of step 2
//
// C[m][n] += A[m][k]·B[k][n], blocked as in Goto and van de Geijn (2008): KC rows of B are packed into panels
// of NR columns; a panel (KC·NR floats) stays in L1 while all rows of A are multiplied with it, MR rows at a
// time, with MR × NR sums in registers. It uses compiler vector extensions.

#ifdef __AVX512F__
constexpr int LANES = 16, MR = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, MR = 6;
#else
constexpr int LANES = 4, MR = 6;
#endif
constexpr int NR = 2 * LANES, KC = 256;

using Vector = float __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// The micro-kernel: multiplies ROWS ≤ MR rows of A with one panel of B.
template <int ROWS>
void tile(const float* a, long a_row, const float* b, int depth, float* c, long c_row) {
    Vector sums[ROWS][2] = {};
    for (int k = 0; k < depth; ++k, b += NR) {
        const Vector left = *reinterpret_cast<const Vector*>(b);
        const Vector right = *reinterpret_cast<const Vector*>(b + LANES);
        for (int m = 0; m < ROWS; ++m) {
            sums[m][0] += a[m * a_row + k] * left;
            sums[m][1] += a[m * a_row + k] * right;
        }
    }
    for (int m = 0; m < ROWS; ++m) {
        *reinterpret_cast<Vector*>(c + m * c_row) += sums[m][0];
        *reinterpret_cast<Vector*>(c + m * c_row + LANES) += sums[m][1];
    }
}

// Packs B for tile() as [k / KC][n / NR][k % KC][NR], padded with zero columns.
std::vector<float> pack(const std::vector<float>& b, int depth, int columns) {
    const int padded = (columns + NR - 1) / NR * NR;
    std::vector<float> packed(static_cast<size_t>(depth) * padded);
    float* to = packed.data();
    for (int k0 = 0; k0 < depth; k0 += KC)
        for (int n0 = 0; n0 < padded; n0 += NR)
            for (int k = k0; k < std::min(k0 + KC, depth); ++k)
                for (int n = n0; n < n0 + NR; ++n)
                    *to++ = n < columns ? b[static_cast<size_t>(k) * columns + n] : 0;
    return packed;
}

void gemm(const float* a, long rows, const std::vector<float>& packed, int depth, int padded, float* c) {
    std::fill(c, c + rows * padded, 0.0f);
    const float* b = packed.data();
    for (int k = 0; k < depth; k += KC) {
        const int count = std::min(KC, depth - k);
        for (int n = 0; n < padded; n += NR, b += count * NR) {
            long m = 0;
            for (; m + MR <= rows; m += MR)
                tile<MR>(a + m * depth + k, depth, b, count, c + m * padded + n, padded);
            for (; m < rows; ++m) tile<1>(a + m * depth + k, depth, b, count, c + m * padded + n, padded);
        }
    }
}

}  // namespace

extern "C" {

// Step 1: the definition as seven nested loops; NCHW.
void ladder_naive(const Layer* layer, const float* x, const float* w, float* y) {
    const Layer& l = *layer;
    const int k = l.kernel, rows = l.out(l.height), columns = l.out(l.width);
    const auto at = [](int a, int b, int count_b, int c, int count_c, int d, int count_d) {
        return ((long(a) * count_b + b) * count_c + c) * count_d + d;
    };
    const auto inside = [](int r, int height, int t, int width) {
        return r >= 0 && r < height && t >= 0 && t < width;
    };
    if (l.transposed) {
        std::fill_n(y, long(l.images) * l.c_out * rows * columns, 0.0f);
        for (int n = 0; n < l.images; ++n)
            for (int o = 0; o < l.c_out; ++o)
                for (int c = 0; c < l.c_in; ++c)
                    for (int r = 0; r < l.height; ++r)
                        for (int t = 0; t < l.width; ++t)
                            for (int i = 0; i < k; ++i)
                                for (int j = 0; j < k; ++j) {
                                    const int p = r * l.stride - l.padding + i;
                                    const int q = t * l.stride - l.padding + j;
                                    if (inside(p, rows, q, columns))
                                        y[at(n, o, l.c_out, p, rows, q, columns)] +=
                                            x[at(n, c, l.c_in, r, l.height, t, l.width)] *
                                            w[at(c, o, l.c_out, i, k, j, k)];
                                }
        return;
    }
    for (int n = 0; n < l.images; ++n)
        for (int o = 0; o < l.c_out; ++o)
            for (int p = 0; p < rows; ++p)
                for (int q = 0; q < columns; ++q) {
                    float sum = 0;
                    for (int c = 0; c < l.c_in; ++c)
                        for (int i = 0; i < k; ++i)
                            for (int j = 0; j < k; ++j) {
                                const int r = p * l.stride - l.padding + i;
                                const int t = q * l.stride - l.padding + j;
                                if (inside(r, l.height, t, l.width))
                                    sum += x[at(n, c, l.c_in, r, l.height, t, l.width)] *
                                           w[at(o, c, l.c_in, i, k, j, k)];
                            }
                    y[at(n, o, l.c_out, p, rows, q, columns)] = sum;
                }
}

// Step 2: im2col, which materializes every window as a row of a matrix, then one GEMM per image; NHWC. A
// transposed convolution is computed as a stride-1 convolution with the flipped kernel, after inserting
// stride - 1 zeros between the input's pixels: with stride 2, three of four products are with a zero.
void ladder_im2col(const Layer* layer, const float* x, const float* w, float* y) {
    const Layer& l = *layer;
    const int k = l.kernel, rows = l.out(l.height), columns = l.out(l.width);
    const int dilation = l.transposed ? l.stride : 1, step = l.transposed ? 1 : l.stride;
    const int border = l.transposed ? k - 1 - l.padding : l.padding;
    const int depth = k * k * l.c_in, padded = (l.c_out + NR - 1) / NR * NR;

    std::vector<float> b(static_cast<size_t>(depth) * l.c_out);
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j)
            for (int c = 0; c < l.c_in; ++c)
                for (int o = 0; o < l.c_out; ++o)
                    b[(size_t(i * k + j) * l.c_in + c) * l.c_out + o] =
                        l.transposed ? w[((long(c) * l.c_out + o) * k + k - 1 - i) * k + k - 1 - j]
                                     : w[((long(o) * l.c_in + c) * k + i) * k + j];
    const std::vector<float> packed = pack(b, depth, l.c_out);

    // The input with zeros inserted between its pixels and zero padding.
    const int inner_height = (l.height - 1) * dilation + 1, inner_width = (l.width - 1) * dilation + 1;
    const int wide = inner_width + 2 * border;
    std::vector<float> map(size_t(inner_height + 2 * border) * wide * l.c_in);
    std::vector<float> windows(size_t(rows) * columns * depth), product(size_t(rows) * columns * padded);
    for (int n = 0; n < l.images; ++n) {
        for (int r = 0; r < l.height; ++r)
            for (int t = 0; t < l.width; ++t)
                std::copy_n(
                    x + ((long(n) * l.height + r) * l.width + t) * l.c_in, l.c_in,
                    map.data() + ((border + long(r) * dilation) * wide + border + t * dilation) * l.c_in);
        float* to = windows.data();
        for (int p = 0; p < rows; ++p)
            for (int q = 0; q < columns; ++q)
                for (int i = 0; i < k; ++i, to += k * l.c_in)
                    std::copy_n(map.data() + (long(p * step + i) * wide + q * step) * l.c_in, k * l.c_in, to);
        gemm(windows.data(), long(rows) * columns, packed, depth, padded, product.data());
        for (long m = 0; m < long(rows) * columns; ++m)
            std::copy_n(product.data() + m * padded, l.c_out, y + (long(n) * rows * columns + m) * l.c_out);
    }
}

}  // extern "C"
