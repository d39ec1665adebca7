// segment_project without L, which gives documents' exact gradients: out[i] = sum over the tokens t of document i of
// g_t a_t^T on the tensor cores (mma.sync, cp.async), sm_80 and later. Tiles, slots and pieces are those of
// segment_project.cu.
//
// A block of threads forms Q x P numbers, half a tile of 64 slots at a time: three stages of shared memory hold its
// columns of g and a, two of them on their way while the third is multiplied. Q is 256, so that a comes from the L2
// cache half as often as with 128, which on sm_90 would bound the kernel. In shared memory unit u of 16 bytes of
// row r lies at u ^ (r mod 8).
//
// bytes: g once per 128 columns of a, a once per 256 columns of g (they come from L2 then)
// flops: 2 T O P
#include "cuda/tensor_cores.h"

namespace jz3 {
namespace {

constexpr int THREADS = 256, HALF = SEGMENT_SLOTS / 2, STAGES = 3;
static_assert(HALF == 64, "a lane holds the tokens of two slots");

template <int N>
struct Columns {
  static constexpr int value = N;
};

template <int Q, int P>
constexpr int STAGE_BYTES = HALF * (Q + P) * 2;

template <class T, int Q, int P>
__device__ __forceinline__ void segment_exact(const SegmentProject& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x & 31;
  const int64_t q_tiles = (p.outputs + Q - 1) / Q, p_tiles = (p.columns + P - 1) / P;
  const int64_t group = blockIdx.x / (q_tiles * p_tiles), part = blockIdx.x % (q_tiles * p_tiles);
  const int64_t q0 = part % q_tiles * Q, p0 = part / q_tiles * P;
  const int first_tile = p.groups[group], steps = 2 * (p.groups[group + 1] - first_tile);

  int tokens[2];  // of two slots of the half tile whose copies begin next
  auto look_up = [&](int step) {
    const int32_t* slots = p.slots + (int64_t(first_tile) * 2 + step) * HALF + lane;
    tokens[0] = step < steps ? slots[0] : -1;
    tokens[1] = step < steps ? slots[32] : -1;
  };
  // N columns of g or a for the slots that were looked up
  auto load = [&](auto of_block, uint32_t to, const uint16_t* x, int64_t stride, int64_t columns) {
    constexpr int N = decltype(of_block)::value, UNITS = N / 8, ROWS = THREADS / UNITS;
    const uint32_t unit = threadIdx.x % UNITS;
    const int bytes = bytes_left(columns - unit * 8);
#pragma unroll
    for (int i = 0; i < HALF / ROWS; ++i) {
      const uint32_t row = threadIdx.x / UNITS + i * ROWS;
      const int token = __shfl_sync(0xffffffffu, tokens[i * ROWS / 32], row % 32);
      const int take = token < 0 ? 0 : bytes;
      cp_async16(to + row * (N * 2) + ((unit ^ (row & 7)) << 4), take ? x + int64_t(token) * stride + unit * 8 : x,
                 take);
    }
  };
  auto load_step = [&](int step) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES<Q, P>;
    if (step < steps) {
      load(Columns<Q>(), stage, p.g + q0, p.stride_g, p.width - q0);
      load(Columns<P>(), stage + HALF * Q * 2, p.a + p0, p.stride_a, p.columns - p0);
    }
    cp_async_commit();
    look_up(step + 1);
  };

  OuterProduct<T, Q, P> outer;
  look_up(0);
  load_step(0);
  load_step(1);
  for (int step = 0; step < steps; ++step) {
    const uint32_t rows = base + step % STAGES * STAGE_BYTES<Q, P>, a_rows = rows + HALF * Q * 2;
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_step(step + 2);  // where nobody reads since the barrier
    const int tile = first_tile + step / 2, begin = step % 2 * HALF;
    for (int i = p.tiles[tile]; i < p.tiles[tile + 1]; ++i) {
      const int4 piece = p.pieces[i];  // first slot, end, where to, whether the sums are complete
      const int end = min(piece.y - begin, HALF);
      for (int k = max(piece.x - begin, 0); k < end; k += 16) outer.add(rows, a_rows, k);
      if (piece.w && piece.y > begin && piece.y <= begin + HALF) outer.store(p, piece.z, q0, p0);
    }
  }
}

}  // namespace

#define JZ3_KERNEL(NAME, TYPE, Q, P)                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) jz3_segment_exact_##NAME##_##Q(SegmentProject p) { \
    segment_exact<TYPE, Q, P>(p);                                                                             \
  }
JZ3_KERNEL(bf16, Bf16, 64, 64)
JZ3_KERNEL(fp16, Fp16, 64, 64)
JZ3_KERNEL(bf16, Bf16, 256, 128)
JZ3_KERNEL(fp16, Fp16, 256, 128)

cudaError_t launch_segment_exact(const SegmentProject& p, bool bf16, int64_t groups, cudaStream_t stream) {
  // GeForce and its like (sm_86, sm_89, sm_120) have 99 KB of shared memory: too little for the large blocks.
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const bool large = (p.outputs > 64 || p.columns > 64) && most >= STAGES * STAGE_BYTES<256, 128>;
  const int64_t rows = large ? 256 : 64, columns = large ? 128 : 64;
  const int bytes = STAGES * (large ? STAGE_BYTES<256, 128> : STAGE_BYTES<64, 64>);
  void (*const kernels[2][2])(SegmentProject) = {{jz3_segment_exact_fp16_64, jz3_segment_exact_fp16_256},
                                                 {jz3_segment_exact_bf16_64, jz3_segment_exact_bf16_256}};
  const auto kernel = kernels[bf16][large];
  const int64_t grid = groups * ((p.outputs + rows - 1) / rows) * ((p.columns + columns - 1) / columns);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(grid), THREADS, size_t(bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace jz3
