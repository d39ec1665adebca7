// Products with a fixed matrix of bfloat16, packed once into the pairs that vdpbf16ps multiplies: y = x W with sums in
// float32, rounded once. A block of rows stays in a core's second-level cache while W comes by in panels of 64 columns.
#include <algorithm>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/tiles.h"

namespace jz3 {

#ifdef JZ3_BF16

void pack_product(const bf16* w, uint32_t* out, int64_t depth, int64_t columns, int64_t row_stride,
                  int64_t column_stride, int threads) {
  const int64_t pairs = (depth + 1) / 2;
  parallel((columns + PANEL - 1) / PANEL, depth * PANEL, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t k = 0; k < pairs; ++k)
        for (int64_t n = 0; n < PANEL; ++n) {
          const int64_t column = panel * PANEL + n;
          const bf16* entry = w + 2 * k * row_stride + column * column_stride;
          const bool inside = column < columns;
          const uint32_t low = inside ? entry[0] : 0, high = inside && 2 * k + 1 < depth ? entry[row_stride] : 0;
          out[(panel * pairs + k) * PANEL + n] = low | high << 16;
        }
  });
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace {

constexpr int64_t CACHED = 192 * 1024;  // numbers of x that a block of rows may have

template <class Out>
void product_rows(const ProductArguments<Out>& a, int64_t begin, int64_t end) {
  const int64_t pairs = a.depth / 2;
  const auto* x = reinterpret_cast<const Pair*>(a.x + begin * a.x_stride);
  multiply<bf16, true>(end - begin, a.columns, pairs, {x, a.x_stride / 2, 1}, {a.w, pairs * PANEL, PANEL},
                       a.y + begin * a.y_stride, a.y_stride, false);
}

void outer(const SegmentOuterArguments& a, int64_t segment) {
  const int64_t first = a.bounds[segment], count = a.bounds[segment + 1] - first;
  multiply<float, false>(a.rows, a.columns, count, {a.g + first * a.g_stride, 1, a.g_stride},
                         {a.a + first * a.a_stride, PANEL, a.a_stride}, a.out + segment * a.rows * a.columns,
                         a.columns, false);
}

}  // namespace

#pragma GCC pop_options

template <class Out>
void product(const ProductArguments<Out>& a, int threads) {
  const int64_t block = std::clamp<int64_t>(CACHED / a.depth / 6 * 6, 48, 192);
  share_rows(a.rows, block, threads, [&](int64_t begin, int64_t end) { product_rows(a, begin, end); });
}

void known_and_rest(const KnownRestArguments& a) {
  std::vector<float> half(a.rows * a.right), rest(a.right);
  for (int64_t segment = 0; segment < a.segments; ++segment) {
    const float *block = a.known + segment * a.known_segment, *sketch = a.sketch + segment * a.sketch_segment;
    float known = 0, left_out = 0;
    std::fill(half.begin(), half.end(), 0.0f);
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t c = 0; c < a.columns; ++c) {
        const float value = block[r * a.known_row + c];
        known += value * value;
        for (int64_t n = 0; n < a.right; ++n) half[r * a.right + n] += value * a.turn_right[c * a.right + n];
      }
    for (int64_t m = 0; m < a.left; ++m) {
      std::copy_n(sketch + m * a.sketch_row, a.right, rest.begin());
      for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t n = 0; n < a.right; ++n) rest[n] -= a.turn_left[r * a.left + m] * half[r * a.right + n];
      for (int64_t n = 0; n < a.right; ++n) left_out += rest[n] * rest[n];
    }
    a.square[segment] += known + left_out;
  }
}

void segment_outer(const SegmentOuterArguments& a, int threads) {
  share(a.segments, threads, [&](int64_t i) { outer(a, i); });
}

template void product(const ProductArguments<float>&, int);
template void product(const ProductArguments<uint16_t>&, int);

#endif

}  // namespace jz3
