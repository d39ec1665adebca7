// The CUDA kernels' launchers: device addresses and sizes, no Python and no torch. Each returns cudaSuccess or
// what the launch failed of; all work goes to the given stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jz3 {

// partial[piece][row][projection] = sum over the piece's columns of x[row][column] * sign(projection, column);
// x is bfloat16 with rows of `stride` elements, 16-byte aligned, stride a multiple of 8.
struct SignProject {
  const uint16_t* x;
  float* partial;
  int64_t rows, columns, projections, stride;
  uint64_t key, first_block;
  int64_t piece;  // columns, a multiple of 128
};
cudaError_t launch_sign_project(const SignProject& arguments, cudaStream_t stream);

// scores[query][row] over codes of 4 or 8 bits (jz3/ops/score_topk.py). `fragments` holds the queries' planes in
// the order of the tensor cores' registers (jz3/ops/score_topk.py: fragments); row_bytes is a multiple of 16.
struct ScoreCodes {
  const uint8_t* codes;
  const uint32_t* fragments;
  const double *step, *bias;
  const float* row_scale;
  float* scores;
  int64_t rows, row_bytes, queries;
  int bits;
  uint32_t levels[4];  // 16 levels of a 4-bit code, one a byte
};
cudaError_t launch_score_codes(const ScoreCodes& arguments, cudaStream_t stream);

}  // namespace jz3
