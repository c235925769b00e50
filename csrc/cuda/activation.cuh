// Smooth leaky ReLU s(u) = a u + (1 - a) softplus(u) and its slope, from one exponential of -|u|: never overflows.
//
//   t = exp(-|u|) in (0, 1];  softplus(u) = max(u, 0) + log1p(t);  sigmoid(u) = (u >= 0 ? 1 : t) / (1 + t)
//
// fmaxf drops a NaN, t keeps it.
#pragma once
#include <cuda_runtime.h>

namespace rnf::cuda {

struct Activation {
  float negative_slope, scale;

  __device__ __forceinline__ static float exp_of_minus_abs(float u) { return expf(-fabsf(u)); }
  __device__ __forceinline__ float value(float u, float t) const {
    const float softplus = fmaxf(u, 0.0f) + log1pf(t);
    return scale * (negative_slope * u + (1.0f - negative_slope) * softplus);
  }
  __device__ __forceinline__ float slope(float u, float t) const {
    const float sigmoid = (u < 0.0f ? t : 1.0f) / (1.0f + t);
    return scale * (negative_slope + (1.0f - negative_slope) * sigmoid);
  }
};

}  // namespace rnf::cuda
