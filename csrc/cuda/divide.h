// Division by a number that only the host knows, as one multiplication: index arithmetic would else cost as much as the
// convolution of a small state.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace rnf::cuda {

// n / divisor = high word of n * m with m = floor(2^32 / divisor) + 1. m * divisor exceeds 2^32 by at most `divisor`,
// so the quotient is exact for n * divisor < 2^32: for n and divisor below kLimit.
struct Divider {
  static constexpr int kLimit = 1 << 16;
  int divisor;
  unsigned multiplier;  // 0 stands for 2^32 + 1, of a division by one

  static Divider by(int64_t divisor) {
    const uint64_t multiplier = (uint64_t{1} << 32) / static_cast<uint64_t>(divisor) + 1;
    return {static_cast<int>(divisor), divisor == 1 ? 0u : static_cast<unsigned>(multiplier)};
  }
  __device__ __forceinline__ int quotient(int n) const {
    return multiplier == 0 ? n : static_cast<int>(__umulhi(static_cast<unsigned>(n), multiplier));
  }
};

}  // namespace rnf::cuda
