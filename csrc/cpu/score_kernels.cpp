// The portable kernel and that for AVX2.
#include "cpu/score_kernels.h"

#include <cmath>
#include <cstring>

#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define JZ3_X86 1
#include <immintrin.h>
#endif

namespace jz3 {

Levels::Levels(const int8_t* levels, int bits) : byte{}, bytes{}, square{} {
  for (int i = 0; i < (1 << bits); ++i) byte[i] = uint8_t(int(levels[i]) + 128);
  for (int code = 0; code < 256; ++code)
    for (int i = 0; i < 8 / bits; ++i) bytes[code][i] = byte[(code >> (i * bits)) & ((1 << bits) - 1)];
  for (int i = 0; bits <= 4 && i < (1 << bits); ++i)
    square[i] = uint8_t((int(levels[i]) * int(levels[i]) + SQUARE - 1) / SQUARE);
}

namespace {

JZ3_CLONES double square_sum(const uint8_t* bytes, int64_t columns) {
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += 4096) {
    const int64_t end = begin + 4096 < columns ? begin + 4096 : columns;
    int32_t sum = 0;
    for (int64_t c = begin; c < end; ++c) sum += (int32_t(bytes[c]) - 128) * (int32_t(bytes[c]) - 128);
    total += sum;
  }
  return total;
}

void pair_scalar(const RowPair& rows, const int8_t* queries, const Levels&, double* const sums[2], double* norms[2]) {
  const uint8_t* row[2] = {rows.first, rows.second};
  for (int r = 0; r < 2; ++r) {
    int32_t total[QUERIES] = {};
    for (int64_t begin = 0; begin < rows.width; begin += STEP)
      for (int64_t q = 0; q < QUERIES; ++q)
        for (int64_t c = 0; c < STEP; ++c)
          total[q] += (int32_t(row[r][begin + c]) - 128) * queries[begin * QUERIES + q * STEP + c];
    for (int64_t q = 0; q < QUERIES; ++q) sums[r][q] += total[q];
    if (norms) *norms[r] += square_sum(row[r], rows.width);
  }
}

int64_t single_scalar(const uint8_t* bytes, const int8_t* query, int64_t columns) {
  int64_t total = 0;
  for (int64_t c = 0; c < columns; ++c) total += (int32_t(bytes[c]) - 128) * query[c];
  return total;
}

int64_t choose_plain(const Products& products, const Bounds& bounds, const double* limit, Open* open) {
  int64_t count = 0;
  for (int64_t r = 0; r < products.rows; ++r) {
    const double* const sums = products.sums + r * products.width;
    const double scale = products.row_scale[r], norm = std::sqrt(products.norms[r] * (1 + ROUNDING));
    for (int64_t q = 0; q < products.queries; ++q) {
      const double score = scale * (sums[q] * bounds.step[q] + bounds.offset[q]);
      const double most = score + std::fabs(scale) * (norm * bounds.rest[q] + bounds.slack[q]);
      open[count] = {int32_t(r), int32_t(q), most};
      count += most < limit[q] ? 0 : 1;
    }
  }
  return count;
}

template <int BITS>
void unpack_table(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  for (int64_t b = 0; b < row_bytes; ++b) std::memcpy(bytes + b * (8 / BITS), levels.bytes[codes[b]], 8 / BITS);
}

void unpack_4bit(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  for (int64_t b = 0; b < row_bytes; ++b) {
    uint8_t* to = bytes + b / STEP * (2 * STEP) + b % STEP;
    to[0] = levels.byte[codes[b] & 15];
    to[STEP] = levels.byte[codes[b] >> 4];
  }
}

void unpack_copy(const uint8_t* codes, const Levels&, int64_t row_bytes, uint8_t* bytes) {
  std::memcpy(bytes, codes, size_t(row_bytes));
}

#ifdef JZ3_X86
#define JZ3_AVX2 __attribute__((target("avx2")))

JZ3_AVX2 inline int64_t sum_lanes(__m256i x) {
  int32_t lane[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), x);
  int64_t sum = 0;
  for (int32_t value : lane) sum += value;
  return sum;
}

// Sums of four products. |level| <= 128 and |digit| <= 127, so pairs of products fit 16 bits.
JZ3_AVX2 inline __m256i products(__m256i bytes, const int8_t* query) {
  const __m256i level = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  const __m256i digits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(digits, level));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

JZ3_AVX2 void pair_avx2(const RowPair& rows, const int8_t* queries, const Levels&, double* const sums[2],
                        double* norms[2]) {
  const uint8_t* row[2] = {rows.first, rows.second};
  for (int r = 0; r < 2; ++r) {
    __m256i total[QUERIES];
    for (auto& x : total) x = _mm256_setzero_si256();
    for (int64_t c = 0; c < rows.width; c += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[r] + c));
      const int8_t* query = queries + c / STEP * STEP * QUERIES + c % STEP;
      for (int q = 0; q < QUERIES; ++q) total[q] = _mm256_add_epi32(total[q], products(bytes, query + q * STEP));
    }
    for (int q = 0; q < QUERIES; ++q) sums[r][q] += double(sum_lanes(total[q]));
    if (norms) *norms[r] += square_sum(row[r], rows.width);
  }
}

JZ3_AVX2 int64_t single_avx2(const uint8_t* bytes, const int8_t* query, int64_t columns) {
  int64_t sum = 0;
  for (int64_t begin = 0; begin < columns; begin += 1 << 16) {
    const int64_t end = begin + (1 << 16) < columns ? begin + (1 << 16) : columns;
    __m256i total = _mm256_setzero_si256();
    for (int64_t c = begin; c < end; c += 32)
      total = _mm256_add_epi32(total, products(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + c)),
                                               query + c));
    sum += sum_lanes(total);
  }
  return sum;
}

JZ3_AVX2 void unpack_4bit_avx2(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels.byte)));
  const __m256i mask = _mm256_set1_epi8(15);
  int64_t b = 0;
  for (; b + STEP <= row_bytes; b += STEP)
    for (int64_t half = 0; half < STEP; half += 32) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b + half));
      const __m256i low = _mm256_and_si256(packed, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
      auto* to = reinterpret_cast<__m256i*>(bytes + 2 * b + half);
      _mm256_storeu_si256(to, _mm256_shuffle_epi8(table, low));
      _mm256_storeu_si256(to + 2, _mm256_shuffle_epi8(table, high));
    }
  unpack_4bit(codes + b, levels, row_bytes - b, bytes + 2 * b);
}
#endif

}  // namespace

Kernels choose_kernels(Isa isa, int bits, int64_t queries) {
  Kernels k{pair_scalar, nullptr, QUERIES, false, false, single_scalar, square_sum,
            choose_plain,
            bits == 8   ? unpack_copy
            : bits == 4 ? unpack_4bit
            : bits == 2 ? unpack_table<2>
                        : unpack_table<1>};
#ifdef JZ3_X86
  if (isa == Isa::avx512vnni) return avx512_kernels(bits, queries);
  if (isa == Isa::avx2) {
    k.bytes = pair_avx2;
    k.single = single_avx2;
    if (bits == 4) k.unpack = unpack_4bit_avx2;
  }
#endif
  return k;
}

}  // namespace jz3
