// What the CUDA kernels compute, as plain structs of device pointers: no PyTorch in this folder, so that nvcc builds it
// in seconds, and a CPU compiler builds it for the tests (tests/native/cuda_shim).
//
// All functions enqueue work on `stream`, which must belong to the current device, and return at once. Elements are
// float32; no alignment beyond theirs is asked for.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace rnf::cuda {

// A (B, C, H, W) tensor with any strides, counted in elements; offsets within a sample fit 32 bits.
template <class T>
struct View {
  T* data;  // nullptr: not there
  int64_t batch;
  int32_t channel, row, column;
};

// Several of them, one a step or one a state.
template <class T>
struct Views {
  View<T> first;
  int64_t stride;  // 0 for a gradient that is expanded over the states
};

struct FlowShape {
  int64_t batch, channels, height, width, kernel, steps;
  bool shared;  // one filter bank (C, C, k, k) for all steps instead of (N, C, C, k, k)
  int64_t banks() const { return shared ? 1 : steps; }
  int64_t bank_size() const { return channels * channels * kernel * kernel; }
};

struct FlowForward {
  FlowShape shape;
  float step_size, negative_slope;
  View<const float> input;
  const float* weight;  // (banks, C, C, k, k) contiguous
  const float* bias;    // (banks, C) contiguous or nullptr
  Views<float> output;
  bool trajectory;              // all N + 1 states are wanted, not only the last one
  Views<float> states, slopes;  // states that enter the steps and slopes h s'(u), to be saved if there is room for them
};

struct FlowBackward {
  FlowShape shape;
  float step_size, negative_slope;
  Views<const float> grad_output;
  bool trajectory;  // as in FlowForward
  View<const float> input;
  const float* weight;
  const float* bias;
  Views<float> states, slopes;  // as saved by the forward pass, or to be computed again; never written
  View<float> grad_input;       // data == nullptr: not wanted; the same for the next two
  float* grad_weight;           // (banks, C, C, k, k) contiguous
  float* grad_bias;             // (banks, C) contiguous
};

// How a backward pass uses the device it was planned for.
struct BackwardPlan {
  int64_t blocks;           // that run at the same time, each going through its share of the samples
  int64_t workspace_bytes;  // for flow_backward's `workspace`
};

enum class Norm : int64_t { two, two_sharp, inf, one };
enum class Reduction : int64_t { sum, mean, none };

struct Penalty {
  int64_t steps, channels, kernel;
  double rate, slope_low, slope_high;
  Norm norm;
  Reduction reduction;
  const float* weight;  // (N, C, C, k, k) contiguous
  float* value;         // one, or (N, C) without reduction
  float* coefficients;  // (N, 3, C): derivatives of each channel's term for centre tap, row sum and column sum
};

struct PenaltyBackward {
  int64_t steps, channels, kernel;
  const float* grad_output;  // one, or (N, C)
  bool per_channel;
  const float* weight;
  const float* coefficients;
  float* grad_weight;
};

// Shared memory that one block takes to hold a sample for all steps, in either direction; 0 where there is no kernel
// for the shape. Arithmetic only: no device is asked.
int64_t flow_shared_bytes(const FlowShape&);
// Whether a device that lets one block have `shared_bytes` of shared memory can run it.
bool flow_fits(const FlowShape&, int64_t shared_bytes);

cudaError_t flow_forward(const FlowForward&, cudaStream_t stream);
cudaError_t plan_flow_backward(const FlowBackward&, BackwardPlan* plan);
cudaError_t flow_backward(const FlowBackward&, const BackwardPlan&, void* workspace, cudaStream_t stream);

int64_t penalty_workspace_bytes(const Penalty&);
cudaError_t contraction_penalty(const Penalty&, void* workspace, cudaStream_t stream);
cudaError_t contraction_penalty_backward(const PenaltyBackward&, cudaStream_t stream);

}  // namespace rnf::cuda
