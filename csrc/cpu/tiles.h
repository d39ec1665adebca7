// Products of packed matrices of float32 or bfloat16 in AVX-512 registers (cpu/multiply.h) by the type of their numbers.
// Include after the standard headers, as bf16.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cpu/bf16.h"

#ifdef JZ3_BF16
#define JZ3_BF16_PRODUCTS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

#include "cpu/avx512.h"
#include "cpu/multiply.h"

namespace jz3 {

template <class T>
struct Of : Avx512 {
  using Plain = T;  // as the type of a buffer
};
template <>
struct Of<bf16> : Avx512Bf16 {
  using Plain = uint32_t;
};
template <class T>
constexpr int64_t units(int64_t numbers) {
  return units_of<Of<T>>(numbers);
}
constexpr int64_t PANEL = panel_of<Of<float>>;

template <class T, bool Ahead, class Out>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<Of<T>>& left, const Right<Of<T>>& right, Out* c,
              int64_t stride, bool add) {
  multiply_packed<Of<T>, Ahead>(rows, columns, depth, left, right, c, stride, add);
}

}  // namespace jz3

#pragma GCC pop_options
#endif
