// Rows and packed matrices in 8 bits and their products: rows are rounded to 255 levels per row and group of numbers,
// matrices per column and group. Include after the standard headers, as bf16.h; may run only where has_int8_products().
//
// Before they are rounded, every 64 numbers are multiplied with a Hadamard matrix, which leaves products as they are and
// spreads what is larger than its neighbours, by which their common scale would be set.
//
// vpdpbusd takes unsigned numbers on its left: rows are stored plus 128, and sums start at -128 times the column's sum.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "cpu/bf16.h"
#include "cpu/ops.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")

namespace jz3 {
namespace {

constexpr int64_t LANES = 16, TURNED = 64;
constexpr float SMALLEST = 1e-36f;  // groups whose largest number is below count as zero: 127 / it must be finite

// A group's part of a panel, as it lies in memory, in fours of the group's numbers.
struct Part {
  int32_t start[PANEL];  // -128 times the sum of the column's numbers
  float scale[PANEL];
  int8_t number[1][PANEL][4];  // as many as the group has
};
static_assert(offsetof(Part, number) == INT8_HEAD && sizeof(Part) == INT8_HEAD + PANEL * 4);

template <class P, class Byte>
P* part_at(Byte* packed, int64_t index, int64_t group) {
  return reinterpret_cast<P*>(packed + index * (INT8_HEAD + PANEL * group));
}

inline float value(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float value(float x) { return x; }

// A group that isn't finite has the scale NaN, so that every sum with it is.
inline float scale_of(float largest) {
  if (!(largest <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
  return largest / 127.0f;
}
inline float inverse_of(float largest) {
  return largest >= SMALLEST && largest <= std::numeric_limits<float>::max() ? 127.0f / largest : 0.0f;
}

// The bits of numbers without their sign: as whole numbers they are ordered as the numbers are, NaN above infinity.
inline __m512 magnitude(__m512 x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))); }

inline __m512 load_first(const uint16_t* p, __mmask16 part) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p)), 16));
}
inline __m512 load_first(const float* p, __mmask16 part) { return _mm512_maskz_loadu_ps(part, p); }

// Lane i of x plus, or minus where bit `Bit` of i is set, lane i with this bit turned over.
template <int Bit>
inline __m512 turn_lanes(__m512 x, __m512 other) {
  const __m512 minus = _mm512_set1_ps(-1.0f);
  constexpr __mmask16 set = Bit == 1 ? 0xAAAA : Bit == 2 ? 0xCCCC : Bit == 4 ? 0xF0F0 : 0xFF00;
  return _mm512_fmadd_ps(x, _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), set, minus), other);
}

// x times a Hadamard matrix.
inline __m512 turn_lanes(__m512 x) {
  x = turn_lanes<1>(x, _mm512_permute_ps(x, 0xB1));
  x = turn_lanes<2>(x, _mm512_permute_ps(x, 0x4E));
  x = turn_lanes<4>(x, _mm512_shuffle_f32x4(x, x, 0xB1));
  return turn_lanes<8>(x, _mm512_shuffle_f32x4(x, x, 0x4E));
}

// 64 numbers times a Hadamard matrix, whose square is 64.
struct Turned {
  __m512 a, b, c, d;
  void turn() {
    const __m512 e = _mm512_add_ps(a, b), f = _mm512_sub_ps(a, b), g = _mm512_add_ps(c, d), h = _mm512_sub_ps(c, d);
    a = turn_lanes(_mm512_add_ps(e, g)), b = turn_lanes(_mm512_add_ps(f, h));
    c = turn_lanes(_mm512_sub_ps(e, g)), d = turn_lanes(_mm512_sub_ps(f, h));
  }
  void keep(float* x) const {
    _mm512_store_ps(x, a), _mm512_store_ps(x + 16, b), _mm512_store_ps(x + 32, c), _mm512_store_ps(x + 48, d);
  }
};

// The first `count` of 16 numbers, zeros behind them.
template <class T>
inline __m512 load_some(const T* x, int64_t count) {
  if (count >= LANES) return load(x);
  return load_first(x, __mmask16((1u << std::max<int64_t>(count, 0)) - 1));
}

// 64 numbers times `inverse` as bytes, in the order in which packing leaves them: rows' as matrices'.
inline __m512i levels(const float* x, __m512 inverse) {
  const auto whole = [&](int64_t i) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), inverse)); };
  return _mm512_packs_epi16(_mm512_packs_epi32(whole(0), whole(16)), _mm512_packs_epi32(whole(32), whole(48)));
}

// One row's group of `count` numbers, filled up with zeros and turned; `turned` has room for a group.
template <class T>
inline float quantise(const T* x, int64_t group, int64_t count, float* turned, uint8_t* q) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < group; i += TURNED) {
    const int64_t left = count - i;
    Turned part{load_some(x + i, left), load_some(x + i + 16, left - 16), load_some(x + i + 32, left - 32),
                load_some(x + i + 48, left - 48)};
    part.turn();
    part.keep(turned + i);
    for (const __m512 y : {part.a, part.b, part.c, part.d})
      top = _mm512_max_epu32(top, _mm512_castps_si512(magnitude(y)));
  }
  const int32_t bits = int32_t(_mm512_reduce_max_epu32(top));
  float largest;
  std::memcpy(&largest, &bits, 4);
  const __m512 inverse = _mm512_set1_ps(inverse_of(largest));
  for (int64_t c = 0; c < group; c += TURNED)
    _mm512_store_si512(q + c, _mm512_xor_si512(levels(turned + c, inverse), _mm512_set1_epi8(char(0x80))));
  return scale_of(largest);
}

typedef uint32_t __attribute__((may_alias)) Four;  // bytes

// Sums of M rows and N registers of columns; chains of structures, because GCC keeps arrays in memory.
template <int N>
struct RowSums {
  __m512i own;
  RowSums<N - 1> rest;
};
template <>
struct RowSums<0> {};
template <int M, int N>
struct Sums {
  RowSums<N> row;
  Sums<M - 1, N> rest;
};
template <int N>
struct Sums<0, N> {};

template <int N>
inline __attribute__((always_inline)) void load_columns(RowSums<N>& to, const void* from) {
  to.own = _mm512_load_si512(from);
  if constexpr (N > 1) load_columns(to.rest, static_cast<const char*>(from) + sizeof(__m512i));
}

template <int M, int N>
inline __attribute__((always_inline)) void start(Sums<M, N>& to, const RowSums<N>& from) {
  to.row = from;
  if constexpr (M > 1) start(to.rest, from);
}

// An instruction and not an intrinsic, for which GCC copies the sums to and fro.
template <int N>
inline __attribute__((always_inline)) void add_products(RowSums<N>& sums, __m512i x, const RowSums<N>& w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums.own) : "v"(x), "v"(w.own));
  if constexpr (N > 1) add_products(sums.rest, x, w.rest);
}

template <int M, int N>
inline __attribute__((always_inline)) void add_products(Sums<M, N>& sums, const uint8_t* q, int64_t stride,
                                                        const RowSums<N>& w) {
  add_products(sums.row, _mm512_set1_epi32(int(*reinterpret_cast<const Four*>(q))), w);
  if constexpr (M > 1) add_products(sums.rest, q + stride, stride, w);
}

template <bool Add, int N>
inline __attribute__((always_inline)) void finish(const RowSums<N>& sums, __m512 scale, const float* column, float* to) {
  const __m512 both = _mm512_mul_ps(scale, _mm512_load_ps(column)), sum = _mm512_cvtepi32_ps(sums.own);
  _mm512_store_ps(to, Add ? _mm512_fmadd_ps(sum, both, _mm512_load_ps(to)) : _mm512_mul_ps(sum, both));
  if constexpr (N > 1) finish<Add>(sums.rest, scale, column + LANES, to + LANES);
}

template <bool Add, int M, int N>
inline __attribute__((always_inline)) void finish(const Sums<M, N>& sums, const float* scale, int64_t groups,
                                                  const float* column, float* to, int64_t stride) {
  finish<Add>(sums.row, _mm512_set1_ps(*scale), column, to);
  if constexpr (M > 1) finish<Add>(sums.rest, scale + groups, groups, column, to + stride, stride);
}

// Rows in 8 bits: numbers[rows][stride], a group's behind one another, and scale[rows][groups].
struct Int8Rows {
  const uint8_t* number;
  const float* scale;
  int64_t stride, groups;
};

// sums[m][n] (+)= scale[m] * (the group's sum of products).
template <int M, int N>
void tile_int8(int64_t group, const Int8Rows& x, const Part& part, float* sums, int64_t stride, bool add) {
  Sums<M, N> total;
  RowSums<N> w;
  load_columns(w, part.start);
  start(total, w);
  const int8_t* numbers = part.number[0][0];
  for (int64_t k = 0; k < group; k += 4) {
    load_columns(w, numbers + PANEL * k);
    add_products(total, x.number + k, x.stride, w);
  }
  if (add)
    finish<true>(total, x.scale, x.groups, part.scale, sums, stride);
  else
    finish<false>(total, x.scale, x.groups, part.scale, sums, stride);
}

template <int M, int N>
void tile_rows_int8(int64_t rows, int64_t group, Int8Rows x, const Part& part, float* sums, int64_t stride, bool add) {
  for (; rows >= M; rows -= M, x.number += M * x.stride, x.scale += M * x.groups, sums += M * stride)
    tile_int8<M, N>(group, x, part, sums, stride, add);
  if constexpr (M > 1)
    if (rows) tile_rows_int8<M / 2, N>(rows, group, x, part, sums, stride, add);
}

// sums[rows][stride] (+)= x W for one panel's `columns` (64, or a multiple of 16 below) and all groups of x; `parts` is
// the panel's first of these groups. Sums lie at multiples of 64 bytes.
inline void panel_int8(int64_t rows, int64_t columns, int64_t group, Int8Rows x, const uint8_t* parts, float* sums,
                       int64_t stride, bool add) {
  constexpr int ROWS = 6;
  for (int64_t g = 0; g < x.groups; ++g) {
    const auto& part = *part_at<const Part>(parts, g, group);
    const Int8Rows own{x.number + g * group, x.scale + g, x.stride, x.groups};
    switch ((columns + LANES - 1) / LANES) {
      case 4: tile_rows_int8<ROWS, 4>(rows, group, own, part, sums, stride, add || g); break;
      case 3: tile_rows_int8<ROWS, 3>(rows, group, own, part, sums, stride, add || g); break;
      case 2: tile_rows_int8<ROWS, 2>(rows, group, own, part, sums, stride, add || g); break;
      default: tile_rows_int8<ROWS, 1>(rows, group, own, part, sums, stride, add || g);
    }
  }
}

// Rows of numbers in 8 bits, with memory of their own.
class Quantised {
 public:
  Quantised(int64_t rows, int64_t depth, int64_t group)
      : group_(group),
        groups_((depth + group - 1) / group),
        numbers_(rows * groups_ * group),
        scales_(rows * groups_),
        turned_(group) {}

  // The first `depth` numbers of every row.
  template <class T>
  Int8Rows fill(const T* x, int64_t rows, int64_t depth, int64_t stride) {
    const int64_t groups = (depth + group_ - 1) / group_, bytes = groups_ * group_;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t g = 0; g < groups; ++g)
        scales_.get()[m * groups + g] =
            quantise(x + m * stride + g * group_, group_, std::min(group_, depth - g * group_), turned_.get(),
                     numbers_.get() + m * bytes + g * group_);
    return {numbers_.get(), scales_.get(), bytes, groups};
  }

 private:
  int64_t group_, groups_;
  Buffer<uint8_t> numbers_;
  Buffer<float> scales_, turned_;
};

}  // namespace
}  // namespace jz3

#pragma GCC pop_options
#endif
