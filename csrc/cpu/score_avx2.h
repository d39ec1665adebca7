// What the kernels of score_topk for AVX2 share. Names are local to every file.
#pragma once

#include <immintrin.h>

#define JZ3_AVX2 __attribute__((target("avx2,fma")))
#define JZ3_INLINE JZ3_AVX2 inline __attribute__((always_inline))

namespace jz3 {
namespace {

// Two sums for each of N: queries of two rows, or rows of sixteen queries. A chain of structures, because GCC keeps
// arrays in memory.
template <int N>
struct Sums {
  __m256i a, b;
  Sums<N - 1> rest;
};
template <>
struct Sums<0> {};

template <int N>
JZ3_INLINE void clear(Sums<N>& sums) {
  sums.a = sums.b = _mm256_setzero_si256();
  if constexpr (N > 1) clear(sums.rest);
}

JZ3_INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

}  // namespace
}  // namespace jz3
