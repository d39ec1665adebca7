// What kernels on the tensor cores of sm_80 share: copies to shared memory, number formats, instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/launch.h"

namespace jz3 {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void cp_async16(uint32_t to, const void* from, int bytes) {  // zeros beyond `bytes`
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// bytes of up to 8 columns
__device__ __forceinline__ int bytes_left(int64_t columns) {
  return columns <= 0 ? 0 : columns >= 8 ? 16 : 2 * int(columns);
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ float* block_of(const SegmentProject& p, int where) {
  const int64_t size = p.outputs * p.columns;
  return where >= 0 ? p.out + where * size : p.partial + int64_t(~where) * size;
}

// two sums that lie side by side go out and are cleared
__device__ __forceinline__ void store_pair(const SegmentProject& p, float* block, int64_t row, int64_t column,
                                           float* sums) {
  float* at = block + row * p.columns + column;
  if (row < p.outputs && column < p.columns) {
    if (p.columns % 2 == 0) {
      *reinterpret_cast<float2*>(at) = make_float2(sums[0], sums[1]);
    } else {
      at[0] = sums[0];
      if (column + 1 < p.columns) at[1] = sums[1];
    }
  }
  sums[0] = sums[1] = 0;
}

struct Bf16 {
  static constexpr uint32_t ONES = 0x3F803F80u;  // two ones
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Fp16 {
  static constexpr uint32_t ONES = 0x3C003C00u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Of Q x P sums that 4 x 2 warps share: those of this thread, Q / 64 x P / 16 fragments of a warp. The factors lie in
// shared memory, slots by columns, with unit u of 16 bytes of row r at u ^ (r mod 8).
template <class T, int Q, int P>
struct OuterProduct {
  static constexpr int MT = Q / 64, NT = P / 16;
  float sums[MT][NT][4] = {};

  // + the outer products of the slots k .. k + 16 of [slots][Q] and [slots][P]
  __device__ __forceinline__ void add(uint32_t left, uint32_t right, int k) {
    const int lane = threadIdx.x & 31, warp_m = threadIdx.x >> 6, warp_n = threadIdx.x >> 5 & 1;
    uint32_t x[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const uint32_t row = k + (lane & 7) + ((lane >> 4) << 3);
      const uint32_t unit = warp_m * (2 * MT) + m * 2 + ((lane >> 3) & 1);
      ldmatrix_transposed(x[m], left + row * (Q * 2) + ((unit ^ (row & 7)) << 4));
    }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      const uint32_t row = k + (lane & 15), unit = warp_n * NT + n + (lane >> 4);
      uint32_t y[4];
      ldmatrix_transposed(y, right + row * (P * 2) + ((unit ^ (row & 7)) << 4));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        T::mma(sums[m][n], x[m], y[0], y[1]);
        T::mma(sums[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }

  // to the document's or partial block, from the row q0 and the column p0 on; the sums are zero then
  __device__ __forceinline__ void store(const SegmentProject& p, int where, int64_t q0, int64_t p0) {
    const int lane = threadIdx.x & 31, warp_m = threadIdx.x >> 6, warp_n = threadIdx.x >> 5 & 1;
    float* block = block_of(p, where);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          store_pair(p, block, q0 + (warp_m * MT + m) * 16 + h * 8 + (lane >> 2),
                     p0 + (warp_n * NT + n) * 8 + (lane & 3) * 2, sums[m][n] + 2 * h);
  }
};

}  // namespace jz3
