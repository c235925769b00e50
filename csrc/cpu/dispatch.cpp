// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "api.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnf {
namespace {

enum Level { kPortable, kAvx2, kAvx512, kAvx512BFloat16, kAmx };

// Whether there are dot products in bfloat16 (AVX512_BF16).
bool dot_products() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
#else
  return false;
#endif
}

// Whether there is a tile unit for bfloat16 as well and the system lets this process use it: it asks for that.
bool tile_unit() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!dot_products() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Level supported() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return tile_unit() ? kAmx : dot_products() ? kAvx512BFloat16 : kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

// Dot products in bfloat16 run at the rate of float's on Intel's processors, where they lose (docs/kernels.md).
Level preferred() {
  const Level best = supported();
#ifdef __x86_64__
  if (best == kAvx512BFloat16 && !__builtin_cpu_is("amd")) return kAvx512;
#endif
  return best;
}

Level requested() {
  const Level best = supported();
  const char* name = std::getenv("RNF_CPU_ISA");
  if (name == nullptr) return preferred();
  const Level wanted = !std::strcmp(name, "portable")      ? kPortable
                       : !std::strcmp(name, "avx2")        ? kAvx2
                       : !std::strcmp(name, "avx512")      ? kAvx512
                       : !std::strcmp(name, "avx512_bf16") ? kAvx512BFloat16
                       : !std::strcmp(name, "amx")         ? kAmx
                                                           : preferred();  // another word
  return wanted < best ? wanted : best;  // downwards only: more than the processor has would crash
}

}  // namespace

const Kernels& kernels() {
  static const Level level = requested();
#ifdef __x86_64__
  if (level == kAmx) return amx::kernels;
  if (level == kAvx512BFloat16) return avx512_bf16::kernels;
  if (level == kAvx512) return avx512::kernels;
  if (level == kAvx2) return avx2::kernels;
#endif
  return portable::kernels;
}

const char* supported_isas() {
  switch (supported()) {
    case kAmx:
      return "amx avx512_bf16 avx512 avx2 portable";
    case kAvx512BFloat16:
      return "avx512_bf16 avx512 avx2 portable";
    case kAvx512:
      return "avx512 avx2 portable";
    case kAvx2:
      return "avx2 portable";
    default:
      return "portable";
  }
}

}  // namespace rnf
