// segment_project on AVX2.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/segment_items.h"

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/multiply.h"
#include "cpu/segment_kernel.h"

namespace jz3 {
namespace {

struct Avx2 {
  using Unit = float;
  using Sums = __m256;
  using Column = __m256;
  static constexpr int64_t count = 1, lanes = 8;
  static constexpr int rows = 6, columns = 2;
  static Sums zero() { return _mm256_setzero_ps(); }
  static Sums add(Sums x, Sums y) { return _mm256_add_ps(x, y); }
  static Sums load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Sums x) { _mm256_storeu_ps(p, x); }
  static Column column(const float* p) { return _mm256_loadu_ps(p); }
  static Sums multiply_add(Sums total, float a, Column b) { return _mm256_fmadd_ps(_mm256_set1_ps(a), b, total); }
};

}  // namespace

void segment_items_avx2(const SegmentArguments& x, SegmentItems& items) {
  x.bf16 ? run_items<Avx2, uint16_t>(x, items) : run_items<Avx2, float>(x, items);
}

}  // namespace jz3

#pragma GCC pop_options
#endif
