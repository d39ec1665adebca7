// segment_project on AVX-512 with products of bfloat16 pairs.
#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/segment_items.h"

#ifdef JZ3_BF16
#include <immintrin.h>
#define JZ3_BF16_PRODUCTS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "cpu/avx512.h"
#include "cpu/multiply.h"
#include "cpu/segment_kernel.h"

namespace jz3 {

void segment_items_bf16(const SegmentArguments& x, SegmentItems& items) { run_items<Avx512Bf16, uint16_t>(x, items); }

}  // namespace jz3

#pragma GCC pop_options
#endif
