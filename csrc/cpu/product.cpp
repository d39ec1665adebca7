// Products with a fixed matrix of bfloat16, packed once into the pairs that vdpbf16ps multiplies: y = x W with sums in
// float32, rounded once. A block of rows stays in a core's second-level cache while W comes by in panels of 64 columns.
#include <algorithm>

#include "cpu/block_kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/product_blocks.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16

namespace jz3 {

void pack_product(const bf16* w, uint32_t* out, int64_t depth, int64_t columns, int64_t row_stride,
                  int64_t column_stride, int threads) {
  const int64_t pairs = (depth + 1) / 2, panel = PackedMatrix::panel_for(pairs);
  parallel(round_up(columns, PANEL) / panel, depth * panel, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (int64_t k = 0; k < pairs; ++k)
        for (int64_t n = 0; n < panel; ++n) {
          const int64_t column = own * panel + n;
          const bf16* entry = w + 2 * k * row_stride + column * column_stride;
          const bool inside = column < columns;
          const uint32_t low = inside ? entry[0] : 0, high = inside && 2 * k + 1 < depth ? entry[row_stride] : 0;
          out[(own * pairs + k) * panel + n] = low | high << 16;
        }
  });
}

}  // namespace jz3

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "cpu/segments_rows.h"

namespace jz3 {
namespace {

// The sums of one row's signed numbers, two neighbours' in the same lane of two vectors.
template <class Out>
void fold_row(const bf16* x, const bf16* signs, int64_t depth, Out* y) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  __m512 even = _mm512_setzero_ps(), odd = even;
  const auto add = [&](__m512i numbers, __m512i sign) {
    const __m512i both = _mm512_xor_si512(numbers, sign);
    even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
    odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(both, upper)));
  };
  int64_t k = 0;
  for (; k + BUCKETS <= depth; k += BUCKETS) add(_mm512_loadu_si512(x + k), _mm512_loadu_si512(signs + k));
  if (k < depth) {
    const auto rest = __mmask32((1u << (depth - k)) - 1);
    add(_mm512_maskz_loadu_epi16(rest, x + k), _mm512_maskz_loadu_epi16(rest, signs + k));
  }
  store(y, even);
  store(y + BUCKETS / 2, odd);
}

// Rows begin .. end of columns first .. last.
template <class Out>
void product_block(const ProductArguments<bf16, Out>& a, int64_t begin, int64_t end, int64_t first, int64_t last, bool streamed,
                   Nearer also) {
  const auto* x = reinterpret_cast<const Pair*>(a.x + begin * a.x_stride);
  PackedMatrix(a.w, a.depth)
      .multiply(end - begin, last - first, a.depth / 2, {x, a.x_stride / 2, 1}, 0, first,
                a.y + begin * a.y_stride + first, a.y_stride, false, a.rows - end, streamed, also);
  end_streams();
  if (a.signs && last == a.columns)
    for (int64_t m = begin; m < end; ++m)
      fold_row(a.x + m * a.x_stride, a.signs, a.depth, a.y + m * a.y_stride + a.first);
}

}  // namespace

}  // namespace jz3

#pragma GCC pop_options

namespace jz3 {

template <class Out>
void product(const ProductArguments<bf16, Out>& a, int threads) {
  const bool streamed = streams(a.y, a.rows * a.y_stride * int64_t(sizeof(Out)), a.y_stride * int64_t(sizeof(Out)));
  const auto block = [&](int64_t begin, int64_t end, int64_t first, int64_t last, Nearer also) {
    product_block(a, begin, end, first, last, streamed, also);
  };
  each_block(a.w, a.rows, a.depth, a.columns, threads, block);
}

void project_segments(const SegmentsArguments& a, int threads) {
  const bool wide = vector_unit() == VectorUnit::avx512;
  share(a.segments, threads, [&](int64_t i) { wide ? project_segment(a, i) : project_segment_avx2(a, i); });
}

template void product(const ProductArguments<bf16, float>&, int);
template void product(const ProductArguments<bf16, bf16>&, int);

}  // namespace jz3

#endif
