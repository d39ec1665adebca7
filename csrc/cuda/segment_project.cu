// out[i] = sum over the tokens t of document i of (L^T g_t) a_t^T on the tensor cores (mma.sync, cp.async): sm_80
// and later. The kernel for sm_90a with TMA and wgmma is in segment_project_sm90.cu, the one without L in
// segment_exact.cu.
//
// A block takes tiles of 128 slots. A slot is a token or empty; a document's tokens begin at a multiple of 16
// slots, so that its sums are formed in the same order whatever it is packed with, and several short documents
// share a tile. For a tile, g L is formed 64 columns of g at a time in registers, rounded to half precision,
// kept in shared memory, and then every document's outer product with a is added in registers. A document that
// goes on in the block's next tile keeps its sums; one that has several blocks leaves partial sums, which a
// second kernel adds in order.
//
// The stages of the pipeline are three buffers of shared memory: columns of g with their rows of L, then a, while
// the third takes g L. All tiles in shared memory are swizzled: unit u of 16 bytes of row r lies at u ^ (r mod 8).
//
// In float16, g L must stay below 65,504, as in torch's product of float16 matrices.
//
// bytes: g and a once per 128 columns of L (they come from L2 then) and 128 columns of a
// flops: 2 T O Q + 2 T Q P
#include "cuda/tensor_cores.h"

namespace jz3 {
namespace {

constexpr int THREADS = 256, SLOTS = SEGMENT_SLOTS, COLUMNS = 64, STAGES = 3;

enum Left { DENSE, SIGNS };

// bytes of a stage: 64 columns of g and 64 rows of L, or a's tile, or the tile of g L
template <int B>
constexpr int STAGE_BYTES = (SLOTS + B) * COLUMNS * 2;

// B x B outputs a block
template <class T, int LEFT, int B>
__device__ __forceinline__ void segment_project(const SegmentProject& p) {
  constexpr int STAGE = STAGE_BYTES<B>;
  constexpr int NT = B / 16;  // columns / 8 of a warp, in both products
  constexpr int UNITS = B / 8;  // of a row of the tiles of a and g L
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane >> 2, t = lane & 3;
  const int warp_m = warp >> 1, warp_n = warp & 1;
  const int64_t q_tiles = (p.outputs + B - 1) / B, p_tiles = (p.columns + B - 1) / B;
  const int64_t group = blockIdx.x / (q_tiles * p_tiles), part = blockIdx.x % (q_tiles * p_tiles);
  const int64_t q0 = part % q_tiles * B, p0 = part / q_tiles * B;
  const int blocks = int((p.width + COLUMNS - 1) / COLUMNS);
  OuterProduct<T, B, B> outer;

  for (int tile = p.groups[group]; tile < p.groups[group + 1]; ++tile) {
    const int32_t* slots = p.slots + int64_t(tile) * SLOTS;
    auto buffer = [&](int block) { return base + (block % STAGES) * STAGE; };
    auto following = [&](uint32_t stage) { return stage == base + (STAGES - 1) * STAGE ? base : stage + STAGE; };
    // B columns of a for all slots
    auto load_a = [&](uint32_t to) {
      const uint32_t unit = threadIdx.x % UNITS;
      const int bytes = bytes_left(p.columns - p0 - unit * 8);
      for (uint32_t row = threadIdx.x / UNITS; row < SLOTS; row += THREADS / UNITS) {
        const int token = slots[row];
        const int take = token < 0 ? 0 : bytes;
        cp_async16(to + row * (B * 2) + ((unit ^ (row & 7)) << 4),
                   take ? p.a + int64_t(token) * p.stride_a + p0 + unit * 8 : p.a, take);
      }
    };

    const uint32_t a_tile = buffer(blocks), rows_tile = buffer(blocks + 1);
    // What this thread copies of a block of columns: 16 bytes of the rows row + 32 i of g, and of a dense L. A row
    // that is empty or beyond L has no bytes; where no byte is taken, the address is not looked at.
    const uint32_t row = threadIdx.x >> 3, unit = threadIdx.x & 7;
    const uint32_t place = row * 128 + ((unit ^ (row & 7)) << 4);
    const uint16_t* source[SLOTS / 32];
    int bytes[SLOTS / 32];
#pragma unroll
    for (int i = 0; i < SLOTS / 32; ++i) {
      const int token = slots[row + 32 * i];
      source[i] = p.g + int64_t(max(token, 0)) * p.stride_g + unit * 8;
      bytes[i] = token < 0 ? 0 : 16;
    }
    int64_t columns = p.width - unit * 8;  // of g, from this thread's next ones on
    const uint16_t* left = static_cast<const uint16_t*>(p.left) + (q0 + row) * p.stride_left + unit * 8;
    const int outputs = int(min(p.outputs - q0 - row, int64_t(B)));
    // or 128 signs of a row of L
    const int64_t word = q0 / 128 * 4;
    const uint32_t* signs = static_cast<const uint32_t*>(p.left) + int64_t(threadIdx.x) * p.stride_left + word;
    const int sign_bytes = int(min(4 * ((p.outputs + 31) / 32 - word), int64_t(16)));
    int64_t sign_rows = p.width - threadIdx.x;
    auto load_columns = [&](uint32_t to) {
      const int most = bytes_left(columns);
      const uint32_t to_left = to + SLOTS * COLUMNS * 2;
#pragma unroll
      for (int i = 0; i < SLOTS / 32; ++i) {
        cp_async16(to + place + i * 32 * 128, source[i], min(bytes[i], most));
        source[i] += COLUMNS;
      }
      columns -= COLUMNS;
      if (LEFT == DENSE) {
#pragma unroll
        for (int i = 0; i < B / 32; ++i)
          cp_async16(to_left + place + i * 32 * 128, left + i * 32 * p.stride_left, outputs > 32 * i ? most : 0);
        left += COLUMNS;
      } else {
        if (threadIdx.x < COLUMNS) cp_async16(to_left + threadIdx.x * 16, signs, sign_rows > 0 ? sign_bytes : 0);
        signs += COLUMNS * p.stride_left;
        sign_rows -= COLUMNS;
      }
    };

    float rows[2][NT][4] = {};  // 32 slots x 8 NT outputs of g L
    // A step of 16 columns flips bits of the swizzled addresses in `stage`, a multiple of 128.
    const uint32_t x_row = warp_m * 32 + (lane & 15), y_row = warp_n * (8 * NT) + (lane & 7) + ((lane >> 4) << 3);
    const uint32_t x_place = x_row * 128 + (((lane >> 4) ^ (x_row & 7)) << 4);
    const uint32_t y_place = SLOTS * COLUMNS * 2 + y_row * 128 + ((((lane >> 3) & 1) ^ (y_row & 7)) << 4);
    auto multiply = [&](uint32_t stage) {
#pragma unroll
      for (int k = 0; k < COLUMNS; k += 16) {
        uint32_t x[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ldmatrix(x[m], ((stage + x_place) ^ (k * 2)) + m * 16 * 128);
        if (LEFT == DENSE) {
#pragma unroll
          for (int n = 0; n < NT; n += 2) {
            uint32_t y[4];
            ldmatrix(y, ((stage + y_place) ^ (k * 2)) + n * 8 * 128);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              T::mma(rows[m][n], x[m], y[0], y[1]);
              T::mma(rows[m][n + 1], x[m], y[2], y[3]);
            }
          }
        } else {
          // bits i of two rows of L come to bit i and i + 16 of a word; a shift makes them two signs
          const uint8_t* bits = shared + (stage - base) + SLOTS * COLUMNS * 2 + (k + 2 * t) * 16 + (q0 % 128) / 8 +
                                warp_n * NT;
#pragma unroll
          for (int word = 0; word < NT / 4; ++word) {
            uint32_t pair[2][2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint8_t* at = bits + h * 8 * 16 + word * 4;
              const uint32_t even = *reinterpret_cast<const uint32_t*>(at);
              const uint32_t odd = *reinterpret_cast<const uint32_t*>(at + 16);
              pair[h][0] = __byte_perm(even, odd, 0x5410), pair[h][1] = __byte_perm(even, odd, 0x7632);
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const int shift = 15 - 8 * (n & 1) - quad;
              const uint32_t y0 = ((pair[0][n >> 1] << shift) & 0x80008000u) ^ T::ONES;
              const uint32_t y1 = ((pair[1][n >> 1] << shift) & 0x80008000u) ^ T::ONES;
#pragma unroll
              for (int m = 0; m < 2; ++m) T::mma(rows[m][word * 4 + n], x[m], y0, y1);
            }
          }
        }
      }
    };

    // Loads are two steps ahead of their use: blocks of columns, then a's tile, which the last step but one
    // loads, so that the loop holds no code for it.
    static_assert(STAGES == 3, "loads are two steps ahead");
    load_columns(base);
    cp_async_commit();
    if (blocks > 1) load_columns(base + STAGE);
    cp_async_commit();
    uint32_t stage = base, free = base + 2 * STAGE;
    for (int block = 2; block < blocks; ++block) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load_columns(free);
      cp_async_commit();
      multiply(stage);
      stage = following(stage), free = following(free);
    }
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_a(a_tile);
    cp_async_commit();
    multiply(stage);
    if (blocks > 1) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      multiply(following(stage));
    }
    // nobody reads this buffer: its columns were used up before the last barrier
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t row = warp_m * 32 + m * 16 + h * 8 + quad, unit = warp_n * NT + n;
          const uint32_t pair = T::pack(rows[m][n][2 * h] * p.scale, rows[m][n][2 * h + 1] * p.scale);
          *reinterpret_cast<uint32_t*>(shared + (rows_tile - base) + row * (B * 2) +
                                       ((unit ^ (row & 7)) << 4) + t * 4) = pair;
        }
    cp_async_wait<0>();
    __syncthreads();

    for (int i = p.tiles[tile]; i < p.tiles[tile + 1]; ++i) {
      const int4 piece = p.pieces[i];  // first slot, end, where to, whether the sums are complete
      for (int k = piece.x; k < piece.y; k += 16) outer.add(rows_tile, a_tile, k);
      if (piece.w) outer.store(p, piece.z, q0, p0);
    }
    __syncthreads();  // the next tile's loads overwrite a and g L
  }
}

}  // namespace

#define JZ3_KERNEL(NAME, TYPE, LEFT, B)                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) jz3_segment_project_##NAME##_##B(     \
      SegmentProject p) {                                                                        \
    segment_project<TYPE, LEFT, B>(p);                                                           \
  }
#define JZ3_KERNELS(B)                       \
  JZ3_KERNEL(dense_bf16, Bf16, DENSE, B)     \
  JZ3_KERNEL(dense_fp16, Fp16, DENSE, B)     \
  JZ3_KERNEL(signs_bf16, Bf16, SIGNS, B)     \
  JZ3_KERNEL(signs_fp16, Fp16, SIGNS, B)
JZ3_KERNELS(64)
JZ3_KERNELS(128)

// out[documents[i]] = sum of the partial blocks first[i] .. first[i + 1], in order; zeros if there are none
extern "C" __global__ void __launch_bounds__(THREADS) jz3_segment_sum(SegmentSum p) {
  const int64_t parts = (p.size + THREADS - 1) / THREADS;
  const int64_t i = blockIdx.x / parts, at = blockIdx.x % parts * THREADS + threadIdx.x;
  if (at >= p.size) return;
  float sum = 0;
  for (int64_t piece = p.first[i]; piece < p.first[i + 1]; ++piece) sum += p.partial[piece * p.size + at];
  p.out[p.documents[i] * p.size + at] = sum;
}

cudaError_t launch_segment_project(const SegmentProject& p, int left, bool bf16, int64_t groups, cudaStream_t stream) {
  if (left == 2) return launch_segment_exact(p, bf16, groups, stream);
  const bool large = p.outputs > 64 || p.columns > 64;
  const int64_t block = large ? 128 : 64, bytes = STAGES * (large ? STAGE_BYTES<128> : STAGE_BYTES<64>);
  void (*const kernels[2][2][2])(SegmentProject) = {
      {{jz3_segment_project_dense_fp16_64, jz3_segment_project_signs_fp16_64},
       {jz3_segment_project_dense_bf16_64, jz3_segment_project_signs_bf16_64}},
      {{jz3_segment_project_dense_fp16_128, jz3_segment_project_signs_fp16_128},
       {jz3_segment_project_dense_bf16_128, jz3_segment_project_signs_bf16_128}}};
  const auto kernel = kernels[large][bf16][left];
  const int64_t grid = groups * ((p.outputs + block - 1) / block) * ((p.columns + block - 1) / block);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(grid), THREADS, size_t(bytes), stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_segment_sum(const SegmentSum& p, int64_t documents, cudaStream_t stream) {
  const int64_t grid = documents * ((p.size + THREADS - 1) / THREADS);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  jz3_segment_sum<<<unsigned(grid), THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace jz3
