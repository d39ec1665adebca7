// The vector units of AVX-512 for cpu/multiply.h. Include inside a region compiled for them; with JZ3_BF16_PRODUCTS
// defined where the region has avx512bf16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace jz3 {
namespace {

struct Avx512 {
  using Unit = float;
  using Sums = __m512;
  using Column = __m512;
  static constexpr int64_t count = 1, lanes = 16;
  static constexpr int rows = 6, columns = 4;
  static Sums zero() { return _mm512_setzero_ps(); }
  static Sums add(Sums x, Sums y) { return _mm512_add_ps(x, y); }
  static Sums load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Sums x) { _mm512_storeu_ps(p, x); }
  static Column column(const float* p) { return _mm512_loadu_ps(p); }
  static Sums multiply_add(Sums total, float a, Column b) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, total); }
};

#ifdef JZ3_BF16_PRODUCTS
typedef uint32_t __attribute__((may_alias)) Pair;  // of bfloat16 numbers, which vdpbf16ps multiplies

struct Avx512Bf16 {
  using Unit = Pair;
  using Sums = __m512;
  using Column = __m512i;
  static constexpr int64_t count = 2, lanes = 16;
  static constexpr int rows = 6, columns = 4;
  static Sums zero() { return _mm512_setzero_ps(); }
  static Sums add(Sums x, Sums y) { return _mm512_add_ps(x, y); }
  static Sums load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Sums x) { _mm512_storeu_ps(p, x); }
  static void store(uint16_t* p, Sums x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static Column column(const Pair* p) { return _mm512_loadu_si512(p); }
  static Sums multiply_add(Sums total, Pair a, Column b) {
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};

inline __m512i pairs(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}
#endif

}  // namespace
}  // namespace jz3
