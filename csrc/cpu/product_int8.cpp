// Products with a fixed matrix in 8 bits: y = x W with x rounded to 255 levels per row and group of numbers, W per column
// and group. Products of numbers are whole and summed exactly by vpdpbusd; a group's sum is then multiplied by its two
// scales and added up in float32.
//
// A panel is 64 columns. A group's part of it (12 KB of 192 numbers) stays in the first-level cache while the block's rows
// come by, six at a time. Operations per row: depth * columns multiplications at 64 a cycle and core of vpdpbusd, and per
// group and 16 columns a conversion, a product and a fused multiply-add.
#include <algorithm>
#include <cmath>

#include "cpu/int8.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"

namespace jz3 {

#ifdef JZ3_BF16

bool has_int8_products() { return has_bf16() && __builtin_cpu_supports("avx512vnni"); }

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")

namespace {

constexpr int64_t BLOCK = 72;  // rows at a time

template <class T>
void pack_part(const T* w, int64_t group, int64_t depth, int64_t columns, int64_t row_stride, int64_t column_stride,
               float* turned, Part& part) {
  for (int64_t n = 0; n < PANEL; ++n) {
    for (int64_t k = 0; k < group; ++k)
      turned[k] = k < depth && n < columns ? value(w[k * row_stride + n * column_stride]) : 0;
    for (int64_t k = 0; k < group; k += TURNED) {
      const float* x = turned + k;
      Turned part{load(x), load(x + 16), load(x + 32), load(x + 48)};
      part.turn();
      part.keep(turned + k);
    }
    float largest = 0;
    for (int64_t k = 0; k < group; ++k) {
      const float x = std::fabs(turned[k]);
      if (!(x <= largest)) largest = x;
    }
    part.scale[n] = scale_of(largest) / TURNED;  // of both turns
    const __m512 inverse = _mm512_set1_ps(inverse_of(largest));
    int32_t sum = 0;
    for (int64_t k = 0; k < group; k += TURNED) {
      alignas(64) int8_t q[TURNED];
      _mm512_store_si512(q, levels(turned + k, inverse));
      for (int64_t i = 0; i < TURNED; ++i) part.number[(k + i) / 4][n][i % 4] = q[i], sum += q[i];
    }
    part.start[n] = -128 * sum;
  }
}

template <class T>
void product_rows(const Int8Arguments<T>& a, int64_t begin, int64_t rows) {
  Quantised quantised(rows, a.depth, a.group);
  Buffer<float> sums(rows * PANEL);
  const Int8Rows x = quantised.fill(a.x + begin * a.x_stride, rows, a.depth, a.x_stride);
  for (int64_t first = 0; first < a.columns; first += PANEL) {
    const int64_t count = std::min<int64_t>(PANEL, a.columns - first);
    const uint8_t* parts = a.w + first / PANEL * x.groups * (INT8_HEAD + PANEL * a.group);
    panel_int8(rows, count, a.group, x, parts, sums.get(), PANEL, false);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < count; n += LANES)
        store(a.y + (begin + m) * a.y_stride + first + n, _mm512_load_ps(sums.get() + m * PANEL + n));
  }
}

}  // namespace

#pragma GCC pop_options

template <class T>
void pack_int8(const T* w, uint8_t* out, int64_t group, int64_t depth, int64_t columns, int64_t row_stride,
               int64_t column_stride, int threads) {
  const int64_t groups = (depth + group - 1) / group;
  parallel((columns + PANEL - 1) / PANEL, depth * PANEL, threads, [&](int64_t, int64_t begin, int64_t end) {
    Buffer<float> turned(group);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t g = 0; g < groups; ++g)
        pack_part(w + g * group * row_stride + panel * PANEL * column_stride, group, std::min(group, depth - g * group),
                  columns - panel * PANEL, row_stride, column_stride, turned.get(), *part_at<Part>(out, panel * groups + g, group));
  });
}

template <class T>
void product_int8(const Int8Arguments<T>& a, int threads) {
  share_rows(a.rows, BLOCK, threads, [&](int64_t begin, int64_t end) { product_rows(a, begin, end - begin); });
}

template void pack_int8(const float*, uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int);
template void pack_int8(const uint16_t*, uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int);
template void product_int8(const Int8Arguments<float>&, int);
template void product_int8(const Int8Arguments<uint16_t>&, int);

#endif

}  // namespace jz3
