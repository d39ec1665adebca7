// jz3._cuda: the CUDA kernels for Python. Device addresses and a stream come from torch; the CUDA runtime is linked
// in, so that the module can be imported where there is no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, or the next launch would be taken to have failed of it
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

std::vector<std::string> archs() {
  std::vector<std::string> names;
  std::stringstream text(JZ3_CUDA_ARCHS);
  for (std::string name; std::getline(text, name, ';');) names.push_back(name);
  return names;
}

// Binaries of sm_XY run on devices of the same major version and at least that minor one; `a` binds to one.
bool runs_on(int major, int minor) {
  for (const std::string& name : archs()) {
    const int number = std::stoi(name);
    const bool exact = name.find_first_not_of("0123456789") != std::string::npos;
    if (number / 10 == major && (exact ? number % 10 == minor : number % 10 <= minor)) return true;
  }
  return false;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("archs", &archs);
  m.def("runs_on", &runs_on);
  m.def("sign_project",
        [](uintptr_t x, uintptr_t partial, int64_t rows, int64_t columns, int64_t projections, int64_t stride,
           uint64_t key, uint64_t first_block, int64_t piece, uintptr_t stream) {
          check(jz3::launch_sign_project({at<const uint16_t>(x), at<float>(partial), rows, columns, projections,
                                          stride, key, first_block, piece},
                                         at<CUstream_st>(stream)));
        });
  m.def(
      "segment_project",
      [](uintptr_t a, uintptr_t g, uintptr_t left, uintptr_t out, uintptr_t partial, uintptr_t slots,
         uintptr_t pieces, uintptr_t tiles, uintptr_t groups, int64_t width, int64_t outputs, int64_t columns,
         int64_t stride_a, int64_t stride_g, int64_t stride_left, float scale, int kind, bool bf16, int64_t blocks,
         int64_t tokens, bool sm90, uintptr_t stream) {
        const jz3::SegmentProject p{
            at<const uint16_t>(a),     at<const uint16_t>(g),    at<const void>(left),   at<float>(out),
            at<float>(partial),        at<const int32_t>(slots), at<const int4>(pieces), at<const int32_t>(tiles),
            at<const int32_t>(groups), width,                    outputs,                columns,
            stride_a,                  stride_g,                 stride_left,            scale};
        check(sm90 ? jz3::launch_segment_project_sm90(p, tokens, bf16, blocks, at<CUstream_st>(stream))
                   : jz3::launch_segment_project(p, kind, bf16, blocks, at<CUstream_st>(stream)));
      },
      py::kw_only(), py::arg("a"), py::arg("g"), py::arg("left"), py::arg("out"), py::arg("partial"),
      py::arg("slots"), py::arg("pieces"), py::arg("tiles"), py::arg("groups"), py::arg("width"),
      py::arg("outputs"), py::arg("columns"), py::arg("stride_a"), py::arg("stride_g"), py::arg("stride_left"),
      py::arg("scale"), py::arg("kind"), py::arg("bf16"), py::arg("blocks"), py::arg("tokens"), py::arg("sm90"),
      py::arg("stream"));
  m.def(
      "segment_sum",
      [](uintptr_t partial, uintptr_t out, uintptr_t first, uintptr_t documents, int64_t size, int64_t count,
         uintptr_t stream) {
        check(jz3::launch_segment_sum(
            {at<const float>(partial), at<float>(out), at<const int64_t>(first), at<const int64_t>(documents), size},
            count, at<CUstream_st>(stream)));
      },
      py::kw_only(), py::arg("partial"), py::arg("out"), py::arg("first"), py::arg("documents"), py::arg("size"),
      py::arg("count"), py::arg("stream"));
  m.def("score_codes",
        [](uintptr_t codes, uintptr_t fragments, uintptr_t step, uintptr_t bias, uintptr_t row_scale,
           uintptr_t scores, int64_t rows, int64_t row_bytes, int64_t queries, int bits,
           const std::vector<uint32_t>& levels, uintptr_t stream) {
          jz3::ScoreCodes p{at<const uint8_t>(codes), at<const uint32_t>(fragments), at<const double>(step),
                            at<const double>(bias),   at<const float>(row_scale),    at<float>(scores),
                            rows,                     row_bytes,                     queries,
                            0,                        bits,                          {0, 0, 0, 0}};
          for (size_t i = 0; i < levels.size() && i < 4; ++i) p.levels[i] = levels[i];
          check(jz3::launch_score_codes(p, at<CUstream_st>(stream)));
        });
}
