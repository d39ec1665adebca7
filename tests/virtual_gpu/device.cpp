// A CUDA device made of host memory that only torch's own operators may touch.
//
// Its tensors are real tensors on `cuda:0`. Every operator runs on the CPU over the same bytes; the pages
// are closed otherwise, so that host code that follows a device pointer ends as it does beside a GPU. An
// operator that mixes devices is refused as CUDA refuses it. Loaded before torch, which asks for a GPU once.
#include <ATen/SDPBackend.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
constexpr size_t kPage = 4096;

// How many operators that run now use a mapping, by its address.
std::mutex mutex;
std::unordered_map<void*, std::pair<size_t, int>> mappings;
int64_t waits = 0;

void open(void* pages) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = mappings.find(pages);
  if (found != mappings.end() && found->second.second++ == 0)
    mprotect(pages, found->second.first, PROT_READ | PROT_WRITE);
}

void close(void* pages) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = mappings.find(pages);
  if (found != mappings.end() && --found->second.second == 0)
    mprotect(pages, found->second.first, PROT_NONE);
}

void release(void* pages) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = mappings.find(pages);
  munmap(pages, found->second.first);
  mappings.erase(found);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    size_t size = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
    void* pages = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(pages != MAP_FAILED, "out of memory of the virtual GPU: ", bytes, " bytes");
    std::lock_guard<std::mutex> lock(mutex);
    mappings[pages] = {size, 0};
    return {pages, pages, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    open(to);
    open(const_cast<void*>(from));
    std::memcpy(to, from, bytes);
    close(const_cast<void*>(from));
    close(to);
  }
} memory;

// The CPU's view of every device storage that an operator was given.
struct Views {
  struct Pair {
    c10::Storage device, host;
    c10::DispatchKeySet keys;  // of a view, also while inference mode makes new tensors without autograd's
  };
  std::vector<Pair> pairs;

  ~Views() {
    for (auto& pair : pairs) close(pair.device.mutable_data());
  }

  const c10::Storage& host(const c10::Storage& device, c10::DispatchKeySet keys) {
    for (auto& pair : pairs)
      if (pair.device.unsafeGetStorageImpl() == device.unsafeGetStorageImpl()) return pair.host;
    void* data = device.mutable_data();
    open(data);
    c10::Storage host(c10::Storage::use_byte_size_t(), device.nbytes(), at::DataPtr(data, at::kCPU),
                      c10::GetAllocator(at::kCPU), true);
    pairs.push_back({device, host, keys});
    return pairs.back().host;
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    auto seen = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(host(tensor.storage(), tensor.key_set())),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    auto* impl = seen.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) impl->_set_conj(true);
    if (tensor.is_neg()) impl->_set_neg(true);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return seen;
  }

  // What an operator made on the CPU, on the device: a view of what was there, or a copy.
  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    at::Tensor made;
    for (auto& pair : pairs)
      if (pair.host.unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl())
        made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(pair.device), pair.keys,
                                                        tensor.dtype());
    if (!made.defined()) {
      size_t bytes = tensor.storage().nbytes();
      c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, memory.allocate(bytes), &memory, true);
      memory.copy_data(storage.mutable_data(), tensor.storage().data(), bytes);
      made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                      c10::DispatchKeySet(c10::DispatchKey::CUDA), tensor.dtype());
    }
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return made;
  }

  // Sizes and memory of a tensor that was written and may have grown.
  void adopt(const at::Tensor& tensor, const at::Tensor& seen) {
    for (auto& pair : pairs) {
      if (pair.host.unsafeGetStorageImpl() != seen.storage().unsafeGetStorageImpl()) continue;
      if (pair.host.data() == pair.device.data()) break;
      size_t bytes = pair.host.nbytes();
      auto grown = memory.allocate(bytes);
      if (bytes) memory.copy_data(grown.get(), pair.host.data(), bytes);
      close(pair.device.mutable_data());
      pair.device.set_data_ptr(std::move(grown));
      pair.device.set_nbytes(bytes);
      open(pair.device.mutable_data());
      break;
    }
    if (tensor.sizes() != seen.sizes() || tensor.strides() != seen.strides() ||
        tensor.storage_offset() != seen.storage_offset())
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
  }
};

// CUDA takes numbers of the host beside tensors of its own.
bool has_cpu_data(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;
}

void check_devices(const std::string& name, const std::vector<at::Tensor>& tensors) {
  if (name == "aten::copy_") return;
  bool indexes = name.rfind("aten::index.", 0) == 0 || name.find("index_put") != std::string::npos;
  bool on_device = false, on_host = false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    on_device |= tensors[i].defined() && tensors[i].is_cuda();
    on_host |= has_cpu_data(tensors[i]) && !(indexes && i > 0 && at::isIntegralType(tensors[i].scalar_type(), true));
  }
  if (!on_device || !on_host) return;
  std::string shapes;
  for (auto& tensor : tensors)
    if (tensor.defined()) shapes += " " + tensor.device().str() + c10::str(tensor.sizes());
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", name, " got", shapes);
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.operator_name().name + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const size_t count = schema.arguments().size();
  auto arguments = torch::jit::last(*stack, count).vec();
  if (name == "aten::_fused_sdp_choice") {  // The CPU's choice would be a kernel of its own.
    torch::jit::drop(*stack, count);
    torch::jit::push(*stack, static_cast<int64_t>(at::SDPBackend::math));
    return;
  }
  if (name == "aten::_local_scalar_dense" || name == "aten::nonzero" || name == "aten::equal") ++waits;
  if (name == "aten::copy_" && arguments[0].toTensor().is_cpu()) ++waits;

  Views views;
  std::vector<at::Tensor> given;
  bool on_host = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  auto seen = [&](const at::Tensor& tensor, bool write) {
    given.push_back(tensor);
    auto host = views.host(tensor);
    if (write && tensor.defined() && tensor.is_cuda()) written.emplace_back(tensor, host);
    return host;
  };
  std::vector<c10::IValue> passed;
  for (size_t i = 0; i < count; ++i) {
    const auto& argument = arguments[i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool write = alias && alias->isWrite();
    if (argument.isTensor()) {
      passed.emplace_back(seen(argument.toTensor(), write));
    } else if (argument.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : argument.toTensorVector()) list.push_back(seen(tensor, write));
      passed.emplace_back(list);
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : argument.toOptionalTensorVector())
        list.push_back(tensor ? std::optional<at::Tensor>(seen(*tensor, write)) : std::nullopt);
      passed.emplace_back(list);
    } else if (argument.isDevice()) {
      on_host |= argument.toDevice().is_cpu();
      passed.emplace_back(c10::Device(at::kCPU));
    } else {
      passed.push_back(argument);
    }
  }
  check_devices(name, given);
  torch::jit::drop(*stack, count);
  for (auto& value : passed) stack->push_back(std::move(value));
  op.callBoxed(stack);

  for (auto& [tensor, host] : written) views.adopt(tensor, host);
  const size_t returns = schema.returns().size();
  auto results = torch::jit::last(*stack, returns).vec();
  torch::jit::drop(*stack, returns);
  size_t next = 0;
  for (size_t i = 0; i < returns; ++i) {
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite() && results[i].isTensor()) {
      // What was written is returned itself: on the host it may be a CPU tensor (`copy_` to the host).
      bool kept = false;
      for (; next < count && !kept; ++next) {
        const auto* of = schema.arguments()[next].alias_info();
        if (of && of->isWrite() && arguments[next].isTensor()) {
          stack->push_back(arguments[next]);
          kept = true;
        }
      }
      TORCH_CHECK(kept, name, " returns what it was not given");
    } else if (results[i].isTensor() && !on_host) {
      stack->emplace_back(views.device(results[i].toTensor()));
    } else if (results[i].isTensorList() && !on_host) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : results[i].toTensorVector()) list.push_back(views.device(tensor));
      stack->emplace_back(list);
    } else {
      stack->push_back(results[i]);
    }
  }
}

at::Tensor& set_strided(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef sizes,
                        c10::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source) {
  const int64_t count = source.nbytes() / self.itemsize();
  return set_strided(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_strided(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

// Torch looks its hooks up by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(at::kCPU); }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : {"copy_", "_fused_sdp_choice"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_strided);
  library.impl("set_.source_Tensor", &set_tensor);
}

// How often the host has waited for the device: for a number, a count of elements, or a tensor it fetched.
extern "C" int64_t virtual_gpu_waits() { return waits; }
