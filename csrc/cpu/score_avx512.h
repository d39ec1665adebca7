// What the kernels for AVX512-VNNI and AMX have in common.
#pragma once

#include "cpu/score_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define JZ3_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define JZ3_INLINE JZ3_AVX512 inline __attribute__((always_inline))

namespace jz3 {

// total += bytes x digits in every lane of four. As an instruction and not as an intrinsic, for which GCC copies the
// sums to and fro.
JZ3_INLINE void add_products(__m512i& total, __m512i bytes, __m512i digits) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(bytes), "v"(digits));
}

JZ3_INLINE void add_squares(__m512i& total, __m512i bytes) {
  const __m512i level = _mm512_abs_epi8(_mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
  // A level of -128 counts as 128 * 127; square_bound makes up for it.
  add_products(total, level, _mm512_min_epu8(level, _mm512_set1_epi8(127)));
}
constexpr double square_bound = 128.0 / 127.0;

// Sixteen bytes in every quarter.
JZ3_INLINE __m512i table_of(const uint8_t* bytes) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// The two codes of every byte.
struct Codes {
  __m512i low, high;
};

JZ3_INLINE Codes codes_of(__m512i bytes) {
  const __m512i mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
}

// In units of SQUARE.
JZ3_INLINE void add_code_squares(__m512i& total, const Codes& codes, __m512i squares) {
  add_products(total,
               _mm512_add_epi8(_mm512_shuffle_epi8(squares, codes.low), _mm512_shuffle_epi8(squares, codes.high)),
               _mm512_set1_epi8(1));
}

}  // namespace jz3
#endif
