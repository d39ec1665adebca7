// Scores of codes on the integer tensor cores (mma.sync m16n8k32, int8 in, int32 sums): exact.
//
// A block has 256 rows, a warp 32 of them, and up to 64 queries: its codes come from memory once for all of them,
// a step of 64 bytes of every row at a time (32 of 1-bit codes), with the queries' part of that step. cp.async brings
// both to shared memory some steps ahead. The order of coordinates is free, so a thread has 16 bytes of a row that lie
// side by side, and the queries are stored in the order in which threads meet their coordinates (`fragments` in
// jz3/ops/score_topk.py); neither needs swizzling. Codes become levels in registers, once for all queries, by
// byte permutations: the nibbles of 16 bits select four levels, which for 1- and 2-bit codes are those of every
// fourth or second code. The eight columns of a product are the two planes of four queries, and a thread has both of a
// query; it puts them together to one 64-bit integer, and the rest is float64 in the order of the definition. What is
// written, 4 bytes per row and query, is a small part of what is read; the best are picked from it outside, up to a
// million rows at a time.
//
// More than 64 queries are several layers of blocks. Those of the same rows follow each other, so that the codes
// come from L2 for all but the first.
//
// bytes: row_bytes + 4 Q per row; from L2 row_bytes per row and 64 queries, 2 K Q per 256 rows
// operations: 4 K Q per row; integer, per code and 64 queries: 1 (8 bits), 2 (4 bits), 0.9 (2 bits, 1 bit)
#include "cuda/tensor_cores.h"

namespace jz3 {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, MT = 2, ROWS = 16 * MT * WARPS;

// The sizes of a step for codes of so many bits and blocks of so many groups of four queries. All stages fit the
// 99 KiB of shared memory of the smallest device (8.6).
template <int BITS, int FOURS>
struct Shape {
  static constexpr int RUN = BITS == 1 ? 8 : 16;        // bytes of a row that a thread has
  static constexpr int BYTES = 4 * RUN;                 // of a row
  static constexpr int PRODUCTS = RUN / BITS;           // of 32 coordinates
  static constexpr int UNITS = PRODUCTS * 16;           // of 16 bytes, of four queries
  static constexpr int QUERIES_AT = ROWS * BYTES;       // in the stage
  static constexpr int STAGE = QUERIES_AT + FOURS * UNITS * 16;
  static constexpr int STAGES = BITS == 8 ? 4 : BITS == 4 ? 3 : 2;
};

__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// the bytes of a (0 .. 3) and b (4 .. 7) that the four low nibbles select; __byte_perm would mask them first
__device__ __forceinline__ uint32_t select(uint32_t a, uint32_t b, uint32_t nibbles) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(nibbles));
  return d;
}

// the levels of the code at the bottom of every nibble, of those in the low and in the high 16 bits
template <int BITS>
__device__ __forceinline__ void levels_of(uint32_t codes, const uint32_t (&table)[4], uint32_t& low, uint32_t& high) {
  const uint32_t index = codes & (BITS == 1 ? 0x11111111u : BITS == 2 ? 0x33333333u : 0x77777777u);
  if constexpr (BITS < 4) {
    low = select(table[0], 0, index);
    high = select(table[0], 0, index >> 16);
  } else {
    const uint32_t upper = ((codes >> 1) & 0x44444444u) | 0x32103210u;  // whether the level is one of the last eight
    low = select(select(table[0], table[1], index), select(table[2], table[3], index), upper);
    high = select(select(table[0], table[1], index >> 16), select(table[2], table[3], index >> 16), upper >> 16);
  }
}

template <int BITS, int FOURS>
__device__ __forceinline__ void score(const ScoreCodes& p) {
  using S = Shape<BITS, FOURS>;
  constexpr int WORDS = S::RUN / 4;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t layers = gridDim.x / uint32_t((p.rows + ROWS - 1) / ROWS);
  const int64_t first_row = int64_t(blockIdx.x / layers) * ROWS;
  const int64_t first_four = p.first_query / 4 + blockIdx.x % layers * FOURS, fours = (p.queries + 3) / 4;
  const int height = int(first_row + ROWS < p.rows ? ROWS : p.rows - first_row);
  const int units = (fours - first_four < FOURS ? int(fours - first_four) : FOURS) * S::UNITS;
  const int steps = int((p.row_bytes + S::BYTES - 1) / S::BYTES);

  constexpr int IN_ROW = S::BYTES / 16, AT_ONCE = THREADS / IN_ROW;  // rows that are copied at once
  const int row = threadIdx.x / IN_ROW, in_row = threadIdx.x % IN_ROW * 16;
  const uint8_t* codes = p.codes + (first_row + row) * p.row_bytes + in_row;
  const uint4* fragments = reinterpret_cast<const uint4*>(p.fragments) + first_four * S::UNITS;
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % S::STAGES * S::STAGE;
      const int byte = step * S::BYTES;
      const uint4* queries = fragments + step * fours * S::UNITS;
#pragma unroll
      for (int i = 0; i < ROWS / AT_ONCE; ++i) {
        const bool inside = row + i * AT_ONCE < height && byte + in_row < p.row_bytes;
        cp_async16(stage + (i * THREADS + threadIdx.x) * 16,
                   inside ? codes + i * AT_ONCE * p.row_bytes + byte : p.codes, inside ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < FOURS * S::UNITS; i += THREADS) {
        const int unit = i + threadIdx.x;
        const bool inside = unit < units;
        if (FOURS * S::UNITS % THREADS == 0 || unit < FOURS * S::UNITS)
          cp_async16(stage + S::QUERIES_AT + unit * 16, inside ? queries + unit : queries, inside ? 16 : 0);
      }
    }
    cp_async_commit();
  };

  const uint32_t table[4] = {p.levels[0], p.levels[1], p.levels[2], p.levels[3]};
  int acc[MT][FOURS][4] = {};
#pragma unroll
  for (int step = 0; step < S::STAGES - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::STAGES - 2>();
    __syncthreads();
    load(step + S::STAGES - 1);
    const uint8_t* stage = shared + step % S::STAGES * S::STAGE;
    uint32_t word[MT][2][WORDS];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint8_t* run = stage + (warp * 16 * MT + m * 16 + h * 8 + g) * S::BYTES + t * S::RUN;
        if constexpr (S::RUN == 16) {
          const uint4 x = *reinterpret_cast<const uint4*>(run);
          word[m][h][0] = x.x, word[m][h][1] = x.y, word[m][h][2] = x.z, word[m][h][3] = x.w;
        } else {
          const uint2 x = *reinterpret_cast<const uint2*>(run);
          word[m][h][0] = x.x, word[m][h][1] = x.y;
        }
      }
    const uint4* query = reinterpret_cast<const uint4*>(stage + S::QUERIES_AT) + lane;
#pragma unroll
    for (int pair = 0; pair < S::PRODUCTS / 2; ++pair) {
      uint32_t a[2][MT][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int product = 2 * pair + i;
            if constexpr (BITS < 8) {
              constexpr int IN_WORD = S::PRODUCTS / WORDS;
              const uint32_t codes = word[m][h][product / IN_WORD] >> (product % IN_WORD * BITS);
              levels_of<BITS>(codes, table, a[i][m][h], a[i][m][h + 2]);
            } else {
              a[i][m][h] = word[m][h][2 * product] ^ 0x80808080u;
              a[i][m][h + 2] = word[m][h][2 * product + 1] ^ 0x80808080u;
            }
          }
#pragma unroll
      for (int four = 0; four < FOURS; ++four) {
        const uint4 b = query[four * S::UNITS + pair * 32];
#pragma unroll
        for (int m = 0; m < MT; ++m) mma(acc[m][four], a[0][m], b.x, b.y);
#pragma unroll
        for (int m = 0; m < MT; ++m) mma(acc[m][four], a[1][m], b.z, b.w);
      }
    }
  }
#pragma unroll
  for (int four = 0; four < FOURS; ++four) {
    const int64_t query = (first_four + four) * 4 + t;
    if (query >= p.queries) break;
    const double step = p.step[query], bias = p.bias[query];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const long long dot = (long long)acc[m][four][2 * h] * 128 + acc[m][four][2 * h + 1];
        const int64_t r = first_row + warp * 16 * MT + m * 16 + h * 8 + g;
        if (r < p.rows) {
          const double inner = __dadd_rn(__dmul_rn(double(dot), step), bias);
          p.scores[query * p.rows + r] = float(__dmul_rn(double(p.row_scale[r]), inner));
        }
      }
  }
}

}  // namespace

#define JZ3_SCORE(BITS, QUERIES)                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) jz3_score_##BITS##bit_##QUERIES(ScoreCodes p) { \
    score<BITS, QUERIES / 4>(p);                                                                        \
  }
JZ3_SCORE(1, 4)
JZ3_SCORE(1, 16)
JZ3_SCORE(1, 64)
JZ3_SCORE(2, 4)
JZ3_SCORE(2, 16)
JZ3_SCORE(2, 64)
JZ3_SCORE(4, 4)
JZ3_SCORE(4, 16)
JZ3_SCORE(4, 64)
JZ3_SCORE(8, 4)
JZ3_SCORE(8, 16)
JZ3_SCORE(8, 64)
#undef JZ3_SCORE

namespace {

template <int BITS, int FOURS>
cudaError_t launch(void (*kernel)(ScoreCodes), const ScoreCodes& p, int64_t layers, cudaStream_t stream) {
  using S = Shape<BITS, FOURS>;
  constexpr int bytes = S::STAGES * S::STAGE;
  static_assert(bytes <= 99 * 1024, "the shared memory of a block of the smallest device");
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (p.rows + ROWS - 1) / ROWS;
  kernel<<<unsigned(tiles * layers), THREADS, size_t(bytes), stream>>>(p);
  return cudaGetLastError();
}

// Layers of 64 queries, and one of 4 or 16 for what is left if no more than that are.
template <int BITS>
cudaError_t launch(void (*kernel4)(ScoreCodes), void (*kernel16)(ScoreCodes), void (*kernel64)(ScoreCodes),
                   ScoreCodes p, cudaStream_t stream) {
  const int64_t layers = (p.queries + 47) / 64;
  if (layers) {
    const cudaError_t error = launch<BITS, 16>(kernel64, p, layers, stream);
    if (error != cudaSuccess || 64 * layers >= p.queries) return error;
  }
  p.first_query = 64 * layers;
  return p.queries - p.first_query <= 4 ? launch<BITS, 1>(kernel4, p, 1, stream)
                                        : launch<BITS, 4>(kernel16, p, 1, stream);
}

}  // namespace

cudaError_t launch_score_codes(const ScoreCodes& p, cudaStream_t stream) {
  switch (p.bits) {
    case 1: return launch<1>(jz3_score_1bit_4, jz3_score_1bit_16, jz3_score_1bit_64, p, stream);
    case 2: return launch<2>(jz3_score_2bit_4, jz3_score_2bit_16, jz3_score_2bit_64, p, stream);
    case 4: return launch<4>(jz3_score_4bit_4, jz3_score_4bit_16, jz3_score_4bit_64, p, stream);
    default: return launch<8>(jz3_score_8bit_4, jz3_score_8bit_16, jz3_score_8bit_64, p, stream);
  }
}

}  // namespace jz3
