// Gradients of filters and biases from v and z in shared memory, added to the block's own sums in device memory.
//
//   dW[o, c, di, dj] += sum over pixels of v[o, i, j] z[c, i + di - p, j + dj - p];   db[o] += sum of v[o]
//
// A thread takes one input channel, one or two output channels and all taps, and slides along the rows: k new elements
// of z and one or two of v a pixel for k^2 products each. Where that leaves threads without work, the rows are shared
// out, and the shares added in order: the same bits whenever they are computed.
#pragma once
#include "launch.h"
#include "state.cuh"

namespace rnf::cuda {

template <int K>
struct Correlation {
  static constexpr int kOutputs = K == 5 ? 1 : 2;  // what the registers hold
  float sum[kOutputs][K * K] = {};

  __device__ __forceinline__ void add(const Geometry& g, const float* z, const float* v, int second, int row, int end) {
    for (; row < end; ++row) {
      const float* const from = z + row * g.pitch;
      const float* const with = v + g.at(0, row, 0);
      float window[K][K];
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 1; j < K; ++j) window[i][j] = from[i * g.pitch + j - 1];
      }
#pragma unroll K
      for (int column = 0; column < g.width; ++column) {
        float value[kOutputs];
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) value[o] = with[column + o * second];
#pragma unroll
        for (int i = 0; i < K; ++i) {
#pragma unroll
          for (int j = 0; j + 1 < K; ++j) window[i][j] = window[i][j + 1];
          window[i][K - 1] = from[i * g.pitch + column + K - 1];
#pragma unroll
          for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) sum[o][i * K + j] = fmaf(value[o], window[i][j], sum[o][i * K + j]);
          }
        }
      }
    }
  }
};

// `partial` is shared memory for the filters of one step; the caller's last barrier is behind all reading of it.
template <int K>
__device__ __forceinline__ void add_filter_gradient(const Geometry& g, const float* z, const float* v, float* partial,
                                                    float* total) {
  constexpr int kOutputs = Correlation<K>::kOutputs, kTaps = K * K, kMostSlices = 8;
  const int threads = static_cast<int>(blockDim.x), items = (g.channels + kOutputs - 1) / kOutputs * g.channels;
  const int slices = max(1, min(min(threads / items, kMostSlices), g.height));
  for (int first = 0; first < items * slices; first += threads) {  // once if there are several slices
    const int unit = first + static_cast<int>(threadIdx.x), slice = unit / items, item = unit - slice * items;
    const bool active = unit < items * slices;
    const int outs = g.by_channels.quotient(item), in = item - outs * g.channels, out = outs * kOutputs;
    const bool second = out + 1 < g.channels;
    Correlation<K> correlation;
    if (active)
      correlation.add(g, z + in * g.plane, v + out * g.plane, second ? g.plane : 0, slice * g.height / slices,
                      (slice + 1) * g.height / slices);
    const auto add_to = [&](float* sums, bool fresh) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        float* const sum = sums + ((out + o) * g.channels + in) * kTaps;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap)
          if (o == 0 || second) sum[tap] = (fresh ? 0.0f : sum[tap]) + correlation.sum[o][tap];
      }
    };
    if (slices == 1) {
      if (active) add_to(total, false);
      continue;
    }
    for (int turn = 0; turn < slices; ++turn) {
      __syncthreads();  // the turn before is added; before the first, nobody reads filters any more
      if (active && slice == turn) add_to(partial, turn == 0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < g.channels * g.channels * kTaps; i += threads) total[i] += partial[i];
  }
}

// One warp a channel.
__device__ __forceinline__ void add_bias_gradient(const Geometry& g, const float* v, float* total) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int channel = warp; channel < g.channels; channel += static_cast<int>(blockDim.x) / kWarp) {
    float sum = 0.0f;
    for (int i = lane; i < g.height * g.width; i += kWarp) {
      const int row = g.by_width.quotient(i);
      sum += v[g.at(channel, row, i - row * g.width)];
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) total[channel] += sum;
  }
}

}  // namespace rnf::cuda
