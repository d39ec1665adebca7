// The tile kernel for AVX2, and what is done with the rows that it leaves open. Four rows x 16 queries, four columns at a
// time: vpmaddubsw, vpmaddwd with ones, vpaddd. That is one multiplication in 8 bits and one in 16 for 32 products, as
// many as two of vpmaddwd alone (cpu/score_avx2.cpp) but fewer other instructions, and nothing to widen: on Zen 3 as
// fast as the same three in registers, where pairs of rows reach 0.7 of that. Digits of 16 bits don't fit, so these are
// their highest parts, two neighbours of at most NEIGHBOURS together, whose products with two bytes fit 16 bits.
#include "cpu/score_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <algorithm>
#include <cstring>

#include "cpu/score_avx2.h"

namespace jz3 {
namespace {

static_assert(255 * NEIGHBOURS <= 32767);

constexpr int ROWS = 4;
constexpr int64_t SPAN = 1 << 15;  // columns whose sums fit 32 bits

// As instructions and not as intrinsics, whose sums GCC orders anew until they need more registers than there are.
JZ3_INLINE void add_products(__m256i& total, __m256i bytes, __m256i digits, __m256i ones) {
  __m256i products;
  __asm__("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(bytes), "x"(digits));
  __asm__("vpmaddwd %1, %0, %0" : "+x"(products) : "x"(ones));
  __asm__("vpaddd %1, %0, %0" : "+x"(total) : "x"(products));
}

// Four columns of N rows.
template <bool TWO, int N>
JZ3_INLINE void multiply_quads(Sums<N>& sums, const uint8_t* four, int64_t stride, __m256i first, __m256i second,
                               __m256i ones) {
  int32_t levels;
  std::memcpy(&levels, four, 4);
  const __m256i all = _mm256_set1_epi32(levels);
  add_products(sums.a, all, first, ones);
  if (TWO) add_products(sums.b, all, second, ones);
  if constexpr (N > 1) multiply_quads<TWO>(sums.rest, four + stride, stride, first, second, ones);
}

JZ3_INLINE void add_to(double* sums, __m256i lanes) {
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtepi32_pd(_mm256_castsi256_si128(lanes))));
  _mm256_storeu_pd(sums + 4,
                   _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_cvtepi32_pd(_mm256_extracti128_si256(lanes, 1))));
}

template <bool TWO, int N>
JZ3_INLINE void add_rows(const Sums<N>& sums, double* to, int64_t width) {
  add_to(to, sums.a);
  if (TWO) add_to(to + 8, sums.b);
  if constexpr (N > 1) add_rows<TWO>(sums.rest, to + width, width);
}

// What is to be prefetched, `share` bytes a step.
struct Ahead {
  const uint8_t *next, *end;
  int64_t share;
};

template <bool TWO, int N>
JZ3_AVX2 void multiply_rows(const uint8_t* bytes, int64_t stride, const int8_t* queries, int64_t columns, Ahead& ahead,
                            double* sums, int64_t width) {
  Sums<N> total;
  clear(total);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t c = 0; c < columns; c += STEP) {
    for (int64_t i = 0; i < ahead.share && ahead.next < ahead.end; i += 64, ahead.next += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead.next), _MM_HINT_T0);
    for (int64_t quad = c; quad < c + STEP; quad += 4) {
      const int8_t* const digits = queries + quad * TILE_QUERIES;
      multiply_quads<TWO>(total, bytes + quad, stride, load(digits), TWO ? load(digits + 32) : ones, ones);
    }
  }
  add_rows<TWO>(total, sums, width);
}

JZ3_INLINE __m256i even_words(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }

JZ3_INLINE int64_t sum_of(__m256i lanes) {
  alignas(32) int32_t lane[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), lanes);
  int64_t sum = 0;
  for (int32_t x : lane) sum += x;
  return sum;
}

JZ3_AVX2 double norm_of(const uint8_t* bytes, int64_t columns) {
  const __m256i offset = _mm256_set1_epi8(-128);
  double sum = 0;
  for (int64_t begin = 0; begin < columns; begin += SPAN) {
    const int64_t end = std::min(begin + SPAN, columns);
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (int64_t c = begin; c < end; c += 32) {
      const __m256i levels = _mm256_xor_si256(load(bytes + c), offset);  // minus 128
      const __m256i x = even_words(levels), y = _mm256_srai_epi16(levels, 8);
      even = _mm256_add_epi32(even, _mm256_madd_epi16(x, x));
      odd = _mm256_add_epi32(odd, _mm256_madd_epi16(y, y));
    }
    sum += double(sum_of(even) + sum_of(odd));
  }
  return sum;
}

}  // namespace

JZ3_AVX2 void multiply_tiles_avx2(const uint8_t* bytes, int64_t stride, const int8_t* digits, int64_t columns,
                                  int64_t queries, const uint8_t* ahead, int64_t ahead_bytes, double* sums,
                                  double* norms) {
  const int64_t blocks = (queries + TILE_QUERIES - 1) / TILE_QUERIES, width = blocks * TILE_QUERIES;
  const int64_t steps = columns / STEP * blocks * (TILE_ROWS / ROWS);
  Ahead next{ahead, ahead + ahead_bytes, (ahead_bytes / std::max<int64_t>(steps, 1) + 63) / 64 * 64};
  std::fill_n(sums, TILE_ROWS * width, 0.0);
  for (int64_t r = 0; norms && r < TILE_ROWS; ++r) norms[r] += norm_of(bytes + r * stride, columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const bool half = queries - block * TILE_QUERIES <= TILE_QUERIES / 2;
    const int64_t rows = half ? 2 * ROWS : ROWS;
    for (int64_t begin = 0; begin < columns; begin += SPAN)
      for (int64_t r = 0; r < TILE_ROWS; r += rows)
        (half ? multiply_rows<false, 2 * ROWS> : multiply_rows<true, ROWS>)(
            bytes + r * stride + begin, stride, digits + (block * columns + begin) * TILE_QUERIES,
            std::min(SPAN, columns - begin), next, sums + r * width + block * TILE_QUERIES, width);
  }
}

JZ3_AVX2 int64_t single_avx2(const uint8_t* bytes, const int8_t* digits, int64_t columns) {
  const __m256i low = _mm256_set1_epi16(255);
  int64_t sum = 0;
  for (int64_t begin = 0; begin < columns; begin += SPAN) {
    const int64_t end = std::min(begin + SPAN, columns);
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (int64_t c = begin; c < end; c += 32) {
      const __m256i x = load(bytes + c), d = load(digits + c);
      even = _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_and_si256(x, low), even_words(d)));
      odd = _mm256_add_epi32(odd, _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(d, 8)));
    }
    sum += sum_of(even) + sum_of(odd);
  }
  return sum;
}

}  // namespace jz3
#endif
