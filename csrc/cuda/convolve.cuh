// The convolution of a state in shared memory. A thread computes kStripRows pixels below each other of a group of
// channels: each element of the state it reads serves all channels and up to k rows, each filter serves all rows.
// Neighbouring threads have neighbouring columns: what they read lies in different banks, and their filters are the
// same, which shared memory reads once.
#pragma once
#include "activation.cuh"
#include "state.cuh"

namespace rnf::cuda {

// The filters of one step as (groups, input channels, k, k, kGroup). kTranspose: those of the gradient, which takes
// output channels to input channels and looks the other way.
template <int K, bool kTranspose>
__device__ __forceinline__ void load_filters(const Geometry& g, const float* __restrict__ weight, float* filters) {
  constexpr int kTaps = K * K;
  for (int i = threadIdx.x; i < g.filters; i += blockDim.x) {
    const int line = i / kGroup, from_group = line / kTaps, tap = line - from_group * kTaps;
    const int group = g.by_channels.quotient(from_group), in = from_group - group * g.channels;
    const int out = group * kGroup + i % kGroup;
    const int at =
        kTranspose ? (in * g.channels + out) * kTaps + (kTaps - 1 - tap) : (out * g.channels + in) * kTaps + tap;
    filters[i] = out < g.channels ? __ldg(weight + at) : 0.0f;
  }
}

// A thread's share of the output: channels from `channel` on, rows from `row` on, of which those below the image do not
// count.
struct Item {
  int group, channel, row, column;
  __device__ __forceinline__ Item(const Geometry& g, int index) {
    const int line = g.by_width.quotient(index);
    group = g.by_strips.quotient(line);
    channel = group * kGroup;
    row = (line - group * g.strips) * kStripRows;
    column = index - line * g.width;
  }
};

template <int K>
struct Convolution {
  float sum[kStripRows][kGroup];

  __device__ __forceinline__ explicit Convolution(const Geometry& g, const Item& item, const float* bias) {
#pragma unroll
    for (int o = 0; o < kGroup; ++o) {
      const float start = bias != nullptr && item.channel + o < g.channels ? __ldg(bias + item.channel + o) : 0.0f;
#pragma unroll
      for (int r = 0; r < kStripRows; ++r) sum[r][o] = start;
    }
  }

  __device__ __forceinline__ void add(const Geometry& g, const Item& item, const float* state, const float* filters) {
    constexpr int kVectors = kGroup / 4;
    const float* window = state + item.row * g.pitch + item.column;
    const float4* filter = reinterpret_cast<const float4*>(filters) + item.group * g.channels * K * K * kVectors;
#pragma unroll 1
    for (int c = 0; c < g.channels; ++c, window += g.plane, filter += K * K * kVectors) {
#pragma unroll
      for (int dj = 0; dj < K; ++dj) {
        float z[kStripRows + K - 1];
#pragma unroll
        for (int i = 0; i < kStripRows + K - 1; ++i) z[i] = window[i * g.pitch + dj];
#pragma unroll
        for (int di = 0; di < K; ++di) {
#pragma unroll
          for (int q = 0; q < kVectors; ++q) {
            const float4 w = filter[(di * K + dj) * kVectors + q];
#pragma unroll
            for (int r = 0; r < kStripRows; ++r) {
              sum[r][4 * q + 0] = fmaf(z[r + di], w.x, sum[r][4 * q + 0]);
              sum[r][4 * q + 1] = fmaf(z[r + di], w.y, sum[r][4 * q + 1]);
              sum[r][4 * q + 2] = fmaf(z[r + di], w.z, sum[r][4 * q + 2]);
              sum[r][4 * q + 3] = fmaf(z[r + di], w.w, sum[r][4 * q + 3]);
            }
          }
        }
      }
    }
  }

  // Calls visit(sum, channel, row) for all that is inside the image.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Geometry& g, const Item& item, const Visit& visit) const {
#pragma unroll
    for (int o = 0; o < kGroup; ++o) {
      if (item.channel + o < g.channels) {
#pragma unroll
        for (int r = 0; r < kStripRows; ++r)
          if (item.row + r < g.height) visit(sum[r][o], item.channel + o, item.row + r);
      }
    }
  }
};

// next = z + h s(conv(z) + bias), and h s' of the same to `slopes` if there is such a place.
template <int K>
__device__ __forceinline__ void euler_step(const Geometry& g, const Activation& activation, const float* filters,
                                           const float* bias, const float* z, float* next, const View<float>& slopes) {
  for (int index = threadIdx.x; index < g.items; index += blockDim.x) {
    const Item item(g, index);
    Convolution<K> convolution(g, item, bias);
    convolution.add(g, item, z, filters);
    convolution.for_each(g, item, [&](float u, int channel, int row) {
      const float t = Activation::exp_of_minus_abs(u);
      const int at = g.at(channel, row, item.column);
      next[at] = z[at] + activation.value(u, t);
      if (slopes.data != nullptr) element(slopes, channel, row, item.column) = activation.slope(u, t);
    });
  }
}

}  // namespace rnf::cuda
