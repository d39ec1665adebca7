// jz3._C: the CPU kernels for Python. Arrays come as addresses and sizes, so that one binary serves every
// version of torch and numpy; shapes and types are checked by jz3/ops before.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/ops.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::string cpu_features() {
  switch (jz3::choose_isa(-1)) {
    case jz3::Isa::avx512vnni:
      return "avx512vnni";
    case jz3::Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_features", &cpu_features);
  m.def("sign_bits",
        [](uintptr_t out, uint64_t key, int64_t rows, int64_t blocks, uint64_t first_row, uint64_t first_block,
           int threads) {
          py::gil_scoped_release release;
          jz3::sign_bits(at<uint32_t>(out), key, rows, blocks, first_row, first_block, threads);
        });
  m.def("sign_matrix",
        [](uintptr_t out, uint64_t key, int64_t rows, int64_t cols, uint64_t first_row, uint64_t first_block,
           int threads) {
          py::gil_scoped_release release;
          jz3::sign_matrix(at<float>(out), key, rows, cols, first_row, first_block, threads);
        });
  m.def("sketch", [](uintptr_t block, uintptr_t out, bool is_bfloat16, int64_t rows, int64_t n, int64_t row_stride,
                     uint64_t key, int64_t dim, int threads) {
    py::gil_scoped_release release;
    if (is_bfloat16)
      jz3::sketch(at<const uint16_t>(block), at<float>(out), rows, n, row_stride, key, dim, threads);
    else
      jz3::sketch(at<const float>(block), at<float>(out), rows, n, row_stride, key, dim, threads);
  });
  m.def("encode", [](uintptr_t values, uintptr_t mean, uintptr_t scale, uintptr_t thresholds, uintptr_t codes,
                     int64_t rows, int64_t dim, int64_t row_bytes, int bits, float unit, float smallest_scale,
                     int threads) {
    py::gil_scoped_release release;
    jz3::encode({at<const float>(values), at<const float>(mean), at<const float>(scale), at<const float>(thresholds),
                 at<uint8_t>(codes), rows, dim, row_bytes, bits, unit, smallest_scale},
                threads);
  });
  m.def("decode", [](uintptr_t codes, uintptr_t mean, uintptr_t scale, uintptr_t table, uintptr_t values,
                     int64_t rows, int64_t dim, int64_t row_bytes, int bits, int threads) {
    py::gil_scoped_release release;
    jz3::decode(at<const uint8_t>(codes), at<const float>(mean), at<const float>(scale), at<const float>(table),
                at<float>(values), rows, dim, row_bytes, bits, threads);
  });
  m.def("score_topk", [](uintptr_t codes, uintptr_t levels, uintptr_t planes, uintptr_t step, uintptr_t bias,
                         uintptr_t row_scale, uintptr_t ids, uintptr_t groups, uintptr_t values, uintptr_t found,
                         int64_t rows, int64_t dim, int64_t row_bytes, int64_t queries, int64_t count, int64_t k,
                         int bits, int isa, int threads) {
    py::gil_scoped_release release;
    jz3::score_topk({at<const uint8_t>(codes), at<const int8_t>(levels), at<const int8_t>(planes),
                     at<const double>(step), at<const double>(bias), at<const float>(row_scale),
                     at<const int64_t>(ids), at<const int64_t>(groups), at<float>(values), at<int64_t>(found), rows,
                     dim, row_bytes, queries, count, k, bits, isa},
                    threads);
  });
}
