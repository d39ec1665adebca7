// Products with a fixed matrix in 8 bits: y = x W with x rounded to 255 levels per row and group of numbers, W per column
// and group. Products of numbers are whole and summed exactly by vpdpbusd; a group's sum is then multiplied by its two
// scales and added up in float32.
//
// vpdpbusd takes unsigned numbers on its left: rows are stored plus 128, and sums start at -128 times the column's sum.
// A panel is 64 columns; of a panel, a group's part (at most 8 KB), the block's rows of that group and the panel's float32
// sums lie in the first-level cache together. Operations per row: depth * columns multiplications at 64 a cycle and core
// of vpdpbusd, and per group and 16 columns a conversion, a product and a fused multiply-add.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "cpu/bf16.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/tiles.h"

namespace jz3 {

#ifdef JZ3_BF16

bool has_int8_products() { return has_bf16() && __builtin_cpu_supports("avx512vnni"); }

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")

namespace {

constexpr int64_t LANES = 16;
constexpr int ROWS = 6;
constexpr int64_t BLOCK = 72;  // rows at a time
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

template <class T>
void pack_part(const T* w, int64_t group, int64_t depth, int64_t columns, int64_t row_stride, int64_t column_stride,
               Part& part) {
  for (int64_t n = 0; n < PANEL; ++n) {
    float largest = 0;
    for (int64_t k = 0; k < depth && n < columns; ++k) {
      const float x = std::fabs(value(w[k * row_stride + n * column_stride]));
      if (!(x <= largest)) largest = x;
    }
    part.scale[n] = scale_of(largest);
    const float inverse = inverse_of(largest);
    int32_t sum = 0;
    for (int64_t k = 0; k < group; ++k) {
      const bool inside = k < depth && n < columns && inverse > 0;
      const int q = inside ? int(std::nearbyint(value(w[k * row_stride + n * column_stride]) * inverse)) : 0;
      part.number[k / 4][n][k % 4] = int8_t(q), sum += q;
    }
    part.start[n] = -128 * sum;
  }
}

// The bits of numbers without their sign: as whole numbers they are ordered as the numbers are, NaN above infinity.
inline __m512 magnitude(__m512 x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))); }

inline __m512 load_first(const uint16_t* p, __mmask16 part) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p)), 16));
}
inline __m512 load_first(const float* p, __mmask16 part) { return _mm512_maskz_loadu_ps(part, p); }

// One row's group of `count` numbers, filled up with zeros.
template <class T>
inline float quantise(const T* x, int64_t group, int64_t count, uint8_t* q) {
  const auto numbers = [&](int64_t c) {
    const int64_t left = std::clamp<int64_t>(count - c, 0, LANES);
    return left == LANES ? load(x + c) : load_first(x + c, __mmask16((1u << left) - 1));
  };
  __m512i top = _mm512_setzero_si512();
  for (int64_t c = 0; c < group; c += LANES)
    top = _mm512_max_epu32(top, _mm512_castps_si512(magnitude(numbers(c))));
  const int32_t bits = int32_t(_mm512_reduce_max_epu32(top));
  float largest;
  std::memcpy(&largest, &bits, 4);
  const __m512 inverse = _mm512_set1_ps(inverse_of(largest));
  for (int64_t c = 0; c < group; c += LANES) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(numbers(c), inverse));
    const __m128i byte = _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), _mm_set1_epi8(char(0x80)));
    _mm_store_si128(reinterpret_cast<__m128i*>(q + c), byte);
  }
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
                                                  const float* column, float* to) {
  finish<Add>(sums.row, _mm512_set1_ps(*scale), column, to);
  if constexpr (M > 1) finish<Add>(sums.rest, scale + groups, groups, column, to + PANEL);
}

// sums[m][n] (+)= scale[m] * (the group's sum of products); rows of q lie `stride` bytes apart, scales `groups` numbers.
template <int M, int N>
void tile(int64_t group, const uint8_t* q, int64_t stride, const float* scale, int64_t groups, const Part& part,
          float* sums, bool add) {
  Sums<M, N> total;
  RowSums<N> w;
  load_columns(w, part.start);
  start(total, w);
  const int8_t* numbers = part.number[0][0];
  for (int64_t k = 0; k < group; k += 4) {
    load_columns(w, numbers + PANEL * k);
    add_products(total, q + k, stride, w);
  }
  if (add)
    finish<true>(total, scale, groups, part.scale, sums);
  else
    finish<false>(total, scale, groups, part.scale, sums);
}

template <int M, int N>
void tile_rows(int64_t rows, int64_t group, const uint8_t* q, int64_t stride, const float* scale, int64_t groups,
               const Part& part, float* sums, bool add) {
  for (; rows >= M; rows -= M, q += M * stride, scale += M * groups, sums += M * PANEL)
    tile<M, N>(group, q, stride, scale, groups, part, sums, add);
  if constexpr (M > 1)
    if (rows) tile_rows<M / 2, N>(rows, group, q, stride, scale, groups, part, sums, add);
}

template <class T>
void product_rows(const Int8Arguments<T>& a, int64_t begin, int64_t rows) {
  const int64_t groups = (a.depth + a.group - 1) / a.group, stride = groups * a.group;
  Buffer<uint8_t> q(BLOCK * stride);
  Buffer<float> scale(BLOCK * groups), sums(BLOCK * PANEL);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g < groups; ++g)
      scale.get()[m * groups + g] =
          quantise(a.x + (begin + m) * a.x_stride + g * a.group, a.group, std::min(a.group, a.depth - g * a.group),
                   q.get() + m * stride + g * a.group);
  for (int64_t first = 0; first < a.columns; first += PANEL) {
    const int64_t count = std::min<int64_t>(PANEL, a.columns - first), registers = (count + LANES - 1) / LANES;
    for (int64_t g = 0; g < groups; ++g) {
      const auto& part = *part_at<const Part>(a.w, first / PANEL * groups + g, a.group);
      const uint8_t* own = q.get() + g * a.group;
      const float* s = scale.get() + g;
      if (registers == 4)
        tile_rows<ROWS, 4>(rows, a.group, own, stride, s, groups, part, sums.get(), g);
      else if (registers == 3)
        tile_rows<ROWS, 3>(rows, a.group, own, stride, s, groups, part, sums.get(), g);
      else if (registers == 2)
        tile_rows<ROWS, 2>(rows, a.group, own, stride, s, groups, part, sums.get(), g);
      else
        tile_rows<ROWS, 1>(rows, a.group, own, stride, s, groups, part, sums.get(), g);
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < count; n += LANES)
        store(a.y + (begin + m) * a.y_stride + first + n, _mm512_load_ps(sums.get() + m * PANEL + n));
  }
}

}  // namespace

#pragma GCC pop_options

template <class T>
void pack_int8(const T* w, uint8_t* out, int64_t group, int64_t depth, int64_t columns, int64_t row_stride,
               int64_t column_stride, int threads) {
  const int64_t groups = (depth + group - 1) / group;
  parallel((columns + PANEL - 1) / PANEL, depth * PANEL, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t g = 0; g < groups; ++g)
        pack_part(w + g * group * row_stride + panel * PANEL * column_stride, group, std::min(group, depth - g * group),
                  columns - panel * PANEL, row_stride, column_stride, *part_at<Part>(out, panel * groups + g, group));
  });
}

template <class T>
void product_int8(const Int8Arguments<T>& a, int threads) {
  share_rows(a.rows, BLOCK, threads, [&](int64_t begin, int64_t end) { product_rows(a, begin, end - begin); });
}

template void pack_int8(const float*, uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int);
template void pack_int8(const uint16_t*, uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int);
template void product_int8(const Int8Arguments<float>&, int);
template void product_int8(const Int8Arguments<uint16_t>&, int);

#endif

}  // namespace jz3
