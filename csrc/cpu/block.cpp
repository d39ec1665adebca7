// The parts of a Llama block between its products, forward and backward, each in one pass over memory: RMSNorm with the
// residual sum before it, attention, SiLU(gate) * up, and the softmax of the output layer. Rows are bfloat16 or float32,
// arithmetic is float32, results are rounded once.
#include <type_traits>

#include "cpu/bf16.h"
#include "cpu/block_kernels.h"
#include "cpu/ops.h"
#include "cpu/pool.h"

namespace jz3 {

#ifdef JZ3_BF16

namespace {

constexpr int64_t PIECE = 128;  // rows at a time

template <class T>
const BlockKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, uint16_t>)
    return block_bf16;
  else
    return vector_unit() == VectorUnit::avx512 ? block_avx512 : block_avx2;
}

}  // namespace

template <class T>
void rms_norm(const NormArguments<T>& a, int threads) {
  const int64_t row_bytes = a.width * int64_t(sizeof(T));
  const bool streamed = streams(a.y, a.rows * row_bytes, row_bytes) && reinterpret_cast<uintptr_t>(a.sum) % 64 == 0;
  share_rows(a.rows, PIECE, threads, [&](int64_t begin, int64_t end) { kernels<T>().norm(a, begin, end, streamed); });
}

template <class T>
void rms_norm_backward(const NormBackwardArguments<T>& a, int threads) {
  share_rows(a.rows, PIECE, threads, [&](int64_t begin, int64_t end) { kernels<T>().norm_backward(a, begin, end); });
}

template <class T>
void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width, int threads) {
  share_rows(rows, PIECE, threads, [&](int64_t begin, int64_t end) { kernels<T>().swiglu(gate_up, y, width, begin, end); });
}

template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* out, int64_t rows, int64_t width, int threads) {
  const auto piece = [&](int64_t begin, int64_t end) { kernels<T>().swiglu_backward(gate_up, dy, out, width, begin, end); };
  share_rows(rows, PIECE, threads, piece);
}

template <class T>
void softmax_residual(const SoftmaxArguments<T>& a, int threads) {
  share_rows(a.rows, PIECE, threads, [&](int64_t begin, int64_t end) { kernels<T>().softmax(a, begin, end); });
}

template <class T>
void attention(const AttentionArguments<T>& a, int threads) {
  share(a.texts * a.key_heads, threads, [&](int64_t i) { kernels<T>().attention(a, i); });
}

template <class T>
void attention_backward(const AttentionArguments<T>& a, int threads) {
  share(a.texts * a.key_heads, threads, [&](int64_t i) { kernels<T>().attention_backward(a, i); });
}

#define JZ3_INSTANTIATE(T)                                                     \
  template void rms_norm(const NormArguments<T>&, int);                        \
  template void rms_norm_backward(const NormBackwardArguments<T>&, int);       \
  template void swiglu(const T*, T*, int64_t, int64_t, int);                   \
  template void swiglu_backward(const T*, const T*, T*, int64_t, int64_t, int); \
  template void softmax_residual(const SoftmaxArguments<T>&, int);             \
  template void attention(const AttentionArguments<T>&, int);                  \
  template void attention_backward(const AttentionArguments<T>&, int);
JZ3_INSTANTIATE(float)
JZ3_INSTANTIATE(uint16_t)

#endif

}  // namespace jz3
