// The element-wise parts of a Llama block on some rows: RMSNorm with the residual sum before it, SiLU(gate) * up, and the
// softmax of the output layer. Include inside a region, behind cpu/bf16.h or cpu/avx2.h and cpu/silu.h.
#pragma once

namespace jz3 {
namespace {

template <class T>
void norm_rows(const NormArguments<T>& a, int64_t begin, int64_t end, bool streamed) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.width;
    const T* add = a.add ? a.add + row * a.width : nullptr;
    float* sum = a.sum + row * a.width;
    T* y = a.y + row * a.width;
    const auto total = [&](int64_t c) { return add ? load(x + c) + load(add + c) : load(x + c); };
    Vec square = zeros();
    for (int64_t c = 0; c < a.width; c += LANES) {
      const Vec v = total(c);
      if (add) put(sum + c, v, streamed);
      square = mul_add(v, v, square);
    }
    const float scale = 1.0f / std::sqrt(sum_of(square) / float(a.width) + a.epsilon);
    a.scale[row] = scale;
    for (int64_t c = 0; c < a.width; c += LANES)
      put(y + c, total(c) * all(scale) * load(a.weight + c), streamed);
  }
  end_streams();
}

template <class T>
void norm_backward_rows(const NormBackwardArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.width;
    const T *dy = a.dy + row * a.width, *add = a.add ? a.add + row * a.width : nullptr;
    T* dx = a.dx + row * a.width;
    Vec dot = zeros();
    for (int64_t c = 0; c < a.width; c += LANES)
      dot = mul_add(load(dy + c) * load(a.weight + c), load(x + c), dot);
    const float scale = a.scale[row];
    const Vec s = all(scale);
    const Vec back = all(scale * scale * scale * sum_of(dot) / float(a.width));
    for (int64_t c = 0; c < a.width; c += LANES) {
      const Vec g = load(dy + c) * load(a.weight + c) * s;
      const Vec total = subtract_from(g, load(x + c), back);
      store(dx + c, add ? load(add + c) + total : total);
    }
  }
}

template <class T>
void swiglu_rows(const T* gate_up, T* y, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    for (int64_t c = 0; c < width; c += LANES) store(y + row * width + c, gated<T>(load(gate + c), load(up + c)));
  }
}

template <class T>
void swiglu_backward_rows(const T* gate_up, const T* dy, T* out, int64_t width, int64_t begin,
                          int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    T* d = out + row * 2 * width;
    for (int64_t c = 0; c < width; c += LANES) {
      const auto both = gated_gradient<T>(load(gate + c), load(up + c), load(dy + row * width + c));
      store(d + c, both.gate);
      store(d + width + c, both.up);
    }
  }
}

template <class T>
void softmax_rows(const SoftmaxArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t whole = a.width / LANES * LANES;
  const Mask rest = first_lanes(a.width - whole), one = first_lanes(1);
  for (int64_t row = begin; row < end; ++row) {
    T *x = a.logits + row * a.stride, *target = x + a.target[row];
    const Vec nothing = all(-INFINITY);
    const Vec tail = choose(rest, load_part(x + whole, rest), nothing);
    Vec top = tail;
    for (int64_t c = 0; c < whole; c += LANES) top = larger(top, load(x + c));
    const float largest = largest_of(top);
    const Vec shift = all(largest);
    const float own = first_of(load_part(target, one)) - largest;
    Vec sum = zeros();
    for (int64_t c = 0; c < whole; c += LANES) {
      const Vec e = exp_ps(load(x + c) - shift);
      sum = sum + e;
      store(x + c, e);
    }
    const Vec e = exp_ps(tail - shift);
    sum = sum + keep(rest, e);
    store_part(x + whole, rest, e);
    const float total = sum_of(sum);
    a.total[row] = total;
    a.loss[row] = std::log(total) - own;
    store_part(target, one, all(std::exp(own) - total));
  }
}

}  // namespace
}  // namespace jz3
