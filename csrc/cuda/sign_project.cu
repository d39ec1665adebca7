// out[s][r] = sum_c x[s][c] * sign(r, c) on the tensor cores (mma.sync m16n8k16, bfloat16 in, float32 sums).
//
// The signs live in registers only. A product's columns may be taken in any order, so they are ordered for the
// generator: of 128 columns, thread t of a quad takes 32t .. 32t+31, whose signs for one projection are word t
// of one Philox call. Each thread makes one call (projection 8t + g of 32) and the quad exchanges words: 128
// columns x 32 projections cost one call and three shuffles a thread. Bits i and i + 16 of a word are moved to
// the sign bits of two packed ones by one shift and one three-input logic operation.
//
// A warp has 16 * MT rows and 32 projections, a block four warps (128 projections), a grid layer one piece of the
// columns; the pieces' sums are added outside, in order. Rows come straight from memory: the four warps share
// them in the L1 cache.
//
// bytes: 2 S P per 128 projections      flops: 2 S P k      generator: P k / 128 calls per 16 * MT rows
#include "common/philox.h"
#include "cuda/launch.h"

namespace jz3 {
namespace {

constexpr int WARPS = 4, NT = 4, BLOCK = 128;
constexpr uint32_t ONES = 0x3F803F80u;  // two bfloat16 ones

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// eight values of a row from `column`, zeros beyond `columns`
__device__ __forceinline__ uint4 load8(const uint16_t* row, int64_t column, int64_t columns) {
  if (row == nullptr || column >= columns) return make_uint4(0, 0, 0, 0);
  if (column + 8 <= columns) return *reinterpret_cast<const uint4*>(row + column);
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < columns) word[i / 2] |= uint32_t(row[column + i]) << (16 * (i % 2));
  return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ uint32_t pick(const Words& w, int i) {
  const uint32_t low = i & 1 ? w.word[1] : w.word[0], high = i & 1 ? w.word[3] : w.word[2];
  return i & 2 ? high : low;
}

// word t of the calls of all threads of the quad: bits[j] is that of thread j
__device__ __forceinline__ void exchange(const Words& own, int t, uint32_t (&bits)[NT]) {
  uint32_t got[NT];  // got[d] comes from thread t ^ d
  got[0] = pick(own, t);
#pragma unroll
  for (int d = 1; d < 4; ++d) got[d] = __shfl_xor_sync(0xffffffffu, pick(own, t ^ d), d);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int d = j ^ t;
    const uint32_t low = d & 1 ? got[1] : got[0], high = d & 1 ? got[3] : got[2];
    bits[j] = d & 2 ? high : low;
  }
}

template <int MT>
__device__ __forceinline__ void project(const SignProject& p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int64_t first_row = int64_t(blockIdx.y) * 16 * MT;
  const int64_t first_projection = (int64_t(blockIdx.x) * WARPS + warp) * 8 * NT;
  const int64_t begin = int64_t(blockIdx.z) * p.piece;
  const int64_t end = begin + p.piece < p.columns ? begin + p.piece : p.columns;
  const uint16_t* row[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = first_row + m * 16 + h * 8 + g;
      row[m][h] = r < p.rows ? p.x + r * p.stride : nullptr;
    }
  float acc[MT][NT][4] = {};
  for (int64_t column = begin; column < end; column += BLOCK) {
    const Words own = philox(p.key, p.first_block + uint64_t(column) / BLOCK, uint64_t(first_projection + t * 8 + g));
    uint32_t bits[NT];
    exchange(own, t, bits);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = column + 32 * t + 8 * half;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        uint32_t low[2][4], high[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 x = load8(row[m][h], at, p.columns), y = load8(row[m][h], at + 16, p.columns);
          low[h][0] = x.x, low[h][1] = x.y, low[h][2] = x.z, low[h][3] = x.w;
          high[h][0] = y.x, high[h][1] = y.y, high[h][2] = y.z, high[h][3] = y.w;
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t a[4] = {
              __byte_perm(low[0][s], high[0][s], 0x5410), __byte_perm(low[1][s], high[1][s], 0x5410),
              __byte_perm(low[0][s], high[0][s], 0x7632), __byte_perm(low[1][s], high[1][s], 0x7632)};
          const int shift = 15 - 8 * half - 2 * s;
#pragma unroll
          for (int n = 0; n < NT; ++n)
            mma(acc[m][n], a, ((bits[n] << shift) & 0x80008000u) ^ ONES,
                ((bits[n] << (shift - 1)) & 0x80008000u) ^ ONES);
        }
      }
    }
  }
  float* out = p.partial + int64_t(blockIdx.z) * p.rows * p.projections;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = first_row + m * 16 + (i >> 1) * 8 + g;
        const int64_t c = first_projection + n * 8 + t * 2 + (i & 1);
        if (r < p.rows && c < p.projections) out[r * p.projections + c] = acc[m][n][i];
      }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS) jz3_sign_project_16(SignProject p) { project<1>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) jz3_sign_project_64(SignProject p) { project<4>(p); }

cudaError_t launch_sign_project(const SignProject& p, cudaStream_t stream) {
  const bool small = p.rows <= 16;
  const int64_t height = small ? 16 : 64;
  const dim3 grid(unsigned((p.projections + 8 * NT * WARPS - 1) / (8 * NT * WARPS)),
                  unsigned((p.rows + height - 1) / height), unsigned((p.columns + p.piece - 1) / p.piece));
  (small ? jz3_sign_project_16 : jz3_sign_project_64)<<<grid, 32 * WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace jz3
