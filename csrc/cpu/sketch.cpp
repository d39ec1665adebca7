// Buckets and signs are made once per chunk of coordinates and applied to a thread's rows, whose K-vectors stay
// in cache; every bucket adds its coordinates in ascending order, as the reference does.
#include <cstring>

#include "common/philox.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace jz3 {
namespace {

constexpr int64_t CHUNK = 4096;

struct Bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint32_t bits_of(Bfloat16 x) { return uint32_t(x.bits) << 16; }

JZ3_CLONES void plan(uint64_t key, int64_t begin, int64_t count, uint64_t dim, uint32_t* bucket, uint32_t* flip) {
  for (int64_t j = 0; j < count; j += 4) {
    const Words words = philox(key, uint64_t(begin + j) / 4, 0);
    for (int i = 0; i < 4; ++i) {
      bucket[j + i] = uint32_t((words.word[i] * dim) >> 32);
      flip[j + i] = words.word[i] << 31;
    }
  }
}

template <class T>
void add(const T* values, int64_t count, const uint32_t* bucket, const uint32_t* flip, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t bits = bits_of(values[j]) ^ flip[j];
    float signed_value;
    std::memcpy(&signed_value, &bits, 4);
    out[bucket[j]] += signed_value;
  }
}

}  // namespace

template <class T>
void sketch(const T* block, float* out, int64_t rows, int64_t n, int64_t row_stride, uint64_t key, int64_t dim,
            int threads) {
  using Element = std::conditional_t<std::is_same_v<T, float>, float, Bfloat16>;
  parallel(rows, n, threads, [&](int64_t, int64_t first, int64_t last) {
    std::vector<uint32_t> bucket(CHUNK), flip(CHUNK);
    std::memset(out + first * dim, 0, size_t(last - first) * dim * sizeof(float));
    for (int64_t begin = 0; begin < n && first < last; begin += CHUNK) {
      const int64_t count = std::min(CHUNK, n - begin);
      plan(key, begin, count, uint64_t(dim), bucket.data(), flip.data());
      for (int64_t row = first; row < last; ++row)
        add(reinterpret_cast<const Element*>(block) + row * row_stride + begin, count, bucket.data(), flip.data(),
            out + row * dim);
    }
  });
}

template void sketch<float>(const float*, float*, int64_t, int64_t, int64_t, uint64_t, int64_t, int);
template void sketch<uint16_t>(const uint16_t*, float*, int64_t, int64_t, int64_t, uint64_t, int64_t, int);

}  // namespace jz3
