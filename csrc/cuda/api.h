// What the CUDA kernels compute, as plain structs of device pointers: no PyTorch in this folder, so that nvcc builds it
// in seconds, and a CPU compiler builds it for the tests (tests/native/cuda_shim).
//
// All functions enqueue work on `stream`, which must belong to the current device, and return at once. T, what tensors
// are stored in, is float, __half or __nv_bfloat16; all arithmetic is in float or double. No alignment beyond that of
// an element is asked for.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

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

// What is kept of the steps for the backward pass: in float for __half, in which slopes of small steps are denormal.
template <class T>
using Saved = std::conditional_t<std::is_same_v<T, __half>, float, T>;

template <class T>
struct FlowForward {
  FlowShape shape;
  float step_size, negative_slope;
  View<const T> input;
  const T* weight;  // (banks, C, C, k, k) contiguous
  const T* bias;    // (banks, C) contiguous or nullptr
  Views<T> output;
  bool trajectory;                 // all N + 1 states are wanted, not only the last one
  Views<Saved<T>> states, slopes;  // states that enter the steps and slopes h s'(u), to be saved if there is room
};

template <class T>
struct FlowBackward {
  FlowShape shape;
  float step_size, negative_slope;
  Views<const T> grad_output;
  bool trajectory;  // as in FlowForward
  View<const T> input;
  const T* weight;
  const T* bias;
  Views<Saved<T>> states, slopes;  // as saved by the forward pass, or to be computed again; never written
  View<T> grad_input;              // data == nullptr: not wanted; the same for the next two
  T* grad_weight;                  // (banks, C, C, k, k) contiguous
  T* grad_bias;                    // (banks, C) contiguous
};

// How a backward pass uses the device it was planned for.
struct BackwardPlan {
  int64_t blocks;           // that run at the same time, each going through its share of the samples
  int64_t workspace_bytes;  // for flow_backward's `workspace`
};

enum class Norm : int64_t { two, two_sharp, inf, one };
enum class Reduction : int64_t { sum, mean, none };

template <class T>
struct Penalty {
  int64_t steps, channels, kernel;
  double rate, slope_low, slope_high;
  Norm norm;
  Reduction reduction;
  const T* weight;  // (N, C, C, k, k) contiguous
  T* value;         // one, or (N, C) without reduction
  T* coefficients;  // (N, 3, C): derivatives of each channel's term for centre tap, row sum and column sum
};

template <class T>
struct PenaltyBackward {
  int64_t steps, channels, kernel;
  const T* grad_output;  // one, or (N, C)
  bool per_channel;
  const T* weight;
  const T* coefficients;
  T* grad_weight;
};

// Shared memory that one block takes to hold a sample for all steps, in either direction; 0 where there is no kernel
// for the shape and T. Arithmetic only: no device is asked.
template <class T>
int64_t flow_shared_bytes(const FlowShape&);

template <class T>
cudaError_t flow_forward(const FlowForward<T>&, cudaStream_t stream);
template <class T>
cudaError_t plan_flow_backward(const FlowBackward<T>&, BackwardPlan* plan);
template <class T>
cudaError_t flow_backward(const FlowBackward<T>&, const BackwardPlan&, void* workspace, cudaStream_t stream);

int64_t penalty_workspace_bytes(int64_t steps, int64_t channels);
template <class T>
cudaError_t contraction_penalty(const Penalty<T>&, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t contraction_penalty_backward(const PenaltyBackward<T>&, cudaStream_t stream);

}  // namespace rnf::cuda
