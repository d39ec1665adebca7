// segment_project for the vector unit V. Include inside a region compiled for it, after cpu/multiply.h.
//
// A piece is up to CHUNK tokens of a document, or several whole documents. For a piece, g L is formed for up to WIDE
// outputs, DEPTH columns of g at a time, whose rows of L are laid out in the cache just before (signs become numbers
// only there); then every document's outer product with its rows of a. A sum over tokens is formed in their order
// from the document's first one on, so that it does not depend on what else is in the batch.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/segment_items.h"

namespace jz3 {
namespace {

constexpr int64_t CHUNK = SEGMENT_CHUNK, WIDE = SEGMENT_WIDE, DEPTH = 256;

// Two rows of numbers (the second may be null, for zeros) as units.
inline void interleave(const float* x, const float*, int64_t n, float* out) {
  std::memcpy(out, x, size_t(n) * sizeof(float));
}
inline void interleave(const uint16_t* x, const uint16_t*, int64_t n, float* out) {
  typedef uint32_t __attribute__((may_alias)) Bits;
  for (int64_t i = 0; i < n; ++i) reinterpret_cast<Bits*>(out)[i] = uint32_t(x[i]) << 16;
}
// The same of 16 signs of a row of L, from a bit on.
inline void interleave_signs(uint32_t x, uint32_t, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = x >> i & 1 ? -1.0f : 1.0f;
}
// A row's numbers along the inner dimension as units.
inline void copy_units(const float* x, int64_t n, float* out) { interleave(x, x, n, out); }
inline void copy_units(const uint16_t* x, int64_t n, float* out) { interleave(x, x, n, out); }
// Rows of g L as the units of their outer product.
inline const float* outer_units(float* rows, int64_t count, int64_t stride, float scale, float*) {
  if (scale != 1)
    for (int64_t i = 0; i < count * stride; ++i) rows[i] *= scale;
  return rows;
}
#ifdef JZ3_BF16_PRODUCTS
inline void interleave(const uint16_t* x, const uint16_t* next, int64_t n, Pair* out) {
  if (next)
    for (int64_t i = 0; i < n; ++i) out[i] = uint32_t(x[i]) | uint32_t(next[i]) << 16;
  else
    for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}
inline void interleave_signs(uint32_t x, uint32_t next, Pair* out) {
  for (int i = 0; i < 16; ++i) out[i] = 0x3F803F80u ^ ((x >> i & 1) << 15) ^ (next >> i << 31);
}
inline void copy_units(const uint16_t* x, int64_t n, Pair* out) {
  if (n % 2) out[n / 2] = 0;
  std::memcpy(out, x, size_t(n) * sizeof(uint16_t));
}
inline const Pair* outer_units(float* rows, int64_t count, int64_t stride, float scale, Pair* out) {
  const __m512 factor = _mm512_set1_ps(scale);
  auto rounded = [&](const float* p) { return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(p), factor)); };
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t c = 0; c < stride; c += 16) {
      const float* x = rows + r * stride + c;
      const __m256i next = r + 1 < count ? rounded(x + stride) : _mm256_setzero_si256();
      _mm512_storeu_si512(out + r / 2 * stride + c, pairs(rounded(x), next));
    }
  return out;
}
#endif

template <class V, class T>
class Segments {
 public:
  Segments(const SegmentArguments& arguments)
      : x(arguments),
        g(static_cast<const T*>(x.g)),
        a(static_cast<const T*>(x.a)),
        wide_columns(round_up(x.columns, V::lanes)),
        direct(!x.tokens && SAME && x.width % V::count == 0 && x.stride_g % V::count == 0),
        left(units_of<V>(DEPTH) * round_up(std::min(WIDE, x.outputs), panel_of<V>)),
        g_units(direct ? 0 : CHUNK * units_of<V>(DEPTH)),
        a_units(units_of<V>(CHUNK) * round_up(x.columns, panel_of<V>)),
        outer(V::count == 1 ? 0 : units_of<V>(CHUNK) * WIDE),
        rows(CHUNK * WIDE),
        block(x.columns == wide_columns ? 0 : x.outputs * wide_columns) {}

  void run(const SegmentItem& item) {
    const int64_t stop = x.bounds[item.last];
    int64_t begin = x.bounds[item.document];
    do {
      const int64_t next = std::min(begin + CHUNK, stop);
      for (int64_t q = item.first; q < item.end; q += WIDE) {
        const int64_t outputs = std::min(WIDE, item.end - q);
        project(begin, next, q, outputs);
        for (int64_t i = item.document; i < item.last; ++i) add_outer(i, begin, next, q, outputs);
      }
      begin = next;
    } while (begin < stop);
  }

 private:
  using Unit = typename V::Unit;
  static constexpr bool SAME = sizeof(Unit) == V::count * sizeof(T);  // rows of T are rows of units

  int64_t token(int64_t position) const { return x.tokens ? x.tokens[position] : position; }

  // rows = g L of some positions
  void project(int64_t begin, int64_t end, int64_t q, int64_t outputs) {
    const int64_t stride = round_up(outputs, V::lanes);
    for (int64_t k = 0; k < x.width; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, x.width - k), count = units_of<V>(depth);
      lay_out_left(k, depth, q, outputs);
      Left<V> columns{};
      if (direct) {
        columns = {reinterpret_cast<const Unit*>(g + begin * x.stride_g + k), x.stride_g / V::count, 1};
      } else {
        for (int64_t i = begin; i < end; ++i)
          copy_units(g + token(i) * x.stride_g + k, depth, g_units.get() + (i - begin) * count);
        columns = {g_units.get(), count, 1};
      }
      multiply_packed<V>(end - begin, outputs, count, columns, {left.get(), count * panel_of<V>, panel_of<V>}, rows.get(),
                  stride, k > 0);
    }
  }

  void lay_out_left(int64_t k, int64_t depth, int64_t q, int64_t outputs) {
    const int64_t count = units_of<V>(depth);
    for (int64_t i = 0; i < depth; i += V::count) {
      const bool more = i + 1 < depth;
      Unit* out = left.get() + i / V::count * panel_of<V>;
      if (x.signs) {
        const uint32_t* words = static_cast<const uint32_t*>(x.left) + (k + i) * x.stride_left;
        const uint32_t* next = more ? words + x.stride_left : words;  // g's unit is zero there
        for (int64_t c = 0; c < outputs; c += 16) {
          const int64_t word = (q + c) / 32, shift = (q + c) % 32;
          interleave_signs(words[word] >> shift, next[word] >> shift,
                           out + c / panel_of<V> * count * panel_of<V> + c % panel_of<V>);
        }
      } else {
        const T* row = static_cast<const T*>(x.left) + (k + i) * x.stride_left + q;
        lay_out(row, more ? row + x.stride_left : nullptr, outputs, count, out);
      }
    }
  }

  // A row of a right operand, or two, in panels of `count` rows of units
  void lay_out(const T* row, const T* next, int64_t columns, int64_t count, Unit* out) {
    for (int64_t c = 0; c < columns; c += panel_of<V>, out += count * panel_of<V>) {
      const int64_t n = std::min(panel_of<V>, columns - c);
      interleave(row + c, next ? next + c : nullptr, n, out);
      std::fill(out + n, out + round_up(n, V::lanes), Unit(0));
    }
  }

  // Adds the outer products of a document's positions in [begin, end).
  void add_outer(int64_t document, int64_t begin, int64_t end, int64_t q, int64_t outputs) {
    const int64_t from = std::max(begin, x.bounds[document]), to = std::min(end, x.bounds[document + 1]);
    float* out = x.out + (document * x.outputs + q) * x.columns;
    if (x.bounds[document] == x.bounds[document + 1]) std::fill(out, out + outputs * x.columns, 0.0f);
    if (from >= to) return;
    const int64_t tokens = to - from, count = units_of<V>(tokens), stride = round_up(outputs, V::lanes);
    for (int64_t i = 0; i < tokens; i += V::count) {
      const T* row = a + token(from + i) * x.stride_a;
      const T* next = i + 1 < tokens ? a + token(from + i + 1) * x.stride_a : nullptr;
      lay_out(row, next, x.columns, count, a_units.get() + i / V::count * panel_of<V>);
    }
    const Unit* projected = outer_units(rows.get() + (from - begin) * stride, tokens, stride, x.scale, outer.get());
    const bool whole = x.columns == wide_columns;
    float* sums = whole ? out : block.get() + q * wide_columns;
    multiply_packed<V>(outputs, x.columns, count, {projected, 1, stride}, {a_units.get(), count * panel_of<V>, panel_of<V>},
                sums, wide_columns, from > x.bounds[document]);
    if (!whole && to == x.bounds[document + 1])
      for (int64_t r = 0; r < outputs; ++r)
        std::memcpy(out + r * x.columns, sums + r * wide_columns, size_t(x.columns) * sizeof(float));
  }

  const SegmentArguments& x;
  const T *g, *a;
  const int64_t wide_columns;
  const bool direct;
  // uint32_t and not Pair: attributes of template arguments are ignored
  using Plain = std::conditional_t<V::count == 1, float, uint32_t>;
  Buffer<Plain> left, g_units, a_units, outer;
  Buffer<float> rows, block;
};

template <class V, class T>
void run_items(const SegmentArguments& arguments, SegmentItems& items) {
  Segments<V, T> segments(arguments);
  while (const SegmentItem* item = items.next()) segments.run(*item);
}

}  // namespace
}  // namespace jz3
