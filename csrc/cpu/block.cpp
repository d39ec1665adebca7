// The element-wise parts of a Llama block, forward and backward, each in one pass over memory: RMSNorm with the
// residual sum before it, SiLU(gate) * up, and the softmax of the output layer. Rows are bfloat16 or float32,
// arithmetic is float32, results are rounded once.
#include <cmath>

#include "cpu/bf16.h"
#include "cpu/ops.h"
#include "cpu/pool.h"
#include "cpu/silu.h"

namespace jz3 {

#ifdef JZ3_BF16

bool has_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace {

constexpr int64_t PIECE = 128;  // rows at a time

inline __m512 rounded(const float*, __m512 x) { return x; }
inline __m512 rounded(const bf16*, __m512 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

template <class T>
void norm_rows(const NormArguments<T>& a, int64_t begin, int64_t end, bool streamed) {
  for (int64_t row = begin; row < end; ++row) {
    const T *x = a.x + row * a.width, *add = a.add ? a.add + row * a.width : nullptr;
    T *sum = a.sum + row * a.width, *y = a.y + row * a.width;
    const auto total = [&](int64_t c) {
      return add ? rounded(add, _mm512_add_ps(load(x + c), load(add + c))) : load(x + c);
    };
    __m512 square = _mm512_setzero_ps();
    for (int64_t c = 0; c < a.width; c += 16) {
      const __m512 v = total(c);
      if (add) put(sum + c, v, streamed);
      square = _mm512_fmadd_ps(v, v, square);
    }
    const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(square) / float(a.width) + a.epsilon);
    a.scale[row] = scale;
    for (int64_t c = 0; c < a.width; c += 16)
      put(y + c, _mm512_mul_ps(_mm512_mul_ps(total(c), _mm512_set1_ps(scale)), load(a.weight + c)), streamed);
  }
  end_streams();
}

template <class T>
void norm_backward_rows(const NormBackwardArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *x = a.x + row * a.width, *dy = a.dy + row * a.width;
    const T* add = a.add ? a.add + row * a.width : nullptr;
    T* dx = a.dx + row * a.width;
    __m512 dot = _mm512_setzero_ps();
    for (int64_t c = 0; c < a.width; c += 16)
      dot = _mm512_fmadd_ps(_mm512_mul_ps(load(dy + c), load(a.weight + c)), load(x + c), dot);
    const float scale = a.scale[row];
    const __m512 s = _mm512_set1_ps(scale);
    const __m512 back = _mm512_set1_ps(scale * scale * scale * _mm512_reduce_add_ps(dot) / float(a.width));
    for (int64_t c = 0; c < a.width; c += 16) {
      const __m512 g = _mm512_mul_ps(_mm512_mul_ps(load(dy + c), load(a.weight + c)), s);
      const __m512 total = _mm512_fnmadd_ps(load(x + c), back, g);
      store(dx + c, add ? _mm512_add_ps(load(add + c), total) : total);
    }
  }
}

template <class T>
void swiglu_rows(const T* gate_up, T* y, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    for (int64_t c = 0; c < width; c += 16) store(y + row * width + c, gated<T>(load(gate + c), load(up + c)));
  }
}

template <class T>
void swiglu_backward_rows(const T* gate_up, const T* dy, T* out, int64_t width, int64_t begin,
                          int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    T* d = out + row * 2 * width;
    for (int64_t c = 0; c < width; c += 16) {
      const auto both = gated_gradient<T>(load(gate + c), load(up + c), load(dy + row * width + c));
      store(d + c, both.gate);
      store(d + width + c, both.up);
    }
  }
}

inline __m512 load_part(const bf16* p, __mmask16 part) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p)), 16));
}
inline __m512 load_part(const float* p, __mmask16 part) { return _mm512_maskz_loadu_ps(part, p); }
inline void store_part(bf16* p, __mmask16 part, __m512 x) {
  _mm256_mask_storeu_epi16(p, part, (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_part(float* p, __mmask16 part, __m512 x) { _mm512_mask_storeu_ps(p, part, x); }

template <class T>
void softmax_rows(const SoftmaxArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t whole = a.width / 16 * 16;
  const __mmask16 rest = __mmask16((1u << (a.width - whole)) - 1);
  for (int64_t row = begin; row < end; ++row) {
    T *x = a.logits + row * a.stride, *target = x + a.target[row];
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const __m512 tail = _mm512_mask_mov_ps(nothing, rest, load_part(x + whole, rest));
    __m512 top = tail;
    for (int64_t c = 0; c < whole; c += 16) top = _mm512_max_ps(top, load(x + c));
    const float largest = _mm512_reduce_max_ps(top);
    const __m512 shift = _mm512_set1_ps(largest);
    const float own = _mm512_cvtss_f32(load_part(target, 1)) - largest;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < whole; c += 16) {
      const __m512 e = exp_ps(_mm512_sub_ps(load(x + c), shift));
      sum = _mm512_add_ps(sum, e);
      store(x + c, e);
    }
    const __m512 e = exp_ps(_mm512_sub_ps(tail, shift));
    sum = _mm512_mask_add_ps(sum, rest, sum, e);
    store_part(x + whole, rest, e);
    const float total = _mm512_reduce_add_ps(sum);
    a.total[row] = total;
    a.loss[row] = std::log(total) - own;
    store_part(target, 1, _mm512_set1_ps(std::exp(own) - total));
  }
}

}  // namespace

#pragma GCC pop_options

template <class T>
void rms_norm(const NormArguments<T>& a, int threads) {
  const int64_t row_bytes = a.width * int64_t(sizeof(T));
  const bool streamed = streams(a.y, a.rows * row_bytes, row_bytes) && reinterpret_cast<uintptr_t>(a.sum) % 64 == 0;
  share_rows(a.rows, PIECE, threads, [&](int64_t begin, int64_t end) { norm_rows(a, begin, end, streamed); });
}

template <class T>
void rms_norm_backward(const NormBackwardArguments<T>& a, int threads) {
  share_rows(a.rows, PIECE, threads, [&](int64_t begin, int64_t end) { norm_backward_rows(a, begin, end); });
}

template <class T>
void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width, int threads) {
  share_rows(rows, PIECE, threads, [&](int64_t begin, int64_t end) { swiglu_rows(gate_up, y, width, begin, end); });
}

template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* out, int64_t rows, int64_t width, int threads) {
  share_rows(rows, PIECE, threads, [&](int64_t begin, int64_t end) { swiglu_backward_rows(gate_up, dy, out, width, begin, end); });
}

template <class T>
void softmax_residual(const SoftmaxArguments<T>& a, int threads) {
  share_rows(a.rows, PIECE, threads, [&](int64_t begin, int64_t end) { softmax_rows(a, begin, end); });
}

#define JZ3_INSTANTIATE(T)                                                     \
  template void rms_norm(const NormArguments<T>&, int);                        \
  template void rms_norm_backward(const NormBackwardArguments<T>&, int);       \
  template void swiglu(const T*, T*, int64_t, int64_t, int);                   \
  template void swiglu_backward(const T*, const T*, T*, int64_t, int64_t, int); \
  template void softmax_residual(const SoftmaxArguments<T>&, int);
JZ3_INSTANTIATE(float)
JZ3_INSTANTIATE(uint16_t)

#endif

}  // namespace jz3
