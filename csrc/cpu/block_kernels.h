// What files compiled for one vector unit offer to those that choose it. The kernels of cpu/block.cpp for one type of rows
// each do some rows, or one task of attention.
#pragma once

#include "cpu/ops.h"

#ifdef JZ3_BF16

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

// On AVX2: a segment of project_segments, and some rows of cross_entropy.
void project_segment_avx2(const SegmentsArguments& arguments, int64_t segment);
void cross_entropy_block_int16(const CrossEntropyArguments<float>& arguments, int64_t first, int64_t rows);

}  // namespace jz3

#endif
