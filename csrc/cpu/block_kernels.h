// The kernels of cpu/block.cpp for one type of rows: each does some rows, or one task of attention.
#pragma once

#include "cpu/ops.h"

namespace jz3 {

template <class T>
struct BlockKernels {
  void (*norm)(const NormArguments<T>&, int64_t begin, int64_t end, bool streamed);
  void (*norm_backward)(const NormBackwardArguments<T>&, int64_t begin, int64_t end);
  void (*swiglu)(const T* gate_up, T* y, int64_t width, int64_t begin, int64_t end);
  void (*swiglu_backward)(const T* gate_up, const T* dy, T* out, int64_t width, int64_t begin, int64_t end);
  void (*softmax)(const SoftmaxArguments<T>&, int64_t begin, int64_t end);
  void (*attention)(const AttentionArguments<T>&, int64_t task);
  void (*attention_backward)(const AttentionArguments<T>&, int64_t task);
};

extern const BlockKernels<float> block_avx2, block_avx512;
extern const BlockKernels<uint16_t> block_bf16;

}  // namespace jz3
