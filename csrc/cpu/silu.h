// SiLU(gate) * up and its gradient in registers. Include inside a region, behind cpu/bf16.h or cpu/avx2.h.
#pragma once

namespace jz3 {
namespace {

// 1 / (1 + exp(-x)); of bfloat16 by an estimated reciprocal and a step of Newton's, in half the time of a division.
template <class T>
inline Vec sigmoid(Vec x) {
  const Vec one = all(1.0f);
#ifdef JZ3_BF16_PRODUCTS
  if constexpr (sizeof(T) == 2) {
    // Below, the reciprocal would underflow. NaN in the second operand survives min.
    const Vec power = smaller(all(120.0f), x * all(-LOG2E));
    const Vec sum = one + exp2_ps<T>(power), guess = _mm512_rcp14_ps(sum);
    return guess * subtract_from(all(2.0f), sum, guess);
  }
#endif
  return one / (one + exp_ps(zeros() - x));
}

template <class T>
inline Vec gated(Vec gate, Vec up) {
  return gate * sigmoid<T>(gate) * up;
}

struct GateUp {
  Vec gate, up;
};

// The gradients with respect to gate and up.
template <class T>
inline GateUp gated_gradient(Vec gate, Vec up, Vec grad) {
  const Vec one = all(1.0f), s = sigmoid<T>(gate);
  const Vec slope = s * mul_add(gate, one - s, one);
  return {grad * up * slope, grad * (gate * s)};
}

}  // namespace
}  // namespace jz3
