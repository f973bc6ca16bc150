#include "isa.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sl::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};  // best first
std::atomic<int> current{-1};                                       // -1: not decided yet
std::atomic<int> gathers_wish{-1};

std::string available() {
  std::string names;
  for (Isa candidate : kAll) {
    if (has_isa(candidate)) names += (names.empty() ? "" : ", ") + std::string(isa_name(candidate));
  }
  return names;
}

Isa parse(const std::string& name, const char* source) {
  for (Isa candidate : kAll) {
    if (name != isa_name(candidate)) continue;
    if (has_isa(candidate)) return candidate;
    throw std::invalid_argument(std::string(source) + ": this CPU has no " + name + "; it has " + available());
  }
  throw std::invalid_argument(std::string(source) + ": expected avx512, avx2, portable or auto, got '" + name + "'");
}

Isa from_environment() {
  const char* wish = std::getenv("SPARSELOTTERY_CPU_ISA");
  if (wish != nullptr && *wish != '\0' && std::string(wish) != "auto") return parse(wish, "SPARSELOTTERY_CPU_ISA");
  for (Isa candidate : kAll) {
    if (has_isa(candidate)) return candidate;
  }
  return Isa::kPortable;
}

}  // namespace

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPortable;
}

bool gathers() {
  const int wish = gathers_wish.load(std::memory_order_relaxed);
  if (wish >= 0) return wish != 0;
#if defined(__x86_64__)
  static const bool fast = (__builtin_cpu_init(), !__builtin_cpu_is("amd"));
  return fast;
#else
  return false;
#endif
}

void set_gathers(int wish) { gathers_wish.store(wish, std::memory_order_relaxed); }

int max_threads() { return omp_get_max_threads(); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "unknown";
}

Isa isa() {
  int value = current.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int>(from_environment());
    current.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

void set_isa(const std::string& name) {
  const Isa chosen = name == "auto" ? from_environment() : parse(name, "cpu_set_isa");
  current.store(static_cast<int>(chosen), std::memory_order_relaxed);
}

}  // namespace sl::cpu
