// The kernels for AVX2: a row x 1, 2, 4 or 8 queries whose planes are one number of 16 bits. vpmaddwd multiplies as
// many pairs a cycle as vpmaddubsw with what it takes to add up in 32 bits, neither has room for levels of 8 bits with
// a sign and digits of 7, and with both planes at once nothing is left to bound or to multiply later. In 32 columns
// the queries' even ones come first, so that bytes become words by a mask and a shift.
#include "cpu/score_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#define JZ3_AVX2 __attribute__((target("avx2,fma")))
#define JZ3_INLINE JZ3_AVX2 inline __attribute__((always_inline))

namespace jz3 {
namespace {

// Of N queries; a chain of structures, because GCC keeps arrays in memory.
template <int N>
struct Sums {
  __m256i lanes;
  Sums<N - 1> rest;
};
template <>
struct Sums<0> {};

template <int N>
JZ3_INLINE void clear(Sums<N>& sums) {
  sums.lanes = _mm256_setzero_si256();
  if constexpr (N > 1) clear(sums.rest);
}

JZ3_INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// As instructions and not as intrinsics, whose sums GCC orders anew until they need more registers than there are.
JZ3_INLINE void add_products(__m256i& total, __m256i words, const int16_t* digits) {
  __m256i products;
  __asm__("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(words), "m"(*reinterpret_cast<const int16_t(*)[16]>(digits)));
  __asm__("vpaddd %1, %0, %0" : "+x"(total) : "x"(products));
}

template <int N>
JZ3_INLINE void multiply(Sums<N>& sums, __m256i even, __m256i odd, const int16_t* query) {
  add_products(sums.lanes, even, query);
  add_products(sums.lanes, odd, query + 16);
  if constexpr (N > 1) multiply(sums.rest, even, odd, query + STEP);
}

// 32 columns of level + 128
template <int N>
JZ3_INLINE void multiply(Sums<N>& sums, __m256i bytes, const int16_t* query) {
  multiply(sums, _mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8), query);
}

// A step of a row: 64 bytes of levels, or of 4-bit codes.
template <int BITS, int N>
JZ3_INLINE void step(Sums<N>& sums, const uint8_t* bytes, const int16_t* query, __m256i table) {
  for (int half = 0; half < 64; half += 32) {
    const __m256i x = load(bytes + half);
    if constexpr (BITS == 4) {
      const __m256i mask = _mm256_set1_epi8(15);
      multiply(sums, _mm256_shuffle_epi8(table, _mm256_and_si256(x, mask)), query + half);
      multiply(sums, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), mask)),
               query + N * STEP + half);
    } else {
      multiply(sums, x, query + half);
    }
  }
}

// The lanes as doubles, two and two: their sum may need more than 32 bits.
JZ3_INLINE __m256d halves(__m256i lanes) {
  return _mm256_add_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(lanes)),
                       _mm256_cvtepi32_pd(_mm256_extracti128_si256(lanes, 1)));
}

JZ3_INLINE double total(__m256i lanes) {
  const __m256d four = halves(lanes);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_hadd_pd(two, two));
}

template <int N>
JZ3_INLINE void add_sums(const Sums<N>& sums, double* to) {
  if constexpr (N >= 4) {
    const auto &second = sums.rest, &third = second.rest, &fourth = third.rest;
    const __m256d x = _mm256_hadd_pd(halves(sums.lanes), halves(second.lanes));
    const __m256d y = _mm256_hadd_pd(halves(third.lanes), halves(fourth.lanes));
    const __m256d each = _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), each));
    if constexpr (N > 4) add_sums(fourth.rest, to + 4);
  } else {
    *to += total(sums.lanes);
    if constexpr (N > 1) add_sums(sums.rest, to + 1);
  }
}

template <int BITS, int N>
JZ3_AVX2 void multiply_row(const uint8_t* bytes, int64_t width, const int16_t* query, const Levels& levels,
                           const uint8_t* ahead, int64_t ahead_step, double* to) {
  constexpr int64_t digits = 8 / BITS * N;  // per byte of a row
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels.byte)));
  Sums<N> sums;
  clear(sums);
  int64_t b = 0;
  for (; b + STEP <= width; b += STEP, ahead += ahead_step) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    step<BITS, N>(sums, bytes + b, query + b * digits, table);
  }
  if (b < width) {
    uint8_t last[STEP] = {};  // digits are 0 there
    std::memcpy(last, bytes + b, size_t(width - b));
    step<BITS, N>(sums, last, query + b * digits, table);
  }
  add_sums(sums, to);
}

template <int BITS, int N>
void pair(const RowPair& rows, const int8_t* queries, const Levels& levels, double* const sums[2], double* norms[2]) {
  const auto* const digits = reinterpret_cast<const int16_t*>(queries);
  const int64_t step = rows.ahead_step / 2, steps = (rows.width + STEP - 1) / STEP;
  multiply_row<BITS, N>(rows.first, rows.width, digits, levels, rows.ahead, step, sums[0]);
  if (rows.second == rows.first)
    for (int q = 0; q < N; ++q) sums[1][q] = sums[0][q];
  else
    multiply_row<BITS, N>(rows.second, rows.width, digits, levels, rows.ahead + steps * step, step, sums[1]);
  for (int r = 0; norms && r < 2; ++r) *norms[r] += 128.0 * 128.0 * 8 / BITS * double(rows.width);
}

JZ3_AVX2 int64_t choose_avx2(const Products& products, const Bounds& bounds, const double* limit, Open* open) {
  const int64_t fours = products.queries / 4 * 4;
  int64_t count = 0;
  for (int64_t r = 0; r < products.rows; ++r) {
    const double* const sums = products.sums + r * products.width;
    const double row_scale = products.row_scale[r], row_norm = std::sqrt(products.norms[r] * (1 + ROUNDING));
    const __m256d scale = _mm256_set1_pd(row_scale), norm = _mm256_set1_pd(row_norm);
    const __m256d size = _mm256_set1_pd(std::fabs(row_scale));
    for (int64_t q = 0; q < fours; q += 4) {
      const __m256d score = _mm256_fmadd_pd(_mm256_loadu_pd(sums + q), _mm256_loadu_pd(bounds.step + q),
                                            _mm256_loadu_pd(bounds.offset + q));
      const __m256d reach = _mm256_fmadd_pd(norm, _mm256_loadu_pd(bounds.rest + q), _mm256_loadu_pd(bounds.slack + q));
      const __m256d most = _mm256_fmadd_pd(scale, score, _mm256_mul_pd(size, reach));
      unsigned left = unsigned(_mm256_movemask_pd(_mm256_cmp_pd(most, _mm256_loadu_pd(limit + q), _CMP_NLT_UQ)));
      if (!left) continue;
      double each[4];
      _mm256_storeu_pd(each, most);
      for (; left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        open[count++] = {int32_t(r), int32_t(q) + i, each[i]};
      }
    }
    for (int64_t q = fours; q < products.queries; ++q) {
      const double most = row_scale * (sums[q] * bounds.step[q] + bounds.offset[q]) +
                          std::fabs(row_scale) * (row_norm * bounds.rest[q] + bounds.slack[q]);
      open[count] = {int32_t(r), int32_t(q), most};
      count += most < limit[q] ? 0 : 1;
    }
  }
  return count;
}

template <int N>
void choose_pair(Kernels& k, int bits) {
  k.block = N;
  k.bytes = pair<8, N>;
  k.codes = bits == 4 ? pair<4, N> : nullptr;
}

}  // namespace

Kernels avx2_kernels(int bits, int64_t queries) {
  Kernels k = choose_kernels(Isa::scalar, bits, queries);
  (queries <= 1 ? choose_pair<1> : queries <= 2 ? choose_pair<2> : queries <= 4 ? choose_pair<4> : choose_pair<8>)(k, bits);
  k.any_width = k.biased = k.wide = true;
  k.choose = choose_avx2;
  return k;
}

}  // namespace jz3
#endif
