// The kernels of cpu/block.cpp on AVX2.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "cpu/block_kernels.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/avx2.h"
#include "cpu/attention_task.h"
#include "cpu/silu.h"
#include "cpu/block_rows.h"

#pragma GCC pop_options

namespace jz3 {

const BlockKernels<float> block_avx2 = {
    norm_rows<float>, norm_backward_rows<float>, swiglu_rows<float>, swiglu_backward_rows<float>,
    softmax_rows<float>, forward_task<float>, backward_task<float>};

}  // namespace jz3

#endif
