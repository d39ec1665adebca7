// segment_project on Hopper (TMA, wgmma): packed documents and a dense L. Signs and maps from tokens to documents
// take the kernel of segment_project.cu there too: TMA reads rows that follow each other, wgmma both factors from
// shared memory, and packed signs spare most of what it would gain.
//
// A block of threads takes tiles of 256 slots (jz3/ops/segment_plan.py): twice as many as on sm_80, because L comes
// from the L2 cache once per tile. One warp keeps three stages of 64 columns of g and L in flight. Two warpgroups,
// 64 outputs each, form (g L)^T = L^T g^T with the slots as columns: what they hold then is, rounded to half
// precision, the left factor of the second product in the registers' own order, as in flash attention. So g L never
// leaves the registers.
//
// bytes: g and a once per 128 columns of L (they come from L2 then) and 128 columns of a
// flops: 2 T O Q + 2 T Q P
#include <cuda.h>

#include "cuda/tensor_cores.h"

namespace jz3 {
namespace {

constexpr int SLOTS = SEGMENT_SLOTS_SM90, COLUMNS = 64, STAGES = 3, OUTPUTS = 128, BOX = 16;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int G_BYTES = SLOTS * COLUMNS * 2, LEFT_BYTES = OUTPUTS * COLUMNS * 2, STAGE = G_BYTES + LEFT_BYTES;
constexpr int A_HALF = SLOTS * 128;  // bytes of 64 columns of a

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// d[64 x 256] += A B: both K-major in shared memory; 64 x 128: A in registers, B with its columns contiguous
#define JZ3_WGMMA_256(TYPE) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " " \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, " \
      "%128, %129, 1, 1, 1, 0, 0;\n" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
        "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
        "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), \
        "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), \
        "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), \
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), \
        "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), \
        "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), \
        "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), \
        "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), \
        "+f"(d[126]), "+f"(d[127]) \
      : "l"(x), "l"(y))

#define JZ3_WGMMA_128(TYPE) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, " \
      "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
        "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
        "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y))

__device__ __forceinline__ void wgmma(Bf16, float (&d)[128], uint64_t x, uint64_t y) { JZ3_WGMMA_256("bf16"); }
__device__ __forceinline__ void wgmma(Fp16, float (&d)[128], uint64_t x, uint64_t y) { JZ3_WGMMA_256("f16"); }
__device__ __forceinline__ void wgmma(Bf16, float (&d)[64], const uint32_t (&x)[4], uint64_t y) {
  JZ3_WGMMA_128("bf16");
}
__device__ __forceinline__ void wgmma(Fp16, float (&d)[64], const uint32_t (&x)[4], uint64_t y) {
  JZ3_WGMMA_128("f16");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}
// keeps the compiler from reading or moving registers that a wgmma in flight writes
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A tile with 128-byte swizzle. `leading`: distance of the next 64 columns, used only where columns are contiguous.
__device__ __forceinline__ uint64_t descriptor(uint32_t at, uint32_t leading) {
  return uint64_t((at & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;\n" ::"n"(CONSUMERS) : "memory"); }

template <class T>
__device__ __forceinline__ void segment_project(const CUtensorMap* g_map, const CUtensorMap* left_map,
                                                const SegmentProject& p) {
  extern __shared__ uint8_t unaligned[];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES];
  __shared__ volatile uint32_t live[SLOTS / 32];  // which slots hold a token
  const uint32_t stages = (shared_address(unaligned) + 1023) & ~1023u, a_tile = stages + STAGES * STAGE;
  const uint32_t full = shared_address(barriers), empty = full + 8 * STAGES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t q_tiles = (p.outputs + OUTPUTS - 1) / OUTPUTS, p_tiles = (p.columns + 127) / 128;
  const int64_t group = blockIdx.x / (q_tiles * p_tiles), part = blockIdx.x % (q_tiles * p_tiles);
  const int64_t q0 = part % q_tiles * OUTPUTS, p0 = part / q_tiles * 128;
  const int first_tile = p.groups[group], last_tile = p.groups[group + 1];
  const int blocks = int((p.width + COLUMNS - 1) / COLUMNS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, CONSUMERS / 32);
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();

  int step = 0;  // of the ring of stages, over all tiles
  if (warp >= CONSUMERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;\n");
    if (warp > CONSUMERS / 32) return;
    for (int tile = first_tile; tile < last_tile; ++tile) {
      // Tokens of 16 slots follow each other. Those read beyond a document's end are cleared below.
      const int token = lane < SLOTS / BOX ? p.slots[int64_t(tile) * SLOTS + lane * BOX] : -1;
      const uint32_t bytes = __popc(__ballot_sync(0xffffffffu, token >= 0)) * BOX * COLUMNS * 2 + LEFT_BYTES;
      for (int block = 0; block < blocks; ++block, ++step) {
        const uint32_t stage = step % STAGES, to = stages + stage * STAGE, barrier = full + 8 * stage;
        barrier_wait(empty + 8 * stage, (step / STAGES & 1) ^ 1);
        if (lane == 0) {
          barrier_expect(barrier, bytes);
          tma_load(to + G_BYTES, left_map, barrier, block * COLUMNS, int(q0));
        }
        __syncwarp();
        if (token >= 0) tma_load(to + lane * BOX * 128, g_map, barrier, block * COLUMNS, token);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
  const int half = warp >> 2, quad = lane >> 2, t = lane & 3;
  float acc[64] = {};
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const int32_t* slots = p.slots + int64_t(tile) * SLOTS;
    consumers_sync();  // the last tile's a and `live` are used up
    const uint32_t tokens = __ballot_sync(0xffffffffu, slots[threadIdx.x] >= 0);
    if (lane == 0) live[warp] = tokens;
    for (uint32_t i = threadIdx.x; i < SLOTS * 16; i += CONSUMERS) {  // 16 units of 8 columns a slot
      const uint32_t row = i / 16, unit = i % 16;
      const int64_t column = p0 + unit * 8;
      const int token = slots[row];
      const int64_t bytes = token < 0 ? 0 : 2 * (p.columns - column);
      cp_async16(a_tile + unit / 8 * A_HALF + row * 128 + ((unit % 8 ^ (row & 7)) << 4),
                 bytes > 0 ? p.a + int64_t(token) * p.stride_a + column : p.a,
                 bytes <= 0 ? 0 : bytes >= 16 ? 16 : int(bytes));
    }
    cp_async_commit();

    float rows[128] = {};  // 64 outputs x 256 slots of (g L)^T
    for (int block = 0; block < blocks; ++block, ++step) {
      const uint32_t stage = step % STAGES, at = stages + stage * STAGE;
      barrier_wait(full + 8 * stage, step / STAGES & 1);
      pin(rows);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < COLUMNS; k += 16)
        wgmma(T(), rows, descriptor(at + G_BYTES + half * (LEFT_BYTES / 2) + k * 2, 16), descriptor(at + k * 2, 16));
      wgmma_commit();
      wgmma_wait<0>();  // the other warpgroup keeps the tensor cores busy meanwhile
      pin(rows);
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    }
    cp_async_wait<0>();
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
    consumers_sync();

    uint32_t left[SLOTS / 16][4];  // 64 outputs x 256 slots, rounded; zeros in empty slots, whatever was read
#pragma unroll
    for (int k = 0; k < SLOTS; k += 16) {
      const uint32_t bits = live[k / 32] >> (k % 32 + 2 * t);
#pragma unroll
      for (int h = 0; h < 4; ++h) {  // outputs +0, +8; slots +0, +8
        const float* pair = rows + (k / 8 + (h >> 1)) * 4 + (h & 1) * 2;
        const uint32_t two = bits >> (h >> 1) * 8;
        left[k / 16][h] = T::pack(pair[0], pair[1]) & ((two & 1) * 0xFFFFu + (two & 2) * 0x7FFF8000u);
      }
    }
    for (int i = p.tiles[tile]; i < p.tiles[tile + 1]; ++i) {
      const int4 piece = p.pieces[i];  // first slot, end, where to, whether the sums are complete
      pin(acc);
#pragma unroll
      for (int k = 0; k < SLOTS; k += 16)
        if (k >= piece.x && k < piece.y) {
          wgmma_fence();
          wgmma(T(), acc, left[k / 16], descriptor(a_tile + k * 128, A_HALF));
        }
      wgmma_commit();
      wgmma_wait<0>();
      pin(acc);
      if (piece.w) {
        float* out = block_of(p, piece.z);
#pragma unroll
        for (int n = 0; n < 16; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            store_pair(p, out, q0 + warp * 16 + h * 8 + quad, p0 + n * 8 + t * 2, acc + n * 4 + h * 2);
      }
    }
  }
}

#endif

}  // namespace

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define JZ3_BODY(TYPE) segment_project<TYPE>(&g_map, &left_map, p)
#else
#define JZ3_BODY(TYPE)
#endif
#define JZ3_KERNEL(NAME, TYPE)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) jz3_segment_project_sm90_##NAME( \
      const __grid_constant__ CUtensorMap g_map, const __grid_constant__ CUtensorMap left_map,   \
      const __grid_constant__ SegmentProject p) {                                        \
    JZ3_BODY(TYPE);                                                                     \
  }
JZ3_KERNEL(bf16, Bf16)
JZ3_KERNEL(fp16, Fp16)


namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: the extension loads where there is no driver.
cudaError_t find_encode(Encode* encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorInsufficientDriver;
  *encode = reinterpret_cast<Encode>(function);
  return cudaSuccess;
}

// boxes of `height` rows and 64 columns; zeros outside of the matrix
cudaError_t make_map(CUtensorMap* map, Encode encode, bool bf16, const void* x, int64_t rows, int64_t columns,
                     int64_t stride, int height) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, pitch[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {COLUMNS, cuuint32_t(height)}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(x),
             sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_segment_project_sm90(const SegmentProject& p, int64_t tokens, bool bf16, int64_t groups,
                                        cudaStream_t stream) {
  const int64_t grid = groups * ((p.outputs + OUTPUTS - 1) / OUTPUTS) * ((p.columns + 127) / 128);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = bf16 ? jz3_segment_project_sm90_bf16 : jz3_segment_project_sm90_fp16;
  constexpr int bytes = STAGES * STAGE + 2 * A_HALF + 1024;  // 1024 to align the tiles
  CUtensorMap g_map, left_map;
  Encode encode = nullptr;
  cudaError_t error = find_encode(&encode);
  if (error == cudaSuccess) error = make_map(&g_map, encode, bf16, p.g, tokens, p.width, p.stride_g, BOX);
  if (error == cudaSuccess)
    error = make_map(&left_map, encode, bf16, p.left, p.outputs, p.width, p.stride_left, OUTPUTS);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(grid), THREADS, bytes, stream>>>(g_map, left_map, p);
  return cudaGetLastError();
}

}  // namespace jz3
