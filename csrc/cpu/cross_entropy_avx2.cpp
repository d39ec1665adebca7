// Cross entropy of rows of float32 with products in 16 bits, on AVX2.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>

#include "cpu/block_kernels.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/avx2.h"
#include "cpu/int16.h"
#include "cpu/cross_entropy_rows.h"

namespace jz3 {

void cross_entropy_block_int16(const CrossEntropyArguments<float>& a, int64_t first, int64_t rows) {
  cross_entropy_block<WholeProducts<Int16, float>>(a, first, rows);
}

}  // namespace jz3

#pragma GCC pop_options
#endif
