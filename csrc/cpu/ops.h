// The CPU kernels: raw pointers and sizes, no Python and no torch. Arrays are row-major.
#pragma once

#include <cstdint>

namespace jz3 {

// `emulated_tiles` is the kernel for AMX with the tiles in plain C++.
enum class Isa : int { scalar = 0, avx2 = 1, avx512vnni = 2, amx = 3, emulated_tiles = 4 };

// The best instruction set of this machine, or the one asked for (-1: the best); throws if it can't run here.
Isa choose_isa(int asked);
const char* isa_name(Isa isa);

// What multiplies tiles of bfloat16 numbers: nothing, AMX, or plain C++ (for tests). Matrices are packed for the unit
// chosen at that time, at first the best of this machine.
enum class TileUnit : int { none = 0, amx = 1, emulated = 2 };
TileUnit tile_unit();
void choose_tile_unit(int unit);

// What computes a Llama block's parts (cpu/block.cpp): nothing, AVX2, or AVX-512 with bfloat16 products (rows of bfloat16
// too); at first the best of this machine.
enum class VectorUnit : int { none = 0, avx2 = 1, avx512 = 2 };
VectorUnit vector_unit();
void choose_vector_unit(int unit);
bool has_bf16();  // whether avx512 can be chosen

// Keep freed memory in the process until as many calls have ended it as began it: arrays of megabytes that come and go
// would be given back and cleared anew every time, which takes as long as a product that fills them.
void hold_memory(bool hold);

// What the machine can do at most: multiplications and additions of int8 per second of all threads, and the sum of
// an array's bytes, for timing how fast it is read.
double peak_int8(int isa, int threads, double seconds);
uint64_t read_all(const uint8_t* bytes, int64_t count, int threads);

// Packed signs (jz3/ops/signs.py): out[rows][4 * blocks].
void sign_bits(uint32_t* out, uint64_t key, int64_t rows, int64_t blocks, uint64_t first_row,
               uint64_t first_block, int threads);

// The same signs as numbers: out[rows][cols] of +1 and -1.
void sign_matrix(float* out, uint64_t key, int64_t rows, int64_t cols, uint64_t first_row, uint64_t first_block,
                 int threads);

// out[rows][k] += x times these signs, k rows of them (jz3/ops/sign_project.py); only where has_sign_project().
struct SignArguments {
  const float* x;
  float* out;
  uint64_t key, first_block;
  int64_t rows, columns, k, stride;
};
bool has_sign_project();
void sign_project(const SignArguments& arguments, int threads);

// Signed hash (jz3/ops/sketch.py): out[rows][dim] is set.
template <class T>
void sketch(const T* block, float* out, int64_t rows, int64_t n, int64_t row_stride, uint64_t key, int64_t dim,
            int threads);

// Codes (jz3/ops/encode.py): bits in {1, 2, 4, 8}; thresholds has 2^bits - 1 entries, unused for 8 bits.
struct EncodeArguments {
  const float *values, *mean, *scale, *thresholds;
  uint8_t* codes;
  int64_t rows, dim, row_bytes;
  int bits;
  float unit, smallest_scale;
};
void encode(const EncodeArguments& arguments, int threads);
void decode(const uint8_t* codes, const float* mean, const float* scale, const float* table, float* values,
            int64_t rows, int64_t dim, int64_t row_bytes, int bits, int threads);

// Streaming top-k over codes (jz3/ops/score_topk.py), or all scores (score_checkpoints.py); isa as in choose_isa. Numbers
// must be finite and every group of 0 .. count - 1 have a query, as jz3/ops/score_queries.py checks: the scan relies on it
// that a row's bounds compare, and that every group finds k rows.
struct ScoreArguments {
  const uint8_t* const* codes;    // [pieces]: the rows' codes, one piece after the other
  const int64_t* begins;          // [pieces + 1]: the first row of every piece, then `rows`
  const int8_t *levels, *planes;  // [2^bits], [planes_count][queries][dim]
  const double *step, *bias;      // [queries]
  const float* row_scale;         // [rows]
  const int64_t *ids, *groups;    // [rows], [queries]
  float* values;                  // [count][k]
  int64_t* found;                 // [count][k]
  float* scores;                  // [queries][rows], for score_codes, which needs no ids and no groups; or null
  int64_t pieces, rows, dim, row_bytes, stride, queries, count, k;  // stride of rows in bytes; k <= rows
  int planes_count, bits, isa;
};
void score_topk(const ScoreArguments& arguments, int threads);
void score_codes(const ScoreArguments& arguments, int threads);

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JZ3_BF16 1

// Projected gradients of documents (jz3/ops/segment_project.py). Rows are float, or bfloat16 (as uint16_t).
struct SegmentArguments {
  const void *a, *g;      // [T][columns], [T][width]
  const void* left;       // [width][outputs] of the same type; or packed signs (uint32_t), then a stride in words
  float* out;             // [documents][outputs][columns]
  const int64_t* bounds;  // [documents + 1]
  const int64_t* tokens;  // position -> token; null where they are the same
  int64_t documents, width, outputs, columns, stride_a, stride_g, stride_left;
  float scale;            // of g L
  bool signs, bf16;
};
// Vector units, worst to best: none that it runs on, AVX2, AVX-512, AVX-512 with bfloat16 products.
enum class SegmentUnit : int { none = 0, avx2 = 1, avx512 = 2, bf16 = 3 };
SegmentUnit best_segment_unit();
// `unit` is one of them, or -1 for the best; throws if this machine lacks it.
void segment_project(const SegmentArguments& arguments, int unit, int threads);

// The parts of a Llama block (jz3/gradients/llama.py) on rows of T, float or bfloat16 (as uint16_t); they may be called
// only where vector_unit() isn't none, with rows of bfloat16 only where it is avx512.

// sum = x + add (x and sum are one if add is null), y = sum / rms(sum) * weight; scale = 1 / rms(sum). The sums, which
// every block adds to, are float32 throughout: their roundings would be most of the error of bfloat16 passes.
template <class T>
struct NormArguments {
  const float* x;         // [rows][width]; width is a multiple of 16
  const T *add, *weight;  // the same, [width]
  float* sum;
  T* y;
  float* scale;  // [rows]
  int64_t rows, width;
  float epsilon;
};
template <class T>
void rms_norm(const NormArguments<T>& arguments, int threads);

// dx = add + the gradient with respect to x of x / rms(x) * weight; add may be null, dx may be dy.
template <class T>
struct NormBackwardArguments {
  const float* x;
  const T *weight, *dy, *add;
  const float* scale;
  T* dx;
  int64_t rows, width;
};
template <class T>
void rms_norm_backward(const NormBackwardArguments<T>& arguments, int threads);

// gate_up[rows][2 * width] holds the gate, then the up projection; width is a multiple of 16. out may be
// gate_up.
template <class T>
void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width, int threads);
template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* out, int64_t rows, int64_t width, int threads);

// qkv[texts * tokens][(heads + 2 * key_heads) * width] of unrotated queries, keys, values; width is a multiple of 32.
template <class T>
struct AttentionArguments {
  const T* qkv;
  const float *cosine, *sine;  // [tokens][width]
  T* out;                      // [texts * tokens][heads * width]
  float* statistics;           // [texts][heads][tokens]: log2 of the sum of exp(scale * score) of every row
  const T* dout;               // like out; the backward pass only
  T* dqkv;                     // like qkv; the backward pass only
  int64_t texts, tokens, heads, key_heads, width;
  float scale;
};
template <class T>
void attention(const AttentionArguments<T>& arguments, int threads);
template <class T>
void attention_backward(const AttentionArguments<T>& arguments, int threads);

// Cross entropy (jz3/ops/ce_hidden_grad.py): every row of logits becomes exp(z - max), less `total` at the target.
template <class T>
struct SoftmaxArguments {
  T* logits;              // [rows][stride]
  const int64_t* target;  // [rows]
  float *loss, *total;    // [rows]
  int64_t rows, width, stride;
};
template <class T>
void softmax_residual(const SoftmaxArguments<T>& arguments, int threads);

// W[k][n] = w[k * row_stride + n * column_stride] for `product`: 64 * ceil(columns / 64) * ceil(depth / 2) pairs of bfloat16,
// in panels of 64 columns, or of 32 for tiles (cpu/tiles.h); or 16 * ceil(columns / 16) * depth numbers, in panels of 16.
void pack_product(const uint16_t* w, uint32_t* out, int64_t depth, int64_t columns, int64_t row_stride,
                  int64_t column_stride, int threads);
void pack_product(const float* w, float* out, int64_t depth, int64_t columns, int64_t row_stride, int64_t column_stride,
                  int threads);

constexpr int64_t BUCKETS = 32;  // a multiple of the lanes of a vector, twice

// y = x W of bfloat16 (as uint16_t), y in bfloat16 or float, only where has_bf16(); or of float on AVX2. Strides are in
// numbers; depth and x_stride of bfloat16 are even, columns is a multiple of 16. With signs, then
// y[m][first + b] = sum of +-x[m][k] over k % BUCKETS = 2 (b % 16) + b / 16.
template <class T, class Out>
struct ProductArguments {
  const T* x;      // [rows][x_stride]
  const void* w;   // from pack_product
  const T* signs;  // [depth], 0 or the sign bit of T; may be null
  Out* y;          // [rows][y_stride]
  int64_t rows, columns, depth, x_stride, y_stride, first;
};
template <class Out>
void product(const ProductArguments<uint16_t, Out>& arguments, int threads);
void product(const ProductArguments<float, float>& arguments, int threads);

// Both products of a gated layer, where tile_unit() isn't none; depth and width are multiples of 32, x_stride is even, else
// they throw. Forward, of G and U, gate_up = [x G, x U] and y = SiLU(x G) * (x U); W has their columns in turn, 32 at a
// time. Backward, of the layer behind it, the gradient of y is x W, and gate_up becomes that of itself.
struct GatedArguments {
  const uint16_t* x;   // [rows][x_stride]
  const uint32_t* w;   // from pack_product, [depth][2 * width] or, backward, [depth][width]
  uint16_t* gate_up;   // [rows][2 * width]
  uint16_t* y;         // [rows][width]; forward alone
  int64_t rows, depth, width, x_stride;
};
void gated_product(const GatedArguments& arguments, int threads);
void gated_gradient_product(const GatedArguments& arguments, int threads);

// Products with whole numbers (cpu/whole.h): in 8 bits (cpu/product_int8.cpp) on rows of float or bfloat16 (as uint16_t),
// only where has_int8_products(); in 16 bits (cpu/product_int16.cpp) on rows of float, only where has_int16_products().
bool has_int8_products();
bool has_int16_products();
constexpr int64_t INT8_PANEL = 64, INT16_PANEL = 16;
int64_t int8_bytes(int64_t group);  // of a group of a panel's columns
int64_t int16_bytes(int64_t group);

// W as pack_product has it, `group` numbers of a column (a multiple of 64) under one scale:
// out[ceil(columns / panel)][ceil(depth / group)][bytes], at a multiple of 64 bytes.
struct WholeShape {
  int64_t group, depth, columns, row_stride, column_stride;
};
template <class T>
void pack_int8(const T* w, uint8_t* out, const WholeShape& shape, int threads);
void pack_int16(const float* w, uint8_t* out, const WholeShape& shape, int threads);

// y = x W; columns is a multiple of 16. A row with a number that isn't finite gives NaN.
template <class T>
struct WholeArguments {
  const T* x;        // [rows][x_stride]
  const uint8_t* w;  // from pack_int8 or pack_int16
  T* y;              // [rows][y_stride]
  int64_t group, rows, columns, depth, x_stride, y_stride;
};
template <class T>
void product_int8(const WholeArguments<T>& arguments, int threads);
void product_int16(const WholeArguments<float>& arguments, int threads);

// Of every segment of tokens, from factors of its gradient G = sum of g_t a_t^T that are projected and, BUCKETS numbers
// more, sketched: K = sum of the projected factors' outer products and S, of the sketches'. square += the squares of K and
// of S - turn_left^T K turn_right; values = K at `chosen`.
struct SegmentsArguments {
  const float *g, *g_sketch;            // [tokens][g_stride]: `rows` numbers, BUCKETS
  const float *a, *a_sketch;            // [tokens][a_stride]: `columns` numbers and 15 more, BUCKETS
  const int64_t* bounds;                // [segments + 1]
  const float *turn_left, *turn_right;  // [rows][BUCKETS], [columns][BUCKETS]
  const int64_t* chosen;                // [count], each row * columns + column
  float *square, *values;               // [segments], [segments][values_stride]
  int64_t segments, rows, columns, count, g_stride, a_stride, values_stride;
};
void project_segments(const SegmentsArguments& arguments, int threads);

// Cross entropy of rows of hidden states of T, float or bfloat16 (as uint16_t), and its gradient, for width a multiple of
// 16. Products in bfloat16 are exact or in 8 bits, those in float in 8 or 16 bits; in 8 or 16 bits only where
// has_int8_products() or has_int16_products().
template <class T>
struct CrossEntropyArguments {
  const T *h, *w;                  // [rows][width], [words][width]
  const void *forward, *backward;  // w as [width][words] and as [words][width], from pack_product, pack_int8 or pack_int16
  const int64_t* target;           // [rows]
  const float* weight;             // [rows]
  float *loss, *rest;              // [rows]: log(1 + rest), sum of exp(logit - logit of the target) of the others
  T* grad;                         // [rows][width], not finite where rest isn't
  int64_t rows, words, width;
  int bits;                               // of the products: 0 for exact ones, 8 or 16
  int64_t forward_group, backward_group;  // numbers under one scale, the latter a divisor of 384; 0 for pack_product
};
template <class T>
void cross_entropy(const CrossEntropyArguments<T>& arguments, int threads);  // throws for another group
#endif

}  // namespace jz3
