// Products of float32 rows with a fixed matrix on AVX2, packed once in panels of 16 columns, and what becomes of projected
// gradients there.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "cpu/block_kernels.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/avx2.h"
#include "cpu/nearer.h"
#include "cpu/segments_rows.h"

namespace jz3 {
namespace {

// Rows and numbers of the inner dimension at a time: the rows stay in a second-level cache, a panel's part (12 KB) in the
// first.
constexpr int64_t BLOCK = 72, DEPTH = 192;

// The sums of one row's signed numbers: number k goes to sum k / 2 + 16 * (k % 2) of the 32.
void fold_row(const float* x, const float* signs, int64_t depth, float* y) {
  Vec sums[BUCKETS / LANES] = {zeros(), zeros(), zeros(), zeros()};
  for (int64_t k = 0; k < depth; k += BUCKETS)
    for (int64_t i = 0; i < BUCKETS / LANES; ++i) {
      const Mask seen = first_lanes(std::clamp<int64_t>(depth - k - i * LANES, 0, LANES));
      const int64_t from = k + i * LANES;
      sums[i] = sums[i] + _mm256_xor_ps(load_part(x + from, seen), load_part(signs + from, seen));
    }
  alignas(32) float in_order[BUCKETS];
  for (int64_t i = 0; i < BUCKETS / LANES; ++i) store(in_order + i * LANES, sums[i]);
  for (int64_t b = 0; b < BUCKETS; ++b) y[b / 2 + BUCKETS / 2 * (b % 2)] = in_order[b];
}

void product_rows(const ProductArguments<float, float>& a, int64_t begin, int64_t rows) {
  Buffer<float> sums(rows * PANEL);
  const float *x = a.x + begin * a.x_stride, *w = static_cast<const float*>(a.w);
  float* y = a.y + begin * a.y_stride;
  for (int64_t first = 0; first < a.columns; first += PANEL) {
    for (int64_t k = 0; k < a.depth; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, a.depth - k);
      const float* part = w + first * a.depth + k * PANEL;
      Nearer next(part + depth * PANEL, 1, 0, depth * PANEL * sizeof(float), std::max<int64_t>(rows / Avx2::rows, 1), 16);
      for (int64_t m = 0; m < rows; m += Avx2::rows) {
        next.fetch();
        multiply_packed<Avx2, true>(std::min<int64_t>(Avx2::rows, rows - m), PANEL, depth,
                                    {x + m * a.x_stride + k, a.x_stride, 1}, {part, PANEL, PANEL},
                                    sums.get() + m * PANEL, PANEL, k > 0);
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < PANEL; n += LANES) store(y + m * a.y_stride + first + n, load(sums.get() + m * PANEL + n));
  }
  if (a.signs)
    for (int64_t m = 0; m < rows; ++m) fold_row(x + m * a.x_stride, a.signs, a.depth, y + m * a.y_stride + a.first);
}

}  // namespace

void project_segment_avx2(const SegmentsArguments& a, int64_t segment) { project_segment(a, segment); }

}  // namespace jz3

#pragma GCC pop_options

namespace jz3 {

void pack_product(const float* w, float* out, int64_t depth, int64_t columns, int64_t row_stride, int64_t column_stride,
                  int threads) {
  parallel(round_up(columns, PANEL) / PANEL, depth * PANEL, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t n = 0; n < PANEL; ++n) {
          const int64_t column = panel * PANEL + n;
          out[(panel * depth + k) * PANEL + n] = column < columns ? w[k * row_stride + column * column_stride] : 0;
        }
  });
}

void product(const ProductArguments<float, float>& a, int threads) {
  share_rows(a.rows, BLOCK, threads, [&](int64_t begin, int64_t end) { product_rows(a, begin, end - begin); });
}

}  // namespace jz3

#endif
