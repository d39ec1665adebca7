// Rows of bfloat16 or float32 in AVX-512 registers; what cpu/avx2.h has by the same names, other files take from either.
// Include after the standard headers: everything below is compiled for AVX-512 with bfloat16 products and may run only
// where has_bf16() says so.
#pragma once

#include "cpu/ops.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#include <initializer_list>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace jz3 {

using bf16 = uint16_t;
using Vec = __m512;
using Mask = __mmask16;
constexpr int64_t LANES = 16;

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec all(float x) { return _mm512_set1_ps(x); }

inline __m512 load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

inline void store(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

inline Vec mul_add(Vec x, Vec y, Vec z) { return _mm512_fmadd_ps(x, y, z); }         // x y + z
inline Vec mul_subtract(Vec x, Vec y, Vec z) { return _mm512_fmsub_ps(x, y, z); }    // x y - z
inline Vec subtract_from(Vec z, Vec x, Vec y) { return _mm512_fnmadd_ps(x, y, z); }  // z - x y
inline Vec larger(Vec x, Vec y) { return _mm512_max_ps(x, y); }                      // y if either is NaN
inline Vec smaller(Vec x, Vec y) { return _mm512_min_ps(x, y); }
inline float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Vec x) { return _mm512_reduce_max_ps(x); }
inline float first_of(Vec x) { return _mm512_cvtss_f32(x); }

inline Mask first_lanes(int64_t count) { return Mask((1u << count) - 1); }  // at most LANES
// The first `end` but the one at `own`.
inline Mask others(int64_t own, int64_t end) {
  const uint32_t inside = end < 16 ? (1u << end) - 1 : 0xffffu;
  return Mask(0 <= own && own < 16 ? inside & ~(1u << own) : inside);
}
inline Vec keep(Mask mask, Vec x) { return _mm512_maskz_mov_ps(mask, x); }
inline Vec choose(Mask mask, Vec x, Vec other) { return _mm512_mask_mov_ps(other, mask, x); }
inline Vec load_part(const bf16* p, Mask part) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p)), 16));
}
inline Vec load_part(const float* p, Mask part) { return _mm512_maskz_loadu_ps(part, p); }
inline void store_part(bf16* p, Mask part, Vec x) { _mm256_mask_storeu_epi16(p, part, (__m256i)_mm512_cvtneps_pbh(x)); }
inline void store_part(float* p, Mask part, Vec x) { _mm512_mask_storeu_ps(p, part, x); }

// Past the caches, at multiples of 32 or 64 bytes: what isn't read soon need not be read before it is written, which
// halves the traffic and the waiting. Readers on other cores need end_streams() after it.
inline void stream(float* p, __m512 x) { _mm512_stream_ps(p, x); }
inline void stream(bf16* p, __m512 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
inline void end_streams() { _mm_sfence(); }

// To the caches or past them: 16 numbers, and 32 as they are.
template <class T>
inline void put(T* p, __m512 x, bool streamed) {
  if (streamed)
    stream(p, x);
  else
    store(p, x);
}
inline void put(bf16* p, __m512i x, bool streamed) {
  if (streamed)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
  else
    _mm512_storeu_si512(p, x);
}

// Whether an output is worth it: `bytes` that the next reader finds in no near cache, in rows that may be streamed.
inline bool streams(const void* p, int64_t bytes, int64_t row_bytes) {
  constexpr int64_t near = 2 << 20;
  return tile_unit() != TileUnit::none && bytes > near && reinterpret_cast<uintptr_t>(p) % 64 == 0 && row_bytes % 64 == 0;
}

// exp to within 2 units in the last place of float32, 0 below -87 (denormal results cost a hundred times as
// much); NaN stays NaN.
inline __m512 exp_ps(__m512 x) {
  const __m512 least = _mm512_set1_ps(-87.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  // NaN in the second operand survives min and max.
  x = _mm512_max_ps(least, _mm512_min_ps(_mm512_set1_ps(89.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(normal, y, n);
}

constexpr float LOG2E = 1.44269504f;

// 2^x for x < 127, 0 below -125, to the precision that T shows: 2e-6 of bfloat16, 1e-7 of float; NaN stays NaN.
template <class T>
inline __m512 exp2_ps(__m512 x) {
  const __m512 least = _mm512_set1_ps(-125.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  x = _mm512_max_ps(least, x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  if constexpr (sizeof(T) == 2)
    y = _mm512_set1_ps(1.3333558e-3f);
  else
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3333558e-3f));
  for (const float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(normal, y, n);
}

// The transpose of 16 rows of 16 units, of which the rows from `rows` on are zero.
inline void transpose(const void* x, int64_t stride, int64_t rows, void* out, int64_t out_stride) {
  const auto* from = static_cast<const uint32_t*>(x);
  auto* to = static_cast<uint32_t*>(out);
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // The four numbers at 4 l .. 4 l + 3 of r[4 g + j] are unit 4 l + j of the rows 4 g .. 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    const __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88),
                  odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
    _mm512_storeu_si512(to + j * out_stride, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_storeu_si512(to + (4 + j) * out_stride, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_storeu_si512(to + (8 + j) * out_stride, _mm512_shuffle_i32x4(even, even2, 0xDD));
    _mm512_storeu_si512(to + (12 + j) * out_stride, _mm512_shuffle_i32x4(odd, odd2, 0xDD));
  }
}

}  // namespace jz3

#pragma GCC pop_options
#endif
