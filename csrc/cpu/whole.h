// Products of whole numbers in registers for the vector unit V: rows and packed matrices are rounded to whole numbers under
// one scale per row, or column, and group of numbers; a group's products are summed exactly and then scaled. Include
// inside a region, behind cpu/bf16.h or cpu/avx2.h.
//
// V has: Number, of a row, and the `count` of them that one multiplication takes, 32 bits; levels(group), the largest number
// there may be; Register, of LANES 32-bit sums, with load, spread (32 bits to all lanes), add_products and numbers (to
// float32); `rows` of the largest tile, and `ahead`, whether what is next is brought nearer; `panel`, the columns of
// Part, a group's part of a packed matrix, with their `scale` and `number`; start, the first sums of a part's columns;
// quantise(row, group, count, room for a group, numbers), which returns the scale; and prepare and set, which bring a
// column to a part, whose scale is then divided by `gain`.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/nearer.h"

namespace jz3 {
namespace {

inline float value(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float value(float x) { return x; }

// A group that isn't finite has the scale NaN, so that every sum with it is. Where the levels would be divided by too little
// to be finite, it counts as zero.
inline float scale_of(float largest, float levels) {
  if (!(largest <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
  return largest / levels;
}
inline float inverse_of(float largest, float levels) {
  return largest >= 1e-38f * levels && largest <= std::numeric_limits<float>::max() ? levels / largest : 0.0f;
}

// The largest magnitude, NaN if any is.
inline float largest_magnitude(const float* x, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float own = std::fabs(x[i]);
    if (!(own <= largest)) largest = own;
  }
  return largest;
}

// Sums of M rows and N registers of columns; chains of structures, because GCC keeps arrays in memory.
template <class V, int N>
struct RowSums {
  typename V::Register own;
  RowSums<V, N - 1> rest;
};
template <class V>
struct RowSums<V, 0> {};
template <class V, int M, int N>
struct Sums {
  RowSums<V, N> row;
  Sums<V, M - 1, N> rest;
};
template <class V, int N>
struct Sums<V, 0, N> {};

#define JZ3_INLINE inline __attribute__((always_inline))

template <class V, int N>
JZ3_INLINE void load_columns(RowSums<V, N>& to, const void* from) {
  to.own = V::load(from);
  if constexpr (N > 1) load_columns(to.rest, static_cast<const char*>(from) + sizeof(typename V::Register));
}

template <class V, int N>
JZ3_INLINE void start(RowSums<V, N>& to, const typename V::Part& part, int64_t column) {
  to.own = V::start(part, column);
  if constexpr (N > 1) start(to.rest, part, column + LANES);
}

template <class V, int M, int N>
JZ3_INLINE void start(Sums<V, M, N>& to, const RowSums<V, N>& from) {
  to.row = from;
  if constexpr (M > 1) start(to.rest, from);
}

template <class V, int N>
JZ3_INLINE void add_products(RowSums<V, N>& sums, typename V::Register x, const RowSums<V, N>& w) {
  V::add_products(sums.own, x, w.own);
  if constexpr (N > 1) add_products(sums.rest, x, w.rest);
}

template <class V, int M, int N>
JZ3_INLINE void add_products(Sums<V, M, N>& sums, const typename V::Number* q, int64_t stride, const RowSums<V, N>& w) {
  add_products(sums.row, V::spread(q), w);
  if constexpr (M > 1) add_products(sums.rest, q + stride, stride, w);
}

template <bool Add, class V, int N>
JZ3_INLINE void finish(const RowSums<V, N>& sums, Vec scale, const float* column, float* to) {
  const Vec both = scale * load(column), sum = V::numbers(sums.own);
  store(to, Add ? mul_add(sum, both, load(to)) : sum * both);
  if constexpr (N > 1) finish<Add>(sums.rest, scale, column + LANES, to + LANES);
}

template <bool Add, class V, int M, int N>
JZ3_INLINE void finish(const Sums<V, M, N>& sums, const float* scale, int64_t groups, const float* column, float* to,
                       int64_t stride) {
  finish<Add>(sums.row, all(*scale), column, to);
  if constexpr (M > 1) finish<Add>(sums.rest, scale + groups, groups, column, to + stride, stride);
}

#undef JZ3_INLINE

// Rows of whole numbers: numbers[rows][stride], a group's behind one another, and scale[rows][groups].
template <class V>
struct WholeRows {
  const typename V::Number* number;
  const float* scale;
  int64_t stride, groups;
};

// sums[m][n] (+)= scale[m] * (the group's sum of products).
template <class V, int M, int N>
void tile_whole(int64_t group, const WholeRows<V>& x, const typename V::Part& part, float* sums, int64_t stride, bool add) {
  Sums<V, M, N> total;
  RowSums<V, N> w;
  start(w, part, 0);
  start(total, w);
  if constexpr (V::ahead)
    for (int m = 0; m < M; ++m)
      for (int64_t k = 0; k < group; k += 64 / int64_t(sizeof(typename V::Number)))
        _mm_prefetch(reinterpret_cast<const char*>(x.number + (M + m) * x.stride + k), _MM_HINT_T0);
  const char* numbers = reinterpret_cast<const char*>(part.number);
  for (int64_t k = 0; k < group; k += V::count, numbers += V::panel * 4) {
    load_columns(w, numbers);
    add_products(total, x.number + k, x.stride, w);
  }
  if (add)
    finish<true>(total, x.scale, x.groups, part.scale, sums, stride);
  else
    finish<false>(total, x.scale, x.groups, part.scale, sums, stride);
}

template <class V, int M, int N>
void tile_rows_whole(int64_t rows, int64_t group, WholeRows<V> x, const typename V::Part& part, float* sums, int64_t stride,
                     bool add, Nearer& next) {
  for (; rows >= M; rows -= M, x.number += M * x.stride, x.scale += M * x.groups, sums += M * stride) {
    next.fetch();
    tile_whole<V, M, N>(group, x, part, sums, stride, add);
  }
  if constexpr (M > 1)
    if (rows) tile_rows_whole<V, M / 2, N>(rows, group, x, part, sums, stride, add, next);
}

// The part `index` of a packed matrix.
template <class V, class Byte>
auto* part_at(Byte* packed, int64_t index, int64_t group) {
  using Part = std::conditional_t<std::is_const_v<Byte>, const typename V::Part, typename V::Part>;
  return reinterpret_cast<Part*>(packed + index * V::part_bytes(group));
}

// sums[rows][stride] (+)= x W for one panel's `columns` (a whole panel, or a multiple of LANES below) and all groups of
// x; `parts` is the panel's first of these groups.
template <class V>
void panel_whole(int64_t rows, int64_t columns, int64_t group, WholeRows<V> x, const uint8_t* parts, float* sums,
                 int64_t stride, bool add) {
  for (int64_t g = 0; g < x.groups; ++g) {
    const auto& part = *part_at<V>(parts, g, group);
    const WholeRows<V> own{x.number + g * group, x.scale + g, x.stride, x.groups};
    // The part behind it is mostly that of the next group or panel.
    const int64_t size = V::part_bytes(group), tiles = std::max<int64_t>(rows / V::rows, 1);
    Nearer next(reinterpret_cast<const char*>(&part) + size, V::ahead, 0, size, tiles, 16);
    const auto run = [&](auto registers) {
      tile_rows_whole<V, V::rows, registers()>(rows, group, own, part, sums, stride, add || g, next);
    };
    const int64_t registers = (columns + LANES - 1) / LANES;
    constexpr int most = V::panel / LANES;
    if (registers == most) {
      run(std::integral_constant<int, most>());
    } else if constexpr (most > 2) {
      if (registers == 3)
        run(std::integral_constant<int, 3>());
      else if (registers == 2)
        run(std::integral_constant<int, 2>());
      else
        run(std::integral_constant<int, 1>());
    } else {
      run(std::integral_constant<int, 1>());
    }
  }
}

// Rows of whole numbers, with memory of their own.
template <class V>
class Quantised {
 public:
  Quantised(int64_t rows, int64_t depth, int64_t group)
      : group_(group),
        groups_((depth + group - 1) / group),
        numbers_(rows * groups_ * group),
        scales_(rows * groups_),
        room_(group) {}

  // The first `depth` numbers of every row.
  template <class T>
  WholeRows<V> fill(const T* x, int64_t rows, int64_t depth, int64_t stride) {
    const int64_t groups = (depth + group_ - 1) / group_, line = groups * group_;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t g = 0; g < groups; ++g)
        scales_.get()[m * groups + g] =
            V::quantise(x + m * stride + g * group_, group_, std::min(group_, depth - g * group_), room_.get(),
                        numbers_.get() + m * line + g * group_);
    return {numbers_.get(), scales_.get(), line, groups};
  }

 private:
  int64_t group_, groups_;
  Buffer<typename V::Number> numbers_;
  Buffer<float> scales_, room_;
};

// `depth` numbers of each of a panel's first `columns` columns.
template <class V, class T>
void pack_part(const T* w, int64_t group, int64_t depth, int64_t columns, int64_t row_stride, int64_t column_stride,
               float* column, typename V::Part& part) {
  for (int64_t n = 0; n < V::panel; ++n) {
    for (int64_t k = 0; k < group; ++k)
      column[k] = k < depth && n < columns ? value(w[k * row_stride + n * column_stride]) : 0;
    V::prepare(column, group);
    const float largest = largest_magnitude(column, group), levels = V::levels(group);
    part.scale[n] = scale_of(largest, levels) / V::gain;
    V::set(part, n, column, group, inverse_of(largest, levels));
  }
}

// The panels begin .. end of a packed matrix.
template <class V, class T>
void pack_panels(const T* w, uint8_t* out, const WholeShape& shape, int64_t begin, int64_t end) {
  const int64_t group = shape.group, groups = (shape.depth + group - 1) / group;
  Buffer<float> column(group);
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t g = 0; g < groups; ++g)
      pack_part<V>(w + g * group * shape.row_stride + panel * V::panel * shape.column_stride, group,
                   std::min(group, shape.depth - g * group), shape.columns - panel * V::panel, shape.row_stride,
                   shape.column_stride, column.get(), *part_at<V>(out, panel * groups + g, group));
}

// Rows begin .. begin + rows of y = x W, every panel's sums in the cache before they are written.
template <class V, class T>
void product_whole(const WholeArguments<T>& a, int64_t begin, int64_t rows) {
  Quantised<V> quantised(rows, a.depth, a.group);
  Buffer<float> sums(rows * V::panel);
  const WholeRows<V> x = quantised.fill(a.x + begin * a.x_stride, rows, a.depth, a.x_stride);
  for (int64_t first = 0; first < a.columns; first += V::panel) {
    const int64_t count = std::min<int64_t>(V::panel, a.columns - first);
    const uint8_t* parts = a.w + first / V::panel * x.groups * V::part_bytes(a.group);
    panel_whole<V>(rows, count, a.group, x, parts, sums.get(), V::panel, false);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < count; n += LANES)
        store(a.y + (begin + m) * a.y_stride + first + n, load(sums.get() + m * V::panel + n));
  }
}

}  // namespace
}  // namespace jz3
