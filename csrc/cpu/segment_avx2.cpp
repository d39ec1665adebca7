// segment_project on AVX2.
#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/segment_items.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/avx2.h"
#include "cpu/segment_kernel.h"

namespace jz3 {

void segment_items_avx2(const SegmentArguments& x, SegmentItems& items) {
  x.bf16 ? run_items<Avx2, uint16_t>(x, items) : run_items<Avx2, float>(x, items);
}

}  // namespace jz3

#pragma GCC pop_options
#endif
