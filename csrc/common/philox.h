// Philox4x32-10 (Salmon et al., SC 2011), the one random generator of all back ends.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JZ3_INLINE __host__ __device__ __forceinline__
#else
#define JZ3_INLINE inline
#endif

namespace jz3 {

struct Words {
  uint32_t word[4];
};

JZ3_INLINE Words philox(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t c0 = uint32_t(low), c1 = uint32_t(low >> 32), c2 = uint32_t(high), c3 = uint32_t(high >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace jz3
