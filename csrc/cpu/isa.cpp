// What this machine can run. AMX needs the kernel's permission once per process.
#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jz3 {
namespace {

constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;  // of leaf 7's edx

bool has_amx(unsigned kind) {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (AMX_TILE | kind)) != (AMX_TILE | kind)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    return has_amx(AMX_INT8) ? Isa::amx : Isa::avx512vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

std::atomic<int>& chosen_tiles() {
  static std::atomic<int> chosen{int(has_amx(AMX_BF16) ? TileUnit::amx : TileUnit::none)};
  return chosen;
}

VectorUnit best_vectors() {
#ifdef JZ3_BF16
  if (has_bf16()) return VectorUnit::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return VectorUnit::avx2;
#endif
  return VectorUnit::none;
}

std::atomic<int>& chosen_vectors() {
  static std::atomic<int> chosen{int(best_vectors())};
  return chosen;
}

}  // namespace

bool has_bf16() {
#ifdef JZ3_BF16
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

VectorUnit vector_unit() { return VectorUnit(chosen_vectors().load(std::memory_order_relaxed)); }

void choose_vector_unit(int unit) {
  if (unit < 0 || unit > int(best_vectors())) throw std::invalid_argument("this machine has no such vector unit");
  chosen_vectors() = unit;
}

TileUnit tile_unit() { return TileUnit(chosen_tiles().load(std::memory_order_relaxed)); }

void choose_tile_unit(int unit) {
  if (unit == int(TileUnit::amx) && !has_amx(AMX_BF16)) throw std::invalid_argument("this machine has no AMX for bfloat16");
  chosen_tiles() = unit;
}

Isa choose_isa(int asked) {
  static const Isa best = best_isa();
  if (asked < 0) return best;
  if (asked == int(Isa::emulated_tiles) || asked <= int(best)) return Isa(asked);
  throw std::invalid_argument("this machine can't run " + std::string(isa_name(Isa(asked))));
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::amx:
      return "amx";
    case Isa::emulated_tiles:
      return "emulated tiles";
  }
  return "an unknown instruction set";
}

}  // namespace jz3
