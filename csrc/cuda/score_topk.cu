// Scores of codes on the integer tensor cores (mma.sync m16n8k32, int8 in, int32 sums): exact.
//
// A warp has 32 rows. Each thread reads 16 bytes of a row at a time, straight into the registers of the product:
// the order of coordinates is free, so the queries are stored in the order in which a thread meets them. 4-bit
// codes become levels by three byte permutations per four coordinates, 1- and 2-bit codes by one after their bits
// are spread. The eight columns of a product are the two planes of four queries, and a thread has both of a query;
// it puts them together to one 64-bit integer, and the rest is float64 in the order of the definition. What is
// written, 4 bytes per row and query, is a small part of what is read; the best are picked from it outside, a
// million rows at a time.
//
// bytes: row_bytes + 4 Q per row and four queries      operations: 4 K Q per row, 1.5 integer per 4-bit code
#include "cuda/launch.h"

namespace jz3 {
namespace {

constexpr int WARPS = 4, MT = 2;

__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// the levels of the four codes in the low 4 * BITS bits
template <int BITS>
__device__ __forceinline__ uint32_t levels_of(uint32_t codes, const uint32_t (&table)[4]) {
  if (BITS == 1) {
    const uint32_t pairs = (codes & 0x3u) | (codes & 0xCu) << 6;
    return __byte_perm(table[0], 0, (pairs | pairs << 3) & 0x1111u);
  }
  if (BITS == 2) {
    const uint32_t pairs = (codes & 0xFu) | (codes & 0xF0u) << 4;
    return __byte_perm(table[0], 0, (pairs | pairs << 2) & 0x3333u);
  }
  const uint32_t index = codes & 0x7777u;
  const uint32_t low = __byte_perm(table[0], table[1], index), high = __byte_perm(table[2], table[3], index);
  return __byte_perm(low, high, 0x3210u + ((codes & 0x8888u) >> 1));
}

__device__ __forceinline__ uint4 load16(const uint8_t* row, int64_t byte, int64_t row_bytes) {
  if (row == nullptr || byte >= row_bytes) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(row + byte);
}

template <int BITS>
__device__ __forceinline__ void score(const ScoreCodes& p) {
  constexpr int PRODUCTS = 16 / BITS;  // per 64 bytes of a row
  constexpr int IN_WORD = BITS == 8 ? 1 : PRODUCTS / 4;  // products of one word of codes
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int64_t first_row = (int64_t(blockIdx.x) * WARPS + warp) * 16 * MT;
  const int64_t four = blockIdx.y, steps = (p.row_bytes + 63) / 64;
  const uint8_t* row[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = first_row + m * 16 + h * 8 + g;
      row[m][h] = r < p.rows ? p.codes + r * p.row_bytes : nullptr;
    }
  const uint32_t table[4] = {p.levels[0], p.levels[1], p.levels[2], p.levels[3]};
  const uint2* fragment = reinterpret_cast<const uint2*>(p.fragments) + four * steps * PRODUCTS * 32 + lane;
  int acc[MT][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    uint32_t word[MT][2][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 x = load16(row[m][h], step * 64 + t * 16, p.row_bytes);
        word[m][h][0] = x.x, word[m][h][1] = x.y, word[m][h][2] = x.z, word[m][h][3] = x.w;
      }
#pragma unroll
    for (int product = 0; product < PRODUCTS; ++product) {
      const uint2 b = fragment[(step * PRODUCTS + product) * 32];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (BITS < 8) {
            const uint32_t codes = word[m][h][product / IN_WORD] >> (product % IN_WORD * 8 * BITS);
            a[h] = levels_of<BITS>(codes, table);
            a[h + 2] = levels_of<BITS>(codes >> (4 * BITS), table);
          } else {
            a[h] = word[m][h][2 * product] ^ 0x80808080u;
            a[h + 2] = word[m][h][2 * product + 1] ^ 0x80808080u;
          }
        mma(acc[m], a, b.x, b.y);
      }
    }
  }
  const int64_t query = four * 4 + t;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const long long dot = (long long)acc[m][2 * h] * 128 + acc[m][2 * h + 1];
      const int64_t r = first_row + m * 16 + h * 8 + g;
      if (r < p.rows && query < p.queries) {
        const double inner = __dadd_rn(__dmul_rn(double(dot), p.step[query]), p.bias[query]);
        p.scores[query * p.rows + r] = float(__dmul_rn(double(p.row_scale[r]), inner));
      }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS) jz3_score_1bit(ScoreCodes p) { score<1>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) jz3_score_2bit(ScoreCodes p) { score<2>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) jz3_score_4bit(ScoreCodes p) { score<4>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) jz3_score_8bit(ScoreCodes p) { score<8>(p); }

cudaError_t launch_score_codes(const ScoreCodes& p, cudaStream_t stream) {
  const int64_t height = 16 * MT * WARPS;
  const dim3 grid(unsigned((p.rows + height - 1) / height), unsigned((p.queries + 3) / 4));
  const auto kernel = p.bits == 1   ? jz3_score_1bit
                      : p.bits == 2 ? jz3_score_2bit
                      : p.bits == 4 ? jz3_score_4bit
                                    : jz3_score_8bit;
  kernel<<<grid, 32 * WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace jz3
