// Products of float32 rows with a fixed matrix in 16 bits, as those in 8 bits (cpu/product_int8.cpp), for machines whose
// best vectors are AVX2: vpmaddwd and the addition behind it multiply twice as many numbers a cycle as float32's products.
//
// A panel is 16 columns, a group's part of it 6 KB of 192 numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/avx2.h"
#include "cpu/int16.h"

#pragma GCC pop_options

namespace jz3 {

bool has_int16_products() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

int64_t int16_bytes(int64_t group) { return Int16::part_bytes(group); }

void pack_int16(const float* w, uint8_t* out, const WholeShape& shape, int threads) {
  parallel((shape.columns + INT16_PANEL - 1) / INT16_PANEL, shape.depth * INT16_PANEL, threads,
           [&](int64_t, int64_t begin, int64_t end) { pack_panels<Int16>(w, out, shape, begin, end); });
}

void product_int16(const WholeArguments<float>& a, int threads) {
  constexpr int64_t block = 72;  // rows at a time: a group of theirs (28 KB) stays in a second-level cache
  share_rows(a.rows, block, threads, [&](int64_t begin, int64_t end) { product_whole<Int16>(a, begin, end - begin); });
}

}  // namespace jz3

#endif
