// Gradients of a flow in one launch, and one more to add up what the blocks found for the filters and biases.
//
// As many blocks as the device holds at a time go through the samples. A block computes its sample's flow again (or
// takes what the forward pass saved), writing states and slopes h s' of all steps into its own piece of the workspace,
// and walks back:
//
//   v = slope_k g;   dW_k += v (*) z_k;   db_k += sum(v);   g += conv'(v, W_k)
//
// v and z_k, or without gradients of the filters v and g, are in shared memory; what is left is read and written once a
// step by neighbouring threads. Blocks add gradients of filters and biases to sums of their own, which are added in
// order: the same bits in every run.
#include "convolve.cuh"
#include "correlate.cuh"
#include "launch.h"

namespace rnf::cuda {
namespace {

// Where things are in a block's piece of the workspace, counted in floats; what is not needed has no room.
struct Workspace {
  int64_t states, slopes, grad, weight_sums, bias_sums, end;
  static Workspace of(const FlowBackward& p, const Geometry& g) {
    const bool weights = p.grad_weight != nullptr;
    const int64_t sample = p.shape.channels * p.shape.height * p.shape.width, steps = p.shape.steps;
    Workspace w{};
    w.slopes = w.states + (is_saved(p) || !weights ? 0 : steps * sample);
    w.grad = w.slopes + (is_saved(p) ? 0 : steps * sample);
    w.weight_sums = w.grad + (weights ? g.state : 0);
    w.bias_sums = w.weight_sums + (weights ? p.shape.banks() * p.shape.bank_size() : 0);
    w.end = w.bias_sums + (p.grad_bias != nullptr ? p.shape.banks() * p.shape.channels : 0);
    return w;
  }
  static bool is_saved(const FlowBackward& p) { return p.slopes.first.data != nullptr; }
};

// Room in the workspace for what each step leaves, as tensors whose "batch" is the blocks.
Views<float> per_block(const Geometry& g, const Workspace& w, float* data) {
  const int area = g.height * g.width;
  return {{data, w.end, area, g.width, 1}, static_cast<int64_t>(g.channels) * area};
}

// p.states and p.slopes are the workspace's unless `saved`.
template <int K, bool kWeights>
__global__ void __launch_bounds__(kMostThreads, 1)
    flow_backward_kernel(const Geometry g, const FlowBackward p, const bool saved, const Workspace w,
                         float* workspace) {
  const SharedMemory shared(g);
  const Activation activation{p.negative_slope, p.step_size};
  const int64_t steps = p.shape.steps, bank = static_cast<int64_t>(g.channels) * g.channels * K * K;
  const bool wants_input = p.grad_input.data != nullptr;
  float* const own = workspace + blockIdx.x * w.end;
  for (int64_t i = w.weight_sums + threadIdx.x; i < w.end; i += blockDim.x) own[i] = 0.0f;
  clear_states(g, shared);

  for (int64_t sample = blockIdx.x; sample < p.shape.batch; sample += gridDim.x) {
    __syncthreads();  // the states are cleared, or the sample before is done with
    const int64_t place = saved ? sample : blockIdx.x;
    if (!saved) {
      float* z = shared.first;
      float* next = shared.second;
      load_state(g, of_sample(p.input, sample), z);
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t n = p.shape.shared ? 0 : k;
        if (k == 0 || !p.shape.shared) load_filters<K, false>(g, p.weight + n * bank, shared.filters);
        __syncthreads();  // z and filters are there
        if (kWeights) store_state(g, z, of_sample(of_step(p.states, k), place));
        const float* const bias = p.bias != nullptr ? p.bias + n * g.channels : nullptr;
        euler_step<K>(g, activation, shared.filters, bias, z, next, of_sample(of_step(p.slopes, k), place));
        __syncthreads();  // next is there, z and filters are free
        float* const swap = z;
        z = next;
        next = swap;
      }
    }

    // In the workspace the gradient lies as in shared memory, though nobody reads its border.
    float* const v = shared.first;
    float* const grad = kWeights ? own + w.grad : shared.second;
    for (int64_t k = steps - 1; k >= 0; --k) {
      const int64_t n = p.shape.shared ? 0 : k;
      const bool last = k + 1 == steps, through = k > 0 || wants_input;
      if (!last) __syncthreads();  // grad is there; v, z and filters are free
      if (through) load_filters<K, true>(g, p.weight + n * bank, shared.filters);
      const View<float> slope = of_sample(of_step(p.slopes, k), place);
      const View<const float> upstream = of_sample(of_step(p.grad_output, p.trajectory ? k + 1 : 0), sample);
      for_each_element(g, slope, [&](int c, int row, int column) {
        const int at = g.at(c, row, column);
        float total = last ? 0.0f : grad[at];
        if (last || p.trajectory) grad[at] = total += element(upstream, c, row, column);
        v[at] = element(slope, c, row, column) * total;
      });
      if (kWeights) load_state(g, of_sample(of_step(p.states, k), place), shared.second);
      __syncthreads();  // v, z and filters are there
      for (int index = threadIdx.x; index < g.items && through; index += blockDim.x) {
        const Item item(g, index);
        Convolution<K> convolution(g, item, nullptr);
        convolution.add(g, item, v, shared.filters);
        convolution.for_each(g, item,
                             [&](float sum, int channel, int row) { grad[g.at(channel, row, item.column)] += sum; });
      }
      if (p.grad_bias != nullptr) add_bias_gradient(g, v, own + w.bias_sums + n * g.channels);
      if (kWeights) add_filter_gradient<K>(g, shared.second, v, shared.filters, own + w.weight_sums + n * bank);
    }
    if (wants_input) {
      __syncthreads();  // grad is there
      const View<const float> upstream = of_sample(p.grad_output.first, sample);
      const View<float> to = of_sample(p.grad_input, sample);
      for_each_element(g, to, [&](int c, int row, int column) {
        const float total = grad[g.at(c, row, column)];
        element(to, c, row, column) = p.trajectory ? total + element(upstream, c, row, column) : total;
      });
    }
  }
}

// Adds the blocks' sums: 32 of them a block, by kTerms threads each.
constexpr int kTerms = 8;

__global__ void __launch_bounds__(kWarp* kTerms)
    add_blocks_kernel(const FlowBackward p, const Workspace w, const float* workspace, int64_t blocks) {
  double* const partial = reinterpret_cast<double*>(shared_memory) + threadIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x, weights = w.bias_sums - w.weight_sums;
  const int64_t count = w.end - w.weight_sums;
  double sum = 0.0;
  for (int64_t block = threadIdx.y; block < blocks && i < count; block += kTerms)
    sum += static_cast<double>(workspace[block * w.end + w.weight_sums + i]);
  partial[threadIdx.y * kWarp] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= count) return;
  for (int term = 1; term < kTerms; ++term) sum += partial[term * kWarp];
  (i < weights ? p.grad_weight[i] : p.grad_bias[i - weights]) = static_cast<float>(sum);
}

// Calls body(kernel) with the kernel for p.
template <class Body>
cudaError_t with_kernel(const FlowBackward& p, const Body& body) {
  return with_kernel_size(p.shape, [&](auto kernel) {
    constexpr int kKernel = decltype(kernel)::value;
    return p.grad_weight != nullptr ? body(flow_backward_kernel<kKernel, true>)
                                    : body(flow_backward_kernel<kKernel, false>);
  });
}

cudaError_t clear(float* data, int64_t count, cudaStream_t stream) {
  if (data == nullptr || count == 0) return cudaSuccess;
  return cudaMemsetAsync(data, 0, static_cast<std::size_t>(count) * sizeof(float), stream);
}

}  // namespace

cudaError_t plan_flow_backward(const FlowBackward& p, BackwardPlan* plan) {
  *plan = {0, 0};
  if (flow_shared_bytes(p.shape) == 0) return cudaErrorInvalidValue;
  if (p.shape.batch == 0) return cudaSuccess;
  const Geometry g = Geometry::of(p.shape);
  int device = 0, processors = 0, at_a_time = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = with_kernel(p, [&](auto kernel) {
      const cudaError_t allowed = allow_shared_memory(kernel, g.shared_bytes());
      if (allowed != cudaSuccess) return allowed;
      return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_a_time, kernel, g.threads,
                                                           static_cast<std::size_t>(g.shared_bytes()));
    });
  if (status != cudaSuccess) return status;
  if (at_a_time == 0) return cudaErrorInvalidConfiguration;
  const int64_t resident = static_cast<int64_t>(processors) * at_a_time;
  plan->blocks = p.shape.batch < resident ? p.shape.batch : resident;
  plan->workspace_bytes = plan->blocks * Workspace::of(p, g).end * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

cudaError_t flow_backward(const FlowBackward& p, const BackwardPlan& plan, void* workspace, cudaStream_t stream) {
  if (flow_shared_bytes(p.shape) == 0) return cudaErrorInvalidValue;
  if (p.shape.batch == 0) {
    const cudaError_t status = clear(p.grad_weight, p.shape.banks() * p.shape.bank_size(), stream);
    return status != cudaSuccess ? status : clear(p.grad_bias, p.shape.banks() * p.shape.channels, stream);
  }
  const Geometry g = Geometry::of(p.shape);
  const Workspace w = Workspace::of(p, g);
  float* const floats = static_cast<float*>(workspace);
  const bool saved = Workspace::is_saved(p);
  FlowBackward placed = p;
  if (!saved) placed.states = per_block(g, w, floats + w.states), placed.slopes = per_block(g, w, floats + w.slopes);
  const cudaError_t status = with_kernel(p, [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(g.threads)),
                  g.shared_bytes(), stream, g, placed, saved, w, floats);
  });
  const int64_t sums = w.end - w.weight_sums;
  if (status != cudaSuccess || sums == 0) return status;
  return launch(add_blocks_kernel, dim3(static_cast<unsigned>((sums + kWarp - 1) / kWarp)), dim3(kWarp, kTerms),
                static_cast<int64_t>(sizeof(double)) * kWarp * kTerms, stream, p, w, static_cast<const float*>(floats),
                plan.blocks);
}

}  // namespace rnf::cuda
