// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "api.h"

namespace rnf {
namespace {

enum Level { kPortable, kAvx2, kAvx512 };

Level supported() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

Level requested() {
  const Level best = supported();
  const char* name = std::getenv("RNF_CPU_ISA");
  if (name == nullptr) return best;
  const Level wanted = !std::strcmp(name, "portable") ? kPortable : !std::strcmp(name, "avx2") ? kAvx2 : kAvx512;
  return wanted < best ? wanted : best;  // downwards only: more than the processor has would crash
}

}  // namespace

const Kernels& kernels() {
  static const Level level = requested();
#ifdef __x86_64__
  if (level == kAvx512) return avx512::kernels;
  if (level == kAvx2) return avx2::kernels;
#endif
  return portable::kernels;
}

const char* supported_isas() {
  switch (supported()) {
    case kAvx512:
      return "avx512 avx2 portable";
    case kAvx2:
      return "avx2 portable";
    default:
      return "portable";
  }
}

}  // namespace rnf
