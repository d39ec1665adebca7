// The kernels for AVX2 and up to 24 queries: two rows x 1, 2 or 4, both planes of a query as one number of 16 bits.
// Levels of 8 bits times digits of 7 are more than vpmaddubsw can add up, unless the levels' signs go over to the
// digits first. vpmaddwd has room for them, takes as many instructions, and with both planes at once nothing is left to
// bound or to multiply later. Of every 32 columns the queries' even ones come first, so that bytes become words by a
// mask and a shift.
#include "cpu/score_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cmath>
#include <cstring>

#include "cpu/score_avx2.h"

namespace jz3 {
namespace {

constexpr int64_t MOST_DIRECT = 8;  // queries for which 4-bit codes aren't unpacked first

// Sixteen bytes in either half.
JZ3_INLINE __m256i table_of(const Levels& levels) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels.byte)));
}

// As instructions and not as intrinsics, whose sums GCC orders anew until they need more registers than there are.
JZ3_INLINE void add_products(__m256i& total, __m256i words, __m256i digits) {
  __m256i products;
  __asm__("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(words), "x"(digits));
  __asm__("vpaddd %1, %0, %0" : "+x"(total) : "x"(products));
}

// 32 columns of level + 128 as words.
struct Words {
  __m256i even, odd;
};

JZ3_INLINE Words words_of(__m256i bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}

template <int N>
JZ3_INLINE void multiply(Sums<N>& sums, const Words& first, const Words& second, const int16_t* query) {
  const __m256i even = load(query);
  add_products(sums.a, first.even, even);
  add_products(sums.b, second.even, even);
  const __m256i odd = load(query + 16);
  add_products(sums.a, first.odd, odd);
  add_products(sums.b, second.odd, odd);
  if constexpr (N > 1) multiply(sums.rest, first, second, query + STEP);
}

// A step of both rows: 64 bytes of levels, or of 4-bit codes.
template <int BITS, int N>
JZ3_INLINE void step(Sums<N>& sums, const uint8_t* first, const uint8_t* second, const int16_t* query, __m256i table) {
  for (int half = 0; half < 64; half += 32) {
    const __m256i x = load(first + half), y = load(second + half);
    if constexpr (BITS == 4) {
      const __m256i mask = _mm256_set1_epi8(15);
      const auto levels = [&](__m256i codes) JZ3_AVX2 {
        return words_of(_mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask)));
      };
      multiply(sums, levels(x), levels(y), query + half);
      multiply(sums, levels(_mm256_srli_epi16(x, 4)), levels(_mm256_srli_epi16(y, 4)), query + N * STEP + half);
    } else {
      multiply(sums, words_of(x), words_of(y), query + half);
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
JZ3_INLINE void add_sums(const Sums<N>& sums, double* first, double* second) {
  *first += total(sums.a);
  *second += total(sums.b);
  if constexpr (N > 1) add_sums(sums.rest, first + 1, second + 1);
}

JZ3_INLINE __m256d four_totals(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256d x = _mm256_hadd_pd(halves(a), halves(b)), y = _mm256_hadd_pd(halves(c), halves(d));
  return _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
}

JZ3_INLINE void add_sums(const Sums<4>& sums, double* first, double* second) {
  const Sums<3>& b = sums.rest;
  const Sums<2>& c = b.rest;
  const Sums<1>& d = c.rest;
  _mm256_storeu_pd(first, _mm256_add_pd(_mm256_loadu_pd(first), four_totals(sums.a, b.a, c.a, d.a)));
  _mm256_storeu_pd(second, _mm256_add_pd(_mm256_loadu_pd(second), four_totals(sums.b, b.b, c.b, d.b)));
}

template <int BITS, int N>
JZ3_AVX2 void pair(const RowPair& rows, const int8_t* queries, const Levels& levels, double* const sums[2],
                   double* norms[2]) {
  constexpr int64_t per_byte = 8 / BITS * N;  // digits
  const __m256i table = table_of(levels);
  const auto* const digits = reinterpret_cast<const int16_t*>(queries);
  const auto* ahead = reinterpret_cast<const char*>(rows.ahead);
  Sums<N> total;
  clear(total);
  int64_t b = 0;
  for (; b + STEP <= rows.width; b += STEP, ahead += rows.ahead_step) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + rows.ahead_step / 2, _MM_HINT_T1);
    step<BITS>(total, rows.first + b, rows.second + b, digits + b * per_byte, table);
  }
  if (b < rows.width) {
    uint8_t first[STEP] = {}, second[STEP] = {};  // digits are 0 there
    std::memcpy(first, rows.first + b, size_t(rows.width - b));
    std::memcpy(second, rows.second + b, size_t(rows.width - b));
    step<BITS>(total, first, second, digits + b * per_byte, table);
  }
  add_sums(total, sums[0], sums[1]);
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

JZ3_AVX2 void unpack_4bit(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m256i table = table_of(levels), mask = _mm256_set1_epi8(15);
  const auto step = [&](const uint8_t* from, uint8_t* to) JZ3_AVX2 {
    for (int half = 0; half < 64; half += 32) {
      const __m256i x = load(from + half);
      auto* const low = reinterpret_cast<__m256i*>(to + half);
      _mm256_storeu_si256(low, _mm256_shuffle_epi8(table, _mm256_and_si256(x, mask)));
      _mm256_storeu_si256(low + 2, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), mask)));
    }
  };
  int64_t b = 0;
  for (; b + STEP <= row_bytes; b += STEP) step(codes + b, bytes + 2 * b);
  if (b == row_bytes) return;
  uint8_t last[STEP] = {};  // digits are 0 there
  std::memcpy(last, codes + b, size_t(row_bytes - b));
  step(last, bytes + 2 * b);
}

// The numbers' bits are spread over four bytes in two turns.
JZ3_AVX2 void unpack_2bit(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m256i table = table_of(levels), halves = _mm256_set1_epi32(0x000F000F), twos = _mm256_set1_epi32(0x03030303);
  int64_t b = 0;
  for (; b + 8 <= row_bytes; b += 8) {
    const __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + b)));
    const __m256i half = _mm256_and_si256(_mm256_or_si256(whole, _mm256_slli_epi32(whole, 12)), halves);
    const __m256i two = _mm256_and_si256(_mm256_or_si256(half, _mm256_slli_epi32(half, 6)), twos);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 4 * b), _mm256_shuffle_epi8(table, two));
  }
  for (; b < row_bytes; ++b) std::memcpy(bytes + 4 * b, levels.bytes[codes[b]], 4);
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
  (queries <= 1 ? choose_pair<1> : queries <= 2 ? choose_pair<2> : choose_pair<4>)(k, bits);
  k.any_width = k.biased = k.wide = true;
  k.single = single_avx2;
  k.choose = choose_avx2;
  if (bits == 4) k.unpack = unpack_4bit;
  if (bits == 2) k.unpack = unpack_2bit;
  if (queries > MOST_DIRECT) k.codes = nullptr;
  return k;
}

}  // namespace jz3
#endif
