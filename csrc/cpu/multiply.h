// Products of matrices in registers, for the vector unit that V describes. Include inside a region compiled for it.
//
// V has: Unit, what one multiplication takes of the inner dimension, and its `count` of numbers; Sums, a register of
// `lanes` float32 sums; zero, load, store (also to bfloat16, where results are wanted in it), add; Column, a register of units, and column(), which loads one;
// multiply_add(Sums, Unit, Column); and the largest tile: `rows` by `columns` registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

namespace jz3 {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count ? static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64))) : nullptr) {}
  ~Buffer() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return data_; }

 private:
  T* data_;
};

template <class V>
constexpr int64_t units_of(int64_t numbers) {
  return (numbers + V::count - 1) / V::count;
}

// Columns of a packed operand that lie together.
template <class V>
constexpr int64_t panel_of = V::lanes * V::columns;

// A[m][k] at a[m * row + k * column], B[k][n] at b[(n / panel_of) * panel + k * step + n % panel_of], in units.
template <class V>
struct Left {
  const typename V::Unit* a;
  int64_t row, column;
};
template <class V>
struct Right {
  const typename V::Unit* b;
  int64_t panel, step;
};

// With Ahead, the units of A's rows lie behind one another (column is 1). Only float32 results can be added to.
template <class V, int M, int N, bool Ahead, class Out>
inline void tile(const Left<V>& left, const typename V::Unit* b, int64_t step, int64_t depth, Out* c, int64_t stride,
                 bool add) {
  const int64_t unit = Ahead ? 1 : left.column;
  typename V::Sums total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = V::zero();
  for (int64_t k = 0; k < depth; ++k) {
    typename V::Column column[N];
    for (int n = 0; n < N; ++n) column[n] = V::column(b + k * step + V::lanes * n);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        total[m][n] = V::multiply_add(total[m][n], left.a[m * left.row + k * unit], column[n]);
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      Out* to = c + m * stride + V::lanes * n;
      if constexpr (std::is_same_v<Out, float>)
        if (add) total[m][n] = V::add(V::load(to), total[m][n]);
      V::store(to, total[m][n]);
    }
}

// Tiles of M rows, then of half as many, down to one.
template <class V, int M, int N, bool Ahead, class Out>
void tile_rows(int64_t rows, Left<V> left, const typename V::Unit* b, int64_t step, int64_t depth, Out* c,
               int64_t stride, bool add) {
  for (; rows >= M; rows -= M, left.a += M * left.row, c += M * stride)
    tile<V, M, N, Ahead>(left, b, step, depth, c, stride, add);
  if constexpr (M > 1)
    if (rows) tile_rows<V, M / 2, N, Ahead>(rows, left, b, step, depth, c, stride, add);
}

// C[m][n] (+)= sum over k of A[m][k] B[k][n]; columns is rounded up to V::lanes. Every sum is formed in the order of k
// and then added to C, whatever else is multiplied with it.
template <class V, bool Ahead = false, class Out = float>
void multiply_packed(int64_t rows, int64_t columns, int64_t depth, const Left<V>& left, const Right<V>& right, Out* c,
                     int64_t stride, bool add) {
  for (int64_t n = 0; n < columns; n += panel_of<V>, c += panel_of<V>) {
    const typename V::Unit* b = right.b + n / panel_of<V> * right.panel;
    const int64_t registers = std::min<int64_t>(V::columns, (columns - n + V::lanes - 1) / V::lanes);
    if (registers == V::columns)
      tile_rows<V, V::rows, V::columns, Ahead>(rows, left, b, right.step, depth, c, stride, add);
    else if (registers == 3)
      tile_rows<V, V::rows, 3, Ahead>(rows, left, b, right.step, depth, c, stride, add);
    else if (registers == 2)
      tile_rows<V, V::rows, 2, Ahead>(rows, left, b, right.step, depth, c, stride, add);
    else
      tile_rows<V, V::rows, 1, Ahead>(rows, left, b, right.step, depth, c, stride, add);
  }
}

}  // namespace
}  // namespace jz3
