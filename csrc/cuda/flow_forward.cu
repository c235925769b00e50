// All steps of a flow in one launch. A block takes one sample into shared memory, goes through all steps there and
// writes the result: device memory sees the input once and the output once; the filters come from L2.
#include <limits>

#include "convolve.cuh"
#include "launch.h"

namespace rnf::cuda {
namespace {

template <int K>
__global__ void __launch_bounds__(kMostThreads) flow_forward_kernel(const Geometry g, const FlowForward p) {
  const SharedMemory shared(g);
  const Activation activation{p.negative_slope, p.step_size};
  const int64_t sample = blockIdx.x, bank = static_cast<int64_t>(g.channels) * g.channels * K * K;
  float* z = shared.first;
  float* next = shared.second;
  clear_states(g, shared);
  __syncthreads();
  load_state(g, of_sample(p.input, sample), z);
  for (int64_t k = 0; k < p.shape.steps; ++k) {
    const int64_t n = p.shape.shared ? 0 : k;
    if (k == 0 || !p.shape.shared) load_filters<K, false>(g, p.weight + n * bank, shared.filters);
    __syncthreads();  // z and filters are there
    if (p.trajectory) store_state(g, z, of_sample(of_step(p.output, k), sample));
    if (p.states.first.data != nullptr) store_state(g, z, of_sample(of_step(p.states, k), sample));
    const View<float> slopes = p.slopes.first.data != nullptr ? of_sample(of_step(p.slopes, k), sample) : View<float>{};
    const float* const bias = p.bias != nullptr ? p.bias + n * g.channels : nullptr;
    euler_step<K>(g, activation, shared.filters, bias, z, next, slopes);
    __syncthreads();  // next is there, z and filters are free
    float* const swap = z;
    z = next;
    next = swap;
  }
  store_state(g, z, of_sample(of_step(p.output, p.trajectory ? p.shape.steps : 0), sample));
}

}  // namespace

int64_t flow_shared_bytes(const FlowShape& s) {
  const bool kernel = s.kernel == 1 || s.kernel == 3 || s.kernel == 5;
  const bool counts = s.batch >= 0 && s.batch <= std::numeric_limits<int>::max() && s.steps >= 1 && s.channels >= 1 &&
                      s.channels <= kMostChannels && s.height >= 1 && s.width >= 1;
  // Of the sizes, so that no product of them overflows; of the state, so that Divider is exact.
  if (!kernel || !counts || s.height >= Divider::kLimit || s.width >= Divider::kLimit) return 0;
  const int64_t padded = (s.height + kStripRows + s.kernel) * (s.width + s.kernel) * s.channels;
  return padded < Divider::kLimit ? Geometry::of(s).shared_bytes() : 0;
}

bool flow_fits(const FlowShape& s, int64_t shared_bytes) {
  const int64_t bytes = flow_shared_bytes(s);
  return bytes > 0 && bytes <= shared_bytes;
}

cudaError_t flow_forward(const FlowForward& p, cudaStream_t stream) {
  if (flow_shared_bytes(p.shape) == 0) return cudaErrorInvalidValue;
  if (p.shape.batch == 0) return cudaSuccess;
  const Geometry g = Geometry::of(p.shape);
  return with_kernel_size(p.shape, [&](auto kernel) {
    return launch(flow_forward_kernel<decltype(kernel)::value>, dim3(static_cast<unsigned>(p.shape.batch)),
                  dim3(static_cast<unsigned>(g.threads)), g.shared_bytes(), stream, g, p);
  });
}

}  // namespace rnf::cuda
