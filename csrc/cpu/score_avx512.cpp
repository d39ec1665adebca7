// The kernels for AVX512-VNNI: two rows x eight queries in sixteen registers, 64 columns at a time; 4-bit codes
// become bytes by vpshufb on the way. 16 vpdpbusd for 10 loads a step.
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
namespace {

// Of the two rows with each of the eight queries; single names, because GCC keeps arrays in memory.
struct Sums {
  __m512i a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7, square_a, square_b;
};

// total += bytes x digits in every lane of four. As an instruction and not as an intrinsic, for which GCC copies the
// sums to and fro.
JZ3_INLINE void add_products(__m512i& total, __m512i bytes, __m512i digits) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(bytes), "v"(digits));
}

// With the sum of the digits still missing: vpdpbusd takes level + 128.
JZ3_INLINE void multiply_query(__m512i& a, __m512i& b, __m512i first, __m512i second, const int8_t* query) {
  const __m512i digits = _mm512_loadu_si512(query);
  add_products(a, first, digits);
  add_products(b, second, digits);
}

JZ3_INLINE void add_squares(__m512i& total, __m512i bytes) {
  const __m512i level = _mm512_abs_epi8(_mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
  // A level of -128 counts as 128 * 127; square_bound makes up for it.
  add_products(total, level, _mm512_min_epu8(level, _mm512_set1_epi8(127)));
}
constexpr double square_bound = 128.0 / 127.0;

template <bool NORMS>
JZ3_INLINE void multiply(Sums& sums, __m512i first, __m512i second, const int8_t* query) {
  multiply_query(sums.a0, sums.b0, first, second, query);
  multiply_query(sums.a1, sums.b1, first, second, query + 1 * STEP);
  multiply_query(sums.a2, sums.b2, first, second, query + 2 * STEP);
  multiply_query(sums.a3, sums.b3, first, second, query + 3 * STEP);
  multiply_query(sums.a4, sums.b4, first, second, query + 4 * STEP);
  multiply_query(sums.a5, sums.b5, first, second, query + 5 * STEP);
  multiply_query(sums.a6, sums.b6, first, second, query + 6 * STEP);
  multiply_query(sums.a7, sums.b7, first, second, query + 7 * STEP);
  if (NORMS) {
    add_squares(sums.square_a, first);
    add_squares(sums.square_b, second);
  }
}

template <bool CODES, bool NORMS>
JZ3_INLINE void step(Sums& sums, __m512i first, __m512i second, const int8_t* query, __m512i table) {
  if (!CODES) {
    multiply<NORMS>(sums, first, second, query);
    return;
  }
  const __m512i mask = _mm512_set1_epi8(15);
  multiply<NORMS>(sums, _mm512_shuffle_epi8(table, _mm512_and_si512(first, mask)),
                  _mm512_shuffle_epi8(table, _mm512_and_si512(second, mask)), query);
  multiply<NORMS>(sums, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(first, 4), mask)),
                  _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(second, 4), mask)),
                  query + QUERIES * STEP);
}

// lanes 0 .. 3 of every quarter: the sums of the quarter of x, y, z, w
JZ3_INLINE __m512i quarter_sums(__m512i x, __m512i y, __m512i z, __m512i w) {
  const __m512i xy = _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  const __m512i zw = _mm512_add_epi32(_mm512_unpacklo_epi32(z, w), _mm512_unpackhi_epi32(z, w));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(xy, zw), _mm512_unpackhi_epi64(xy, zw));
}

// The sums of all lanes of the eight numbers behind x (the first four) and y.
JZ3_INLINE __m256i lane_sums(__m512i x, __m512i y) {
  const __m512i halves = _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x44), _mm512_shuffle_i32x4(x, y, 0xEE));
  const __m512i sums = _mm512_add_epi32(_mm512_shuffle_i32x4(halves, halves, 0x08),
                                        _mm512_shuffle_i32x4(halves, halves, 0x0D));
  return _mm512_castsi512_si256(sums);
}

JZ3_INLINE void add_to(double* sums, __m256i lanes) {
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtepi32_pd(lanes)));
}

template <bool CODES, bool NORMS>
JZ3_AVX512 void pair(const RowPair& rows, const int8_t* queries, const Levels& levels, double* const sums[2],
                     double* norms[2]) {
  constexpr int64_t query_bytes = (CODES ? 2 : 1) * QUERIES;  // per byte of a row
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels.byte)));
  const __m512i zero = _mm512_setzero_si512();
  Sums total{zero, zero, zero, zero, zero, zero, zero, zero, zero,
             zero, zero, zero, zero, zero, zero, zero, zero, zero};
  const uint8_t *first = rows.first, *second = rows.second;
  const char* ahead = reinterpret_cast<const char*>(rows.ahead);
  int64_t b = 0;
  for (; b + STEP <= rows.width; b += STEP) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    if (NORMS) _mm_prefetch(ahead + rows.ahead_step / 2, _MM_HINT_T1);
    ahead += rows.ahead_step;
    step<CODES, NORMS>(total, _mm512_loadu_si512(first + b), _mm512_loadu_si512(second + b), queries + b * query_bytes,
                       table);
  }
  if (b < rows.width) {
    const __mmask64 rest = (uint64_t(1) << (rows.width - b)) - 1;
    const __m512i blank = _mm512_set1_epi8(CODES ? 0 : -128);  // bytes that stand for level 0
    step<CODES, NORMS>(total, _mm512_mask_loadu_epi8(blank, rest, first + b),
                       _mm512_mask_loadu_epi8(blank, rest, second + b), queries + b * query_bytes, table);
  }
  add_to(sums[0], lane_sums(quarter_sums(total.a0, total.a1, total.a2, total.a3),
                            quarter_sums(total.a4, total.a5, total.a6, total.a7)));
  add_to(sums[1], lane_sums(quarter_sums(total.b0, total.b1, total.b2, total.b3),
                            quarter_sums(total.b4, total.b5, total.b6, total.b7)));
  if (NORMS) {
    *norms[0] += square_bound * _mm512_reduce_add_epi32(total.square_a);
    *norms[1] += square_bound * _mm512_reduce_add_epi32(total.square_b);
  }
}

template <bool CODES>
void pair_avx512(const RowPair& rows, const int8_t* queries, const Levels& levels, double* const sums[2],
                 double* norms[2]) {
  if (norms)
    pair<CODES, true>(rows, queries, levels, sums, norms);
  else
    pair<CODES, false>(rows, queries, levels, sums, norms);
}

JZ3_INLINE __m512i multiply_step(__m512i total, const uint8_t* bytes, const int8_t* query, int64_t column) {
  return _mm512_dpbusd_epi32(total, _mm512_loadu_si512(bytes + column), _mm512_loadu_si512(query + column));
}

JZ3_AVX512 int64_t single_avx512(const uint8_t* bytes, const int8_t* query, int64_t columns) {
  int64_t sum = 0;
  for (int64_t begin = 0; begin < columns; begin += 1 << 15) {
    const int64_t end = begin + (1 << 15) < columns ? begin + (1 << 15) : columns;
    __m512i even = _mm512_setzero_si512(), odd = even, third = even, fourth = even;
    int64_t c = begin;
    for (; c + 4 * STEP <= end; c += 4 * STEP) {
      even = multiply_step(even, bytes, query, c);
      odd = multiply_step(odd, bytes, query, c + STEP);
      third = multiply_step(third, bytes, query, c + 2 * STEP);
      fourth = multiply_step(fourth, bytes, query, c + 3 * STEP);
    }
    for (; c < end; c += STEP) even = multiply_step(even, bytes, query, c);
    sum += _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(even, odd), _mm512_add_epi32(third, fourth)));
  }
  return sum;
}

JZ3_AVX512 void unpack_4bit_avx512(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels.byte)));
  const __m512i mask = _mm512_set1_epi8(15), blank = _mm512_set1_epi8(-128);
  for (int64_t b = 0; b < row_bytes; b += STEP) {
    const __mmask64 known = row_bytes - b >= STEP ? ~uint64_t(0) : (uint64_t(1) << (row_bytes - b)) - 1;
    const __m512i packed = _mm512_maskz_loadu_epi8(known, codes + b);
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, mask));
    const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
    _mm512_storeu_si512(bytes + 2 * b, _mm512_mask_blend_epi8(known, blank, low));
    _mm512_storeu_si512(bytes + 2 * b + STEP, _mm512_mask_blend_epi8(known, blank, high));
  }
}

JZ3_AVX512 void unpack_1bit_avx512(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m512i unset = _mm512_set1_epi8(char(levels.byte[0])), set = _mm512_set1_epi8(char(levels.byte[1]));
  int64_t b = 0;
  for (; b + 8 <= row_bytes; b += 8) {
    const __mmask64 bits = _load_mask64(reinterpret_cast<__mmask64*>(const_cast<uint8_t*>(codes + b)));
    _mm512_storeu_si512(bytes + 8 * b, _mm512_mask_blend_epi8(bits, unset, set));
  }
  for (; b < row_bytes; ++b)
    for (int i = 0; i < 8; ++i) bytes[8 * b + i] = levels.bytes[codes[b]][i];
}

}  // namespace

Kernels avx512_kernels(int bits) {
  Kernels k = choose_kernels(Isa::avx2, bits);
  k.bytes = pair_avx512<false>;
  k.codes = bits == 4 ? pair_avx512<true> : nullptr;
  k.any_width = k.biased = true;
  k.single = single_avx512;
  if (bits == 4) k.unpack = unpack_4bit_avx512;
  if (bits == 1) k.unpack = unpack_1bit_avx512;
  return k;
}

}  // namespace jz3
#endif
