// The kernels for AVX512-VNNI. Up to 24 queries: two rows x 1, 2, 4 or 8 queries, 64 columns at a time, 4-bit codes
// becoming bytes by vpshufb on the way, and those of 1 bit, as masks, by vpblendmb. More queries: eight rows x 32
// queries, four columns at a time, so that sums need no adding up of lanes and 16 vpdpbusd come with 10 loads. On Zen 4
// that is 0.98 of the peak of products in registers with everything in the L2 cache, and 0.95 in a scan.
//
// How the next tile is prefetched was measured on Zen 4. For many queries into the L1 cache, whence it sinks into the
// L2 cache: prefetched into the latter, rows in pages of 4 KiB cost the products a tenth of their speed (and none in
// huge pages). For few queries into the L2 cache: 31 GB/s instead of 20. On Zen 5, whose L1 cache holds the digits of
// eight queries and some rows, these come 8 KB ahead of their use into that alone: 0.9 of a plain read's speed for one
// query and 0.7 to 0.8 for eight, where the next tile came with 0.8 and 0.6 to 0.75. Intel's fetch few lines at once past
// the L2 cache (0.6 and 0.3 of a plain read on Emerald Rapids): there they come into it, 16 KB ahead (0.95 and 0.75).
#include "cpu/score_avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace jz3 {
namespace {

// Of two rows with N queries; a chain of structures, because GCC keeps arrays in memory.
template <int N>
struct Sums {
  __m512i a, b;
  Sums<N - 1> rest;
};
template <>
struct Sums<0> {};

template <int N>
JZ3_INLINE void clear(Sums<N>& sums) {
  sums.a = sums.b = _mm512_setzero_si512();
  if constexpr (N > 1) clear(sums.rest);
}

// With the sum of the digits still missing: vpdpbusd takes level + 128.
template <int N>
JZ3_INLINE void multiply(Sums<N>& sums, __m512i first, __m512i second, const int8_t* query) {
  const __m512i digits = _mm512_loadu_si512(query);
  add_products(sums.a, first, digits);
  add_products(sums.b, second, digits);
  if constexpr (N > 1) multiply(sums.rest, first, second, query + STEP);
}

// Bytes of rows of level + 128, or of 4-bit codes.
template <int BITS, bool NORMS, int N>
JZ3_INLINE void step(Sums<N>& sums, Sums<1>& norms, __m512i first, __m512i second, const int8_t* query, __m512i table,
                     __m512i squares) {
  if constexpr (BITS == 4) {
    const Codes a = codes_of(first), b = codes_of(second);
    multiply(sums, _mm512_shuffle_epi8(table, a.low), _mm512_shuffle_epi8(table, b.low), query);
    multiply(sums, _mm512_shuffle_epi8(table, a.high), _mm512_shuffle_epi8(table, b.high), query + N * STEP);
    if (NORMS) {
      add_code_squares(norms.a, a, squares);
      add_code_squares(norms.b, b, squares);
    }
  } else {
    multiply(sums, first, second, query);
    if (NORMS) {
      add_squares(norms.a, first);
      add_squares(norms.b, second);
    }
  }
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

template <int N>
JZ3_INLINE void add_sums(const Sums<N>& sums, double* first, double* second) {
  if constexpr (N == 8) {
    const auto &c = sums.rest.rest, &e = c.rest.rest, &g = e.rest.rest;
    add_to(first, lane_sums(quarter_sums(sums.a, sums.rest.a, c.a, c.rest.a),
                            quarter_sums(e.a, e.rest.a, g.a, g.rest.a)));
    add_to(second, lane_sums(quarter_sums(sums.b, sums.rest.b, c.b, c.rest.b),
                             quarter_sums(e.b, e.rest.b, g.b, g.rest.b)));
  } else if constexpr (N == 4) {
    const auto &b = sums.rest, &c = b.rest, &d = c.rest;
    const __m256i lanes = lane_sums(quarter_sums(sums.a, b.a, c.a, d.a), quarter_sums(sums.b, b.b, c.b, d.b));
    alignas(32) int32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), lanes);
    for (int i = 0; i < 4; ++i) first[i] += each[i], second[i] += each[4 + i];
  } else {
    *first += _mm512_reduce_add_epi32(sums.a);
    *second += _mm512_reduce_add_epi32(sums.b);
    if constexpr (N > 1) add_sums(sums.rest, first + 1, second + 1);
  }
}

// Two lines of the rows after these.
struct Prefetch {
  const char* next;
  int64_t step;
  bool past;
  explicit Prefetch(const RowPair& rows)
      : next(reinterpret_cast<const char*>(rows.ahead)), step(rows.ahead_step), past(rows.past) {}
  JZ3_INLINE void operator()() {
    if (past) {
      _mm_prefetch(next, _MM_HINT_NTA);
      _mm_prefetch(next + step / 2, _MM_HINT_NTA);
    } else {
      _mm_prefetch(next, _MM_HINT_T1);
      _mm_prefetch(next + step / 2, _MM_HINT_T1);
    }
    next += step;
  }
};

template <int BITS, bool NORMS, int N>
JZ3_AVX512 void multiply_pair(const RowPair& rows, const int8_t* queries, const Levels& levels,
                              double* const sums[2], double* norms[2]) {
  constexpr int64_t query_bytes = 8 / BITS * N;  // per byte of a row
  const __m512i table = table_of(levels.byte), squares = table_of(levels.square);
  Sums<N> total;
  Sums<1> square;
  clear(total);
  clear(square);
  const uint8_t *first = rows.first, *second = rows.second;
  Prefetch prefetch(rows);
  int64_t b = 0;
  for (; b + STEP <= rows.width; b += STEP) {
    prefetch();
    step<BITS, NORMS>(total, square, _mm512_loadu_si512(first + b), _mm512_loadu_si512(second + b),
                      queries + b * query_bytes, table, squares);
  }
  if (b < rows.width) {
    const __mmask64 rest = (uint64_t(1) << (rows.width - b)) - 1;
    const __m512i blank = _mm512_set1_epi8(BITS == 4 ? 0 : -128);  // digits are 0 there, or it stands for level 0
    step<BITS, NORMS>(total, square, _mm512_mask_loadu_epi8(blank, rest, first + b),
                      _mm512_mask_loadu_epi8(blank, rest, second + b), queries + b * query_bytes, table, squares);
  }
  add_sums(total, sums[0], sums[1]);
  if (NORMS) {
    constexpr double unit = BITS == 4 ? SQUARE : square_bound;
    *norms[0] += unit * _mm512_reduce_add_epi32(square.a);
    *norms[1] += unit * _mm512_reduce_add_epi32(square.b);
  }
}

// Eight bytes of 1-bit codes, from memory: by way of a register it is two instructions.
JZ3_INLINE __mmask64 eight(const uint8_t* codes) {
  __mmask64 bits;
  __asm__("kmovq %1, %0" : "=k"(bits) : "m"(*reinterpret_cast<const uint64_t*>(codes)));
  return bits;
}

// Fewer than that.
JZ3_INLINE __mmask64 some_bits(const uint8_t* codes, int64_t count) {
  uint64_t bits = 0;
  std::memcpy(&bits, codes, size_t(std::min<int64_t>(count, 8)));
  return _cvtu64_mask64(bits);
}

// 64 columns of rows of 1-bit codes.
template <int N>
JZ3_INLINE void multiply_bits(Sums<N>& sums, __mmask64 first, __mmask64 second, const int8_t* query, __m512i unset,
                              __m512i set) {
  multiply(sums, _mm512_mask_blend_epi8(first, unset, set), _mm512_mask_blend_epi8(second, unset, set), query);
}

template <int N>
JZ3_AVX512 void multiply_bit_pair(const RowPair& rows, const int8_t* queries, const Levels& levels,
                                  double* const sums[2], double* norms[2]) {
  const __m512i unset = _mm512_set1_epi8(char(levels.byte[0])), set = _mm512_set1_epi8(char(levels.byte[1]));
  Sums<N> even, odd;  // so that sums of few queries wait less for each other
  clear(even);
  clear(odd);
  const uint8_t *first = rows.first, *second = rows.second;
  Prefetch prefetch(rows);
  int64_t b = 0;
  for (; b + STEP <= rows.width; b += STEP) {
    prefetch();
    for (int64_t i = b; i < b + STEP; i += 16, queries += 2 * N * STEP) {
      multiply_bits(even, eight(first + i), eight(second + i), queries, unset, set);
      multiply_bits(N > 4 ? even : odd, eight(first + i + 8), eight(second + i + 8), queries + N * STEP, unset,
                    set);
    }
  }
  for (; b < rows.width; b += 8, queries += N * STEP)
    multiply_bits(even, some_bits(first + b, rows.width - b), some_bits(second + b, rows.width - b), queries, unset, set);
  add_sums(even, sums[0], sums[1]);
  if constexpr (N <= 4) add_sums(odd, sums[0], sums[1]);
  if (!norms) return;
  const int largest = std::max(std::abs(levels.byte[0] - 128), std::abs(levels.byte[1] - 128));
  *norms[0] += double(largest) * largest * 8 * double(rows.width);
  *norms[1] += double(largest) * largest * 8 * double(rows.width);
}

template <int BITS, int N>
void pair_avx512(const RowPair& rows, const int8_t* queries, const Levels& levels, double* const sums[2],
                 double* norms[2]) {
  if constexpr (BITS == 1)
    multiply_bit_pair<N>(rows, queries, levels, sums, norms);
  else if (norms)
    multiply_pair<BITS, true, N>(rows, queries, levels, sums, norms);
  else
    multiply_pair<BITS, false, N>(rows, queries, levels, sums, norms);
}

// Of N rows, what their bounds are made of, and the blocks of eight queries of which one is open; the bit i is that of
// the blocks i, i + 64, ..
template <int N>
struct RowBounds {
  __m512d scale, size, norm;
  const double* sums;
  uint64_t open = 0;
  RowBounds<N - 1> rest;

  JZ3_INLINE RowBounds(const Products& products, int64_t row) : rest(products, row + 1) {
    const int64_t own = std::min(row, products.rows - 1);
    scale = _mm512_set1_pd(products.row_scale[own]);
    size = _mm512_abs_pd(scale);
    norm = _mm512_set1_pd(std::sqrt(products.norms[own] * (1 + ROUNDING)));
    sums = products.sums + own * products.width;
  }
};
template <>
struct RowBounds<0> {
  JZ3_INLINE RowBounds(const Products&, int64_t) {}
};

// Of eight queries.
struct QueryBlock {
  __m512d step, offset, rest, slack, limit;
  JZ3_INLINE QueryBlock(const Bounds& bounds, const double* limits, int64_t query)
      : step(_mm512_loadu_pd(bounds.step + query)),
        offset(_mm512_loadu_pd(bounds.offset + query)),
        rest(_mm512_loadu_pd(bounds.rest + query)),
        slack(_mm512_loadu_pd(bounds.slack + query)),
        limit(_mm512_loadu_pd(limits + query)) {}

  template <int N>
  JZ3_INLINE __m512d most(const RowBounds<N>& row, int64_t query) const {
    const __m512d score = _mm512_fmadd_pd(_mm512_loadu_pd(row.sums + query), step, offset);
    return _mm512_fmadd_pd(row.scale, score, _mm512_mul_pd(row.size, _mm512_fmadd_pd(row.norm, rest, slack)));
  }
  JZ3_INLINE unsigned reached(__m512d most) const { return _mm512_cmp_pd_mask(most, limit, _CMP_NLT_UQ); }
};

template <int N>
JZ3_INLINE unsigned open_lanes(const RowBounds<N>& rows, const QueryBlock& block, int64_t query) {
  const unsigned own = block.reached(block.most(rows, query));
  if constexpr (N > 1)
    return own | open_lanes(rows.rest, block, query);
  else
    return own;
}

template <int N>
JZ3_INLINE void mark(RowBounds<N>& rows, const QueryBlock& block, int64_t query) {
  if (block.reached(block.most(rows, query))) rows.open |= uint64_t(1) << query / 8 % 64;
  if constexpr (N > 1) mark(rows.rest, block, query);
}

template <int N>
JZ3_AVX512 int64_t list_open(const RowBounds<N>& rows, int64_t row, const Products& products, const Bounds& bounds,
                             const double* limit, Open* open, int64_t count) {
  for (uint64_t blocks = rows.open; blocks; blocks &= blocks - 1)
    for (int64_t q = 8 * __builtin_ctzll(blocks); q < products.queries; q += 8 * 64) {
      const QueryBlock block(bounds, limit, q);
      const __m512d most = block.most(rows, q);
      double each[8];
      _mm512_storeu_pd(each, most);
      for (unsigned left = block.reached(most); left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        open[count++] = {int32_t(row), int32_t(q) + i, each[i]};
      }
    }
  if constexpr (N > 1)
    if (row + 1 < products.rows) return list_open(rows.rest, row + 1, products, bounds, limit, open, count);
  return count;
}

// Four rows at a time, so that the queries' numbers are loaded once for them.
JZ3_AVX512 int64_t choose_avx512(const Products& products, const Bounds& bounds, const double* limit, Open* open) {
  constexpr int together = 4;
  int64_t count = 0;
  for (int64_t r = 0; r < products.rows; r += together) {
    RowBounds<together> rows(products, r);
    for (int64_t q = 0; q < products.queries; q += 8) {
      const QueryBlock block(bounds, limit, q);
      if (open_lanes(rows, block, q)) mark(rows, block, q);
    }
    count = list_open(rows, r, products, bounds, limit, open, count);
  }
  return count;
}

JZ3_INLINE void multiply_step(__m512i& total, const uint8_t* bytes, const int8_t* query, int64_t column) {
  add_products(total, _mm512_loadu_si512(bytes + column), _mm512_loadu_si512(query + column));
}

JZ3_INLINE int64_t sum_of(__m512i x, __m512i y, __m512i z, __m512i w) {
  return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(x, y), _mm512_add_epi32(z, w)));
}

JZ3_AVX512 int64_t single_avx512(const uint8_t* bytes, const int8_t* query, int64_t columns) {
  int64_t sum = 0;
  for (int64_t begin = 0; begin < columns; begin += 1 << 15) {
    const int64_t end = begin + (1 << 15) < columns ? begin + (1 << 15) : columns;
    __m512i even = _mm512_setzero_si512(), odd = even, third = even, fourth = even;
    int64_t c = begin;
    for (; c + 4 * STEP <= end; c += 4 * STEP) {
      multiply_step(even, bytes, query, c);
      multiply_step(odd, bytes, query, c + STEP);
      multiply_step(third, bytes, query, c + 2 * STEP);
      multiply_step(fourth, bytes, query, c + 3 * STEP);
    }
    for (; c < end; c += STEP) multiply_step(even, bytes, query, c);
    sum += sum_of(even, odd, third, fourth);
  }
  return sum;
}

JZ3_INLINE void multiply_codes(__m512i& even, __m512i& odd, __m512i bytes, const int8_t* query, __m512i table) {
  const Codes codes = codes_of(bytes);
  add_products(even, _mm512_shuffle_epi8(table, codes.low), _mm512_loadu_si512(query));
  add_products(odd, _mm512_shuffle_epi8(table, codes.high), _mm512_loadu_si512(query + STEP));
}

JZ3_AVX512 int64_t single_4bit_avx512(const uint8_t* codes, int64_t row_bytes, const int8_t* query,
                                      const Levels& levels) {
  const __m512i table = table_of(levels.byte);
  int64_t sum = 0;
  for (int64_t begin = 0; begin < row_bytes; begin += 1 << 14) {
    const int64_t end = std::min<int64_t>(begin + (1 << 14), row_bytes);
    __m512i even = _mm512_setzero_si512(), odd = even, third = even, fourth = even;
    int64_t b = begin;
    for (; b + 2 * STEP <= end; b += 2 * STEP) {
      multiply_codes(even, odd, _mm512_loadu_si512(codes + b), query + 2 * b, table);
      multiply_codes(third, fourth, _mm512_loadu_si512(codes + b + STEP), query + 2 * (b + STEP), table);
    }
    for (; b < end; b += STEP) {
      const __mmask64 known = end - b >= STEP ? ~uint64_t(0) : (uint64_t(1) << (end - b)) - 1;
      multiply_codes(even, odd, _mm512_maskz_loadu_epi8(known, codes + b), query + 2 * b, table);
    }
    sum += sum_of(even, odd, third, fourth);
  }
  return sum;
}

JZ3_AVX512 void unpack_4bit_avx512(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m512i table = table_of(levels.byte), blank = _mm512_set1_epi8(-128);
  for (int64_t b = 0; b < row_bytes; b += STEP) {
    const __mmask64 known = row_bytes - b >= STEP ? ~uint64_t(0) : (uint64_t(1) << (row_bytes - b)) - 1;
    const Codes packed = codes_of(_mm512_maskz_loadu_epi8(known, codes + b));
    _mm512_storeu_si512(bytes + 2 * b, _mm512_mask_blend_epi8(known, blank, _mm512_shuffle_epi8(table, packed.low)));
    _mm512_storeu_si512(bytes + 2 * b + STEP,
                        _mm512_mask_blend_epi8(known, blank, _mm512_shuffle_epi8(table, packed.high)));
  }
}

// The numbers' bits are spread over four bytes in two turns.
JZ3_AVX512 void unpack_2bit_avx512(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  constexpr int either_and = 0xA8;  // (a | b) & c
  const __m512i table = table_of(levels.byte);
  const __m512i halves = _mm512_set1_epi32(0x000F000F), twos = _mm512_set1_epi32(0x03030303);
  int64_t b = 0;
  for (; b + 16 <= row_bytes; b += 16) {
    const __m512i whole = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + b)));
    const __m512i half = _mm512_ternarylogic_epi32(whole, _mm512_slli_epi32(whole, 12), halves, either_and);
    const __m512i two = _mm512_ternarylogic_epi32(half, _mm512_slli_epi32(half, 6), twos, either_and);
    _mm512_storeu_si512(bytes + 4 * b, _mm512_shuffle_epi8(table, two));
  }
  for (; b < row_bytes; ++b) std::memcpy(bytes + 4 * b, levels.bytes[codes[b]], 4);
}

JZ3_AVX512 void unpack_1bit_avx512(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  const __m512i unset = _mm512_set1_epi8(char(levels.byte[0])), set = _mm512_set1_epi8(char(levels.byte[1]));
  int64_t b = 0;
  for (; b + 8 <= row_bytes; b += 8) {
    _mm512_storeu_si512(bytes + 8 * b, _mm512_mask_blend_epi8(eight(codes + b), unset, set));
  }
  for (; b < row_bytes; ++b)
    for (int i = 0; i < 8; ++i) bytes[8 * b + i] = levels.bytes[codes[b]][i];
}

// N rows x one or two blocks of sixteen queries, four columns of each.
template <bool TWO, int N>
JZ3_INLINE void multiply_rows(Sums<N>& sums, const uint8_t* four, int64_t stride, __m512i first, __m512i second) {
  int32_t levels;
  std::memcpy(&levels, four, 4);
  const __m512i all = _mm512_set1_epi32(levels);
  add_products(sums.a, all, first);
  if (TWO) add_products(sums.b, all, second);
  if constexpr (N > 1) multiply_rows<TWO>(sums.rest, four + stride, stride, first, second);
}

JZ3_INLINE void add_block(double* sums, __m512i block) {
  add_to(sums, _mm512_castsi512_si256(block));
  add_to(sums + 8, _mm512_extracti64x4_epi64(block, 1));
}

template <bool TWO, int N>
JZ3_INLINE void add_rows(const Sums<N>& sums, double* to, int64_t width) {
  add_block(to, sums.a);
  if (TWO) add_block(to + TILE_QUERIES, sums.b);
  if constexpr (N > 1) add_rows<TWO>(sums.rest, to + width, width);
}

// What is to be prefetched, `share` bytes a step.
struct Ahead {
  const uint8_t *next, *end;
  int64_t share;
};

constexpr int ROWS = 8;

// A step of 2 N rows.
template <int N>
JZ3_INLINE void add_squares_of_rows(Sums<N>& squares, const uint8_t* step, int64_t stride) {
  add_squares(squares.a, _mm512_loadu_si512(step));
  add_squares(squares.b, _mm512_loadu_si512(step + stride));
  if constexpr (N > 1) add_squares_of_rows(squares.rest, step + 2 * stride, stride);
}

template <int N>
JZ3_INLINE void add_norms(const Sums<N>& squares, double* norms) {
  norms[0] += square_bound * _mm512_reduce_add_epi32(squares.a);
  norms[1] += square_bound * _mm512_reduce_add_epi32(squares.b);
  if constexpr (N > 1) add_norms(squares.rest, norms + 2);
}

template <bool TWO, bool NORMS>
JZ3_AVX512 void multiply_columns(const uint8_t* bytes, int64_t stride, const int8_t* first, const int8_t* second,
                                 int64_t columns, Ahead& ahead, double* sums, int64_t width, double* norms) {
  Sums<ROWS> total;
  Sums<ROWS / 2> squares;
  clear(total);
  clear(squares);
  for (int64_t c = 0; c < columns; c += STEP) {
    for (int64_t i = 0; i < ahead.share && ahead.next < ahead.end; i += 64, ahead.next += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead.next), _MM_HINT_T0);
    if (NORMS) add_squares_of_rows(squares, bytes + c, stride);
    for (int64_t quad = c; quad < c + STEP; quad += 4)
      multiply_rows<TWO>(total, bytes + quad, stride, _mm512_loadu_si512(first + quad * TILE_QUERIES),
                         TWO ? _mm512_loadu_si512(second + quad * TILE_QUERIES) : _mm512_setzero_si512());
  }
  add_rows<TWO>(total, sums, width);
  if (NORMS) add_norms(squares, norms);
}

}  // namespace

void multiply_tiles_avx512(const uint8_t* bytes, int64_t stride, const int8_t* digits, int64_t columns, int64_t queries,
                           const uint8_t* ahead, int64_t ahead_bytes, double* sums, double* norms) {
  constexpr int64_t span = 1 << 15;  // columns whose sums fit 32 bits
  const int64_t blocks = (queries + TILE_QUERIES - 1) / TILE_QUERIES;
  const int64_t width = blocks * TILE_QUERIES, block_bytes = columns * TILE_QUERIES;
  const int64_t steps = columns / STEP * ((blocks + 1) / 2) * (TILE_ROWS / ROWS);
  Ahead next{ahead, ahead + ahead_bytes, (ahead_bytes / std::max<int64_t>(steps, 1) + 63) / 64 * 64};
  std::fill_n(sums, TILE_ROWS * width, 0.0);
  for (int64_t block = 0; block < blocks; block += 2) {
    const bool two = block + 1 < blocks;
    const auto multiply = norms && block == 0 ? two ? multiply_columns<true, true> : multiply_columns<false, true>
                          : two               ? multiply_columns<true, false>
                                              : multiply_columns<false, false>;
    for (int64_t begin = 0; begin < columns; begin += span) {
      const int8_t* const first = digits + block * block_bytes + begin * TILE_QUERIES;
      for (int64_t r = 0; r < TILE_ROWS; r += ROWS)
        multiply(bytes + r * stride + begin, stride, first, first + block_bytes, std::min(span, columns - begin), next,
                 sums + r * width + block * TILE_QUERIES, width, norms ? norms + r : nullptr);
    }
  }
}

// Bytes of the first-level cache, 0 where that isn't known.
static int64_t first_cache() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  return sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  return 0;
#endif
}

template <int N>
void choose_pair(Kernels& k, int bits) {
  k.block = N;
  k.bytes = pair_avx512<8, N>;
  k.codes = bits == 4 ? pair_avx512<4, N> : bits == 1 ? pair_avx512<1, N> : nullptr;
}

Kernels avx512_kernels(int bits, int64_t queries) {
  Kernels k = choose_kernels(Isa::scalar, bits, queries);
  (queries <= 1 ? choose_pair<1> : queries <= 2 ? choose_pair<2> : queries <= 4 ? choose_pair<4> : choose_pair<8>)(k, bits);
  k.any_width = k.biased = true;
  if (first_cache() >= 48 << 10) {
    k.past = !__builtin_cpu_is("intel");
    k.near = (k.past ? 8 : 16) << 10;
  }
  k.single = single_avx512;
  k.choose = choose_avx512;
  if (bits == 4) k.unpack = unpack_4bit_avx512, k.single_codes = single_4bit_avx512;
  if (bits == 2) k.unpack = unpack_2bit_avx512;
  if (bits == 1) k.unpack = unpack_1bit_avx512;
  return k;
}

}  // namespace jz3
#endif
