// out[s][r] = sum_c x[s][c] * sign(r, c) on the tensor cores (mma.sync m16n8k16, bfloat16 in, float32 sums).
//
// A block has up to 128 rows and 256 projections and walks over its piece of the columns, 128 at a time: cp.async
// brings the next rows to shared memory (unit u of 16 bytes of row r lies at u ^ (r mod 8)) while the tensor cores
// work on these. A projection's 128 signs are one Philox call, made once for all rows. Their bits are put in the
// order in which threads need them: thread t of a quad has columns 8u + 2t, 8u + 2t + 1 of the 16 units u, in one
// word, the two of a unit 16 bits apart, so that one shift and one three-input logic operation make them two signed
// ones.
//
// A grid layer is one piece of the columns; the pieces' sums are added outside, in order.
//
// bytes: 2 S P per 256 projections      flops: 2 S P k      generator: P k / 128 calls per 128 rows
#include "common/philox.h"
#include "cuda/tensor_cores.h"

namespace jz3 {
namespace {

constexpr int BLOCK = 128, PROJECTIONS = 256, NT = 8;  // columns, projections of a block, projections / 8 of a warp
constexpr int WARPS_N = PROJECTIONS / (8 * NT);

// bytes of a stage: rows of 128 columns, four words of signs for each projection
template <int ROWS>
constexpr int SIGNS_AT = ROWS * BLOCK * 2;
template <int ROWS>
constexpr int STAGE_BYTES = SIGNS_AT<ROWS> + PROJECTIONS * 16;

// swaps the bits `mask << shift` of a with the bits `mask` of b
__device__ __forceinline__ void exchange(uint32_t& a, uint32_t& b, int shift, uint32_t mask) {
  const uint32_t differ = ((a >> shift) ^ b) & mask;
  b ^= differ;
  a ^= differ << shift;
}

// Bit 8b + 2t + e of word w (column 32w + 8b + 2t + e) comes to word t, bit (b >> 1) + 2w + 8 (b & 1) + 16e.
__device__ __forceinline__ uint4 by_thread(Words x) {
  exchange(x.word[0], x.word[1], 2, 0x33333333u);
  exchange(x.word[2], x.word[3], 2, 0x33333333u);
  exchange(x.word[0], x.word[2], 4, 0x0F0F0F0Fu);
  exchange(x.word[1], x.word[3], 4, 0x0F0F0F0Fu);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const uint32_t differ = ((x.word[t] >> 15) ^ x.word[t]) & 0x0000AAAAu;
    x.word[t] ^= differ ^ (differ << 15);
  }
  return make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}

// MT * 16 rows a warp, WARPS_M warps of rows
template <int MT, int WARPS_M>
__device__ __forceinline__ void project(const SignProject& p) {
  constexpr int THREADS = 32 * WARPS_M * WARPS_N, ROWS = 16 * MT * WARPS_M, STAGE = STAGE_BYTES<ROWS>;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  const int64_t first_row = int64_t(blockIdx.y) * ROWS, first_projection = int64_t(blockIdx.x) * PROJECTIONS;
  const int64_t begin = int64_t(blockIdx.z) * p.piece;
  const int width = int(begin + p.piece < p.columns ? p.piece : p.columns - begin);  // of this piece
  const int height = int(first_row + ROWS < p.rows ? ROWS : p.rows - first_row);  // of this block
  const int blocks = (width + BLOCK - 1) / BLOCK;

  const uint16_t* x_block = p.x + first_row * p.stride + begin;
  auto load = [&](int block) {
    const int unit = threadIdx.x & 15, column = block * BLOCK + unit * 8;
    const int bytes = column >= width ? 0 : column + 8 <= width ? 16 : 2 * (width - column);
#pragma unroll 2  // more would take registers for addresses
    for (int row = threadIdx.x >> 4; row < ROWS; row += THREADS / 16) {
      const int take = row < height ? bytes : 0;
      cp_async16(base + (block & 1) * STAGE + row * 256 + ((unit ^ (row & 7)) << 4),
                 take ? x_block + row * p.stride + column : p.x, take);
    }
    cp_async_commit();
  };
  auto generate = [&](int block) {
    const uint64_t column_block = p.first_block + uint64_t(begin) / BLOCK + block;
#pragma unroll 1
    for (int i = threadIdx.x; i < PROJECTIONS; i += THREADS)
      *reinterpret_cast<uint4*>(shared + (block & 1) * STAGE + SIGNS_AT<ROWS> + i * 16) =
          by_thread(philox(p.key, column_block, uint64_t(first_projection + i)));
  };

  float acc[MT][NT][4] = {};
  load(0);
  generate(0);
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    __syncthreads();
    if (block + 1 < blocks) {
      load(block + 1);
      generate(block + 1);
    }
    const uint32_t rows = base + (block & 1) * STAGE;
    const uint8_t* signs = shared + (block & 1) * STAGE + SIGNS_AT<ROWS>;
    uint32_t bits[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n)
      bits[n] = *reinterpret_cast<const uint32_t*>(signs + (warp_n * 8 * NT + n * 8 + g) * 16 + t * 4);
#pragma unroll 1  // 64 columns at a time: unrolled further it would take too many registers
    for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {  // of 16 columns
        uint32_t x[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint32_t row = (warp_m * MT + m) * 16 + (lane & 15), at = 2 * s + (lane >> 4);
          ldmatrix(x[m], rows + half * 128 + row * 256 + ((at ^ (row & 7)) << 4));
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint32_t y0 = ((bits[n] << (15 - s)) & 0x80008000u) ^ Bf16::ONES;
          const uint32_t y1 = ((bits[n] << (7 - s)) & 0x80008000u) ^ Bf16::ONES;
#pragma unroll
          for (int m = 0; m < MT; ++m) Bf16::mma(acc[m][n], x[m], y0, y1);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) bits[n] >>= 4;
    }
  }
  float* out = p.partial + int64_t(blockIdx.z) * p.rows * p.projections;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = first_row + (warp_m * MT + m) * 16 + (i >> 1) * 8 + g;
        const int64_t c = first_projection + (warp_n * NT + n) * 8 + t * 2 + (i & 1);
        if (r < p.rows && c < p.projections) out[r * p.projections + c] = acc[m][n][i];
      }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) jz3_sign_project_16(SignProject p) { project<1, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) jz3_sign_project_64(SignProject p) { project<4, 1>(p); }
extern "C" __global__ void __launch_bounds__(256) jz3_sign_project_128(SignProject p) { project<4, 2>(p); }

cudaError_t launch_sign_project(const SignProject& p, cudaStream_t stream) {
  const int height = p.rows <= 16 ? 16 : p.rows <= 64 ? 64 : 128;
  const auto kernel = height == 16 ? jz3_sign_project_16 : height == 64 ? jz3_sign_project_64 : jz3_sign_project_128;
  const int bytes = 2 * (height == 16 ? STAGE_BYTES<16> : height == 64 ? STAGE_BYTES<64> : STAGE_BYTES<128>);
  const dim3 grid(unsigned((p.projections + PROJECTIONS - 1) / PROJECTIONS),
                  unsigned((p.rows + height - 1) / height), unsigned((p.columns + p.piece - 1) / p.piece));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, height == 128 ? 256 : 128, size_t(bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace jz3
