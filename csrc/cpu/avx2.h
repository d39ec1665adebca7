// Rows of float32 in AVX2 registers, by the names that cpu/bf16.h has for AVX-512, and their products (cpu/multiply.h).
// Include after the standard headers inside a region compiled for AVX2 and FMA: names are local to every file, so that no
// other file's code is run in their place.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/multiply.h"

namespace jz3 {
namespace {

struct Avx2 {
  using Unit = float;
  using Plain = float;
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

template <class T>
using Of = Avx2;
template <class T>
constexpr int64_t units(int64_t numbers) {
  return numbers;
}
constexpr int64_t PANEL = panel_of<Avx2>;

// C (+)= A B for panels of 16 columns; columns is rounded up to 8.
template <class T, bool Ahead, class Out>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<Avx2>& left, const Right<Avx2>& right, Out* c,
              int64_t stride, bool add) {
  multiply_packed<Avx2, Ahead>(rows, columns, depth, left, right, c, stride, add);
}

using Vec = __m256;
using Mask = __m256i;  // all bits of a lane or none
constexpr int64_t LANES = 8;

inline Vec zeros() { return _mm256_setzero_ps(); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }

// Past the caches is for tiles, whose products wait for memory.
inline void put(float* p, Vec x, bool) { store(p, x); }
inline void end_streams() {}
inline bool streams(const void*, int64_t, int64_t) { return false; }

inline Vec mul_add(Vec x, Vec y, Vec z) { return _mm256_fmadd_ps(x, y, z); }           // x y + z
inline Vec mul_subtract(Vec x, Vec y, Vec z) { return _mm256_fmsub_ps(x, y, z); }      // x y - z
inline Vec subtract_from(Vec z, Vec x, Vec y) { return _mm256_fnmadd_ps(x, y, z); }    // z - x y
inline Vec larger(Vec x, Vec y) { return _mm256_max_ps(x, y); }  // y if either is NaN
inline Vec smaller(Vec x, Vec y) { return _mm256_min_ps(x, y); }

inline float sum_of(Vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float first_of(Vec x) { return _mm256_cvtss_f32(x); }
inline float largest_of(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Mask first_lanes(int64_t count) {  // at most LANES
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane_numbers());
}
// The first `end` but the one at `own`.
inline Mask others(int64_t own, int64_t end) {
  const int lane = 0 <= own && own < LANES ? int(own) : -1;
  return _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_set1_epi32(lane), lane_numbers()), first_lanes(end < LANES ? end : LANES));
}
inline Vec keep(Mask mask, Vec x) { return _mm256_and_ps(_mm256_castsi256_ps(mask), x); }
inline Vec choose(Mask mask, Vec x, Vec other) { return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(mask)); }
inline Vec load_part(const float* p, Mask part) { return _mm256_maskload_ps(p, part); }
inline void store_part(float* p, Mask part, Vec x) { _mm256_maskstore_ps(p, part, x); }

// 2^n of a whole n in [-126, 127], infinity of 128.
inline Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

// As in cpu/bf16.h, but for infinity from 88.4 on.
inline Vec exp_ps(Vec x) {
  const Vec least = all(-87.0f);
  const Vec normal = _mm256_cmp_ps(x, least, _CMP_NLT_UQ);
  x = larger(least, smaller(all(89.0f), x));
  const Vec n = _mm256_round_ps(x * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec r = subtract_from(x, n, all(0.693145752f));
  r = subtract_from(r, n, all(1.42860677e-6f));
  Vec y = all(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = mul_add(y, r, all(c));
  return _mm256_and_ps(normal, y * power_of_two(n));
}

template <class T>
inline Vec exp2_ps(Vec x) {
  const Vec least = all(-125.0f);
  const Vec normal = _mm256_cmp_ps(x, least, _CMP_NLT_UQ);
  x = larger(least, x);
  const Vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = x - n;
  Vec y = all(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    y = mul_add(y, r, all(c));
  return _mm256_and_ps(normal, y * power_of_two(n));
}

constexpr float LOG2E = 1.44269504f;

// The transpose of 8 rows of 8 numbers, of which the rows from `rows` on are zero.
inline void transpose(const void* x, int64_t stride, int64_t rows, void* out, int64_t out_stride) {
  const auto* from = static_cast<const float*>(x);
  auto* to = static_cast<float*>(out);
  Vec r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = i < rows ? load(from + i * stride) : zeros();
  for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
  // The four numbers at 4 l .. 4 l + 3 of r[4 g + j] are column 4 l + j of the rows 4 g .. 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    store(to + j * out_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    store(to + (4 + j) * out_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}

}  // namespace
}  // namespace jz3
