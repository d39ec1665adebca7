// segment_project on AVX-512.
#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/segment_items.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "cpu/avx512.h"
#include "cpu/multiply.h"
#include "cpu/segment_kernel.h"

namespace jz3 {

void segment_items_avx512(const SegmentArguments& x, SegmentItems& items) {
  x.bf16 ? run_items<Avx512, uint16_t>(x, items) : run_items<Avx512, float>(x, items);
}

}  // namespace jz3

#pragma GCC pop_options
#endif
