// SiLU(gate) * up and its gradient in AVX-512 registers. Include as cpu/bf16.h.
#pragma once

#include "cpu/bf16.h"

#ifdef JZ3_BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace jz3 {

// 1 / (1 + exp(-x)); of bfloat16 by an estimated reciprocal and a step of Newton's, in half the time of a division.
template <class T>
inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (sizeof(T) == 4) {
    return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
  } else {
    // Below, the reciprocal would underflow. NaN in the second operand survives min.
    const __m512 power = _mm512_min_ps(_mm512_set1_ps(120.0f), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)));
    const __m512 sum = _mm512_add_ps(one, exp2_ps<T>(power)), guess = _mm512_rcp14_ps(sum);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, _mm512_set1_ps(2.0f)));
  }
}

template <class T>
inline __m512 gated(__m512 gate, __m512 up) {
  return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid<T>(gate)), up);
}

struct GateUp {
  __m512 gate, up;
};

// The gradients with respect to gate and up.
template <class T>
inline GateUp gated_gradient(__m512 gate, __m512 up, __m512 grad) {
  const __m512 one = _mm512_set1_ps(1.0f), s = sigmoid<T>(gate);
  const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, s), one));
  return {_mm512_mul_ps(_mm512_mul_ps(grad, up), slope), _mm512_mul_ps(grad, _mm512_mul_ps(gate, s))};
}

}  // namespace jz3

#pragma GCC pop_options
#endif
