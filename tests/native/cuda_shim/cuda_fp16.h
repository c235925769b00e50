// Stands in for CUDA's header of this name: 1 bit of sign, 5 of exponent, 10 of mantissa.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  double magnitude = std::ldexp(exponent == 0 ? mantissa : 1024 + mantissa, (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? std::numeric_limits<double>::infinity() : NAN;
  return static_cast<float>(x.bits & 0x8000 ? -magnitude : magnitude);
}

inline __half __float2half_rn(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00)};  // as near to 65536 as to 65504
  // In units of the last place, whose exponent is at least that of the smallest number. A mantissa that is rounded up
  // to a power of two moves on to the next exponent by itself.
  const int exponent = magnitude == 0.0 ? -14 : std::fmax(std::ilogb(magnitude), -14);
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + static_cast<unsigned>(units)))};
}
