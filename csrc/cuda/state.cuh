// One sample's state in shared memory: cleared, loaded from and stored to tensors with any strides.
#pragma once
#include "geometry.h"

namespace rnf::cuda {

extern __shared__ float4 shared_memory[];

struct SharedMemory {
  float *filters, *first, *second;
  __device__ __forceinline__ explicit SharedMemory(const Geometry& g)
      : filters(reinterpret_cast<float*>(shared_memory)), first(filters + g.filters), second(first + g.state) {}
};

template <class T>
__device__ __forceinline__ View<T> of_sample(View<T> view, int64_t sample) {
  view.data += sample * view.batch;
  return view;
}
template <class T>
__device__ __forceinline__ View<T> of_step(const Views<T>& views, int64_t k) {
  View<T> view = views.first;
  view.data += k * views.stride;
  return view;
}
template <class T>
__device__ __forceinline__ T& element(const View<T>& view, int channel, int row, int column) {
  return view.data[channel * view.channel + row * view.row + column * view.column];
}

// Calls visit(channel, row, column) for all elements, neighbouring threads on what lies together in `order`.
template <class T, class Visit>
__device__ __forceinline__ void for_each_element(const Geometry& g, const View<T>& order, const Visit& visit) {
  const int count = g.channels * g.height * g.width;
  if (order.channel == 1) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int pixel = g.by_channels.quotient(i), row = g.by_width.quotient(pixel);
      visit(i - pixel * g.channels, row, pixel - row * g.width);
    }
  } else {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int line = g.by_width.quotient(i), channel = g.by_height.quotient(line);
      visit(channel, line - channel * g.height, i - line * g.width);
    }
  }
}

// Zero in both states: their borders stay so.
__device__ __forceinline__ void clear_states(const Geometry& g, const SharedMemory& shared) {
  for (int i = threadIdx.x; i < 2 * g.state; i += blockDim.x) shared.first[i] = 0.0f;
}

template <class T>
__device__ __forceinline__ void load_state(const Geometry& g, const View<T>& from, float* state) {
  for_each_element(g, from,
                   [&](int c, int row, int column) { state[g.at(c, row, column)] = element(from, c, row, column); });
}

__device__ __forceinline__ void store_state(const Geometry& g, const float* state, const View<float>& to) {
  for_each_element(g, to,
                   [&](int c, int row, int column) { element(to, c, row, column) = state[g.at(c, row, column)]; });
}

}  // namespace rnf::cuda
