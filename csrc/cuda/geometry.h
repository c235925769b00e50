// How a block holds one sample in shared memory, and how its threads share the work.
//
// Two states lie behind the filters of one step. A state has a border of zeros, so that no convolution asks where the
// image ends, and rows up to a multiple of kStripRows. Its planes are an odd number of elements apart: threads that
// work on 32 channels read 32 banks.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "api.h"
#include "divide.h"

namespace rnf::cuda {

constexpr int kMostThreads = 512;    // leaves each thread 128 registers
constexpr int kFewestThreads = 128;  // gradients of the filters share work in another way than convolutions do
constexpr int64_t kMostChannels = 32;
constexpr int kStripRows = 4;  // a thread's share of a convolution: as many pixels below each other
constexpr int kGroup = 8;      // of as many channels

struct Geometry {
  int channels, height, width;
  int groups, strips;
  int padding, pitch, plane, state;
  int filters;  // of one step, with zeros for the channels that the last group lacks
  int items, threads;
  Divider by_channels, by_height, by_width, by_strips;

  // For shapes with flow_shared_bytes(shape) > 0.
  static Geometry of(const FlowShape& s) {
    Geometry g{};
    const int kernel = static_cast<int>(s.kernel);
    g.channels = static_cast<int>(s.channels), g.height = static_cast<int>(s.height);
    g.width = static_cast<int>(s.width);
    g.groups = (g.channels + kGroup - 1) / kGroup;
    g.strips = (g.height + kStripRows - 1) / kStripRows;
    g.padding = kernel / 2, g.pitch = g.width + 2 * g.padding;
    g.plane = (g.strips * kStripRows + 2 * g.padding) * g.pitch | 1;
    g.state = g.channels * g.plane;
    g.filters = g.groups * kGroup * g.channels * kernel * kernel;
    g.items = g.groups * g.strips * g.width;
    const int passes = (g.items + kMostThreads - 1) / kMostThreads;
    g.threads = (((g.items + passes - 1) / passes) + 31) / 32 * 32;
    if (g.threads < kFewestThreads) g.threads = kFewestThreads;
    g.by_channels = Divider::by(g.channels), g.by_height = Divider::by(g.height);
    g.by_width = Divider::by(g.width), g.by_strips = Divider::by(g.strips);
    return g;
  }
  int64_t shared_bytes() const { return static_cast<int64_t>(sizeof(float)) * (filters + 2 * state); }

  __device__ __forceinline__ int at(int channel, int row, int column) const {
    return channel * plane + (row + padding) * pitch + column + padding;
  }
};

// Calls body(k) with k as a type, and returns what it returns.
template <class Body>
cudaError_t with_kernel_size(const FlowShape& shape, const Body& body) {
  switch (shape.kernel) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 5>{});
  }
}

}  // namespace rnf::cuda
