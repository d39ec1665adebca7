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
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
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
  m.def("score_codes",
        [](uintptr_t codes, uintptr_t fragments, uintptr_t step, uintptr_t bias, uintptr_t row_scale,
           uintptr_t scores, int64_t rows, int64_t row_bytes, int64_t queries, int bits,
           const std::vector<uint32_t>& levels, uintptr_t stream) {
          jz3::ScoreCodes p{at<const uint8_t>(codes), at<const uint32_t>(fragments), at<const double>(step),
                            at<const double>(bias),   at<const float>(row_scale),    at<float>(scores),
                            rows,                     row_bytes,                     queries,
                            bits,                     {0, 0, 0, 0}};
          for (size_t i = 0; i < levels.size() && i < 4; ++i) p.levels[i] = levels[i];
          check(jz3::launch_score_codes(p, at<CUstream_st>(stream)));
        });
}
