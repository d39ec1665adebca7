// A CUDA runtime that launches nothing: it notes what the launchers of segment_project and score_topk ask for, so that
// their host code runs in tests without a driver. Linked with the objects that nvcc makes of their csrc/cuda/*.cu.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

std::map<const void*, std::string> names;
std::string record;
dim3 grid, block;
size_t shared;
cudaStream_t stream;
int allowed = 0, most_shared = 227 << 10;
cudaError_t last = cudaSuccess;
std::vector<int64_t> first_queries;  // of each launch of score_topk

CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* pitch, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  char line[400];
  snprintf(line, sizeof line,
           "map type=%d rank=%u at=%p sizes=%lu,%lu pitch=%lu box=%u,%u steps=%u,%u interleave=%d swizzle=%d fill=%d\n",
           int(type), rank, address, sizes[0], sizes[1], pitch[0], box[0], box[1], steps[0], steps[1], int(interleave),
           int(swizzle), int(fill));
  record += line;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t bytes, cudaStream_t s) {
  grid = g, block = b, shared = bytes, stream = s;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* bytes, void* s) {
  *g = grid, *b = block, *bytes = shared, *static_cast<cudaStream_t*>(s) = stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 g, dim3 b, void** arguments, size_t bytes, cudaStream_t s) {
  char line[400];
  if (names[kernel].rfind("jz3_score_", 0) == 0)
    first_queries.push_back(static_cast<const jz3::ScoreCodes*>(arguments[0])->first_query);
  snprintf(line, sizeof line, "%s grid=%u,%u,%u block=%u,%u,%u shared=%zu allowed=%d stream=%p\n",
           names[kernel].c_str(), g.x, g.y, g.z, b.x, b.y, b.z, bytes, allowed, static_cast<void*>(s));
  record += line;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 g, dim3 b, void** arguments, size_t bytes, cudaStream_t s) {
  return cudaLaunchKernel(kernel, g, b, arguments, bytes, s);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) allowed = value;
  if (allowed > most_shared) last = cudaErrorInvalidValue;
  return allowed <= most_shared ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "another error";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = most_shared;
  return cudaSuccess;
}
void set_shared_memory(int most) { most_shared = most; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// runs a launcher and returns what it asked for
const char* launch(const jz3::SegmentProject* p, int kind, int bf16, int64_t groups, int64_t tokens, int sm90) {
  record.clear();
  const auto s = reinterpret_cast<cudaStream_t>(0x5);
  const cudaError_t error = sm90 ? jz3::launch_segment_project_sm90(*p, tokens, bf16, groups, s)
                                 : jz3::launch_segment_project(*p, kind, bf16, groups, s);
  if (error != cudaSuccess) record += "error " + std::to_string(int(error)) + "\n";
  return record.c_str();
}

const char* launch_sum(const jz3::SegmentSum* p, int64_t documents) {
  record.clear();
  jz3::launch_segment_sum(*p, documents, reinterpret_cast<cudaStream_t>(0x5));
  return record.c_str();
}

const char* launch_score(const jz3::ScoreCodes* p, int64_t* first) {
  record.clear();
  first_queries.clear();
  jz3::launch_score_codes(*p, reinterpret_cast<cudaStream_t>(0x5));
  std::copy(first_queries.begin(), first_queries.end(), first);
  return record.c_str();
}
}
