// Products with a fixed matrix in 8 bits: y = x W with x rounded to 255 levels per row and group of numbers, W per column
// and group. Products of numbers are whole and summed exactly by vpdpbusd; a group's sum is then multiplied by its two
// scales and added up in float32.
//
// A panel is 64 columns. A group's part of it (12 KB of 192 numbers) stays in the first-level cache while the block's rows
// come by, six at a time. Operations per row: depth * columns multiplications at 64 a cycle and core of vpdpbusd, and per
// group and 16 columns a conversion, a product and a fused multiply-add.
#include <algorithm>

#include "cpu/int8.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"

namespace jz3 {

#ifdef JZ3_BF16

bool has_int8_products() { return has_bf16() && __builtin_cpu_supports("avx512vnni"); }

int64_t int8_bytes(int64_t group) { return Int8::part_bytes(group); }

template <class T>
void pack_int8(const T* w, uint8_t* out, const WholeShape& shape, int threads) {
  parallel((shape.columns + INT8_PANEL - 1) / INT8_PANEL, shape.depth * INT8_PANEL, threads,
           [&](int64_t, int64_t begin, int64_t end) { pack_panels<Int8>(w, out, shape, begin, end); });
}

template <class T>
void product_int8(const WholeArguments<T>& a, int threads) {
  constexpr int64_t block = 72;  // rows at a time
  share_rows(a.rows, block, threads, [&](int64_t begin, int64_t end) { product_whole<Int8>(a, begin, end - begin); });
}

template void pack_int8(const float*, uint8_t*, const WholeShape&, int);
template void pack_int8(const uint16_t*, uint8_t*, const WholeShape&, int);
template void product_int8(const WholeArguments<float>&, int);
template void product_int8(const WholeArguments<uint16_t>&, int);

#endif

}  // namespace jz3
