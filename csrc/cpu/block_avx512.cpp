// The kernels of cpu/block.cpp on AVX-512 with bfloat16 products.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/block_kernels.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "cpu/attention_task.h"
#include "cpu/silu.h"
#include "cpu/block_rows.h"

#pragma GCC pop_options

namespace jz3 {

const BlockKernels<float> block_avx512 = {
    norm_rows<float>, norm_backward_rows<float>, swiglu_rows<float>, swiglu_backward_rows<float>,
    softmax_rows<float>, forward_task<float>, backward_task<float>};
const BlockKernels<uint16_t> block_bf16 = {
    norm_rows<uint16_t>, norm_backward_rows<uint16_t>, swiglu_rows<uint16_t>, swiglu_backward_rows<uint16_t>,
    softmax_rows<uint16_t>, forward_task<uint16_t>, backward_task<uint16_t>};

}  // namespace jz3

#endif
