// The CUDA kernels' launchers: device addresses and sizes, no Python and no torch. Each returns cudaSuccess or
// what the launch failed of; all work goes to the given stream.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

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

// scores[query][row] over codes of 1, 2, 4 or 8 bits (jz3/ops/score_topk.py). `fragments` holds the queries' planes in
// the order of the tensor cores' registers (jz3/ops/score_topk.py: fragments); row_bytes is a multiple of 16 and
// first_query, which the launcher sets, of 4.
struct ScoreCodes {
  const uint8_t* codes;
  const uint32_t* fragments;
  const double *step, *bias;
  const float* row_scale;
  float* scores;
  int64_t rows, row_bytes, queries, first_query;
  int bits;
  uint32_t levels[4];  // of a sub-byte code, one a byte
};
cudaError_t launch_score_codes(const ScoreCodes& arguments, cudaStream_t stream);

// Blocks of documents' gradients (csrc/cuda/segment_project.cu), laid out by jz3/ops/segment_plan.py. a [T, columns]
// and g [T, width] are bfloat16 or float16, 16-byte aligned with strides that are multiples of 8. left is
// [outputs, width] of the same type with rows of `stride_left` elements, a multiple of 8 (left 0); or packed signs
// [width, stride_left words], a multiple of 4 (left 1); or null, then outputs = width (left 2).
constexpr int SEGMENT_SLOTS = 128, SEGMENT_SLOTS_SM90 = 256;  // of a tile
struct SegmentProject {
  const uint16_t *a, *g;
  const void* left;
  float *out, *partial;    // [documents | partial blocks][outputs][columns]
  const int32_t* slots;    // [tiles * slots]: the token in every slot, -1 for none
  const int4* pieces;      // first slot, end, document or ~partial block, whether its sums end here
  const int32_t* tiles;    // [tiles + 1]: each tile's first piece
  const int32_t* groups;   // [groups + 1]: the first tile of every block of threads
  int64_t width, outputs, columns, stride_a, stride_g, stride_left;
  float scale;             // of g L
};
cudaError_t launch_segment_project(const SegmentProject& arguments, int left, bool bf16, int64_t groups,
                                   cudaStream_t stream);
// The same without left.
cudaError_t launch_segment_exact(const SegmentProject& arguments, bool bf16, int64_t groups, cudaStream_t stream);
// The same on sm_90a, for packed documents (the tokens of a piece follow each other), a dense left, scale 1 and
// tiles of SEGMENT_SLOTS_SM90 slots; `tokens` is T.
cudaError_t launch_segment_project_sm90(const SegmentProject& arguments, int64_t tokens, bool bf16, int64_t groups,
                                        cudaStream_t stream);

// out[documents[i]] = the sum of the partial blocks first[i] .. first[i + 1], each of `size` numbers.
struct SegmentSum {
  const float* partial;
  float* out;
  const int64_t *first, *documents;
  int64_t size;
};
cudaError_t launch_segment_sum(const SegmentSum& arguments, int64_t documents, cudaStream_t stream);

}  // namespace jz3
