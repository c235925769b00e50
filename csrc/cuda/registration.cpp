// Hands tensors to the CUDA kernels: addresses, sizes and strides as integers, so that no PyTorch header is needed and
// one build serves every torch. robust_node_fast/_cuda.py allocates and calls.
#include <cuda_runtime.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

namespace {

using rnf::cuda::FlowShape;
typedef std::uintptr_t Address;
typedef std::array<int64_t, 6> Sizes;  // batch, channels, height, width, kernel, steps

// A state (B, C, H, W) or several (.., B, C, H, W): address and strides.
typedef std::pair<Address, std::vector<int64_t>> Strided;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}
template <class T>
T* pointer(std::optional<Address> address) {
  return address ? pointer<T>(*address) : nullptr;
}

FlowShape flow_shape(const Sizes& n, bool shared) { return {n[0], n[1], n[2], n[3], n[4], n[5], shared}; }

template <class T>
rnf::cuda::Views<T> views(const std::optional<Strided>& tensor, const FlowShape& s) {
  if (!tensor) return {};
  const std::vector<int64_t>& strides = tensor->second;
  if (strides.size() != 4 && strides.size() != 5) throw std::invalid_argument("expected 4 or 5 strides");
  const std::size_t first = strides.size() - 4;
  const double last = static_cast<double>(s.channels - 1) * static_cast<double>(strides[first + 1]) +
                      static_cast<double>(s.height - 1) * static_cast<double>(strides[first + 2]) +
                      static_cast<double>(s.width - 1) * static_cast<double>(strides[first + 3]);
  if (last > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("the elements of one sample lie more than 2^31 apart; make the tensor contiguous");
  return {{pointer<T>(tensor->first), strides[first], static_cast<int32_t>(strides[first + 1]),
           static_cast<int32_t>(strides[first + 2]), static_cast<int32_t>(strides[first + 3])},
          first == 1 ? strides[0] : 0};
}

bool is_trajectory(const Strided& tensor) { return tensor.second.size() == 5; }

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("robust_node_fast: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
      throw std::runtime_error(std::string("robust_node_fast: there is no CUDA device that can be used: ") +
                               (status != cudaSuccess ? cudaGetErrorString(status) : "none was found"));
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) check(cudaSetDevice(device), "choosing the device");
    device_ = device;
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

int64_t shared_memory_limit(int device) {
  const DeviceGuard guard(device);
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for the size of shared memory");
  return bytes;
}

void check_fits(const FlowShape& shape, int device) {
  if (!rnf::cuda::flow_fits(shape, shared_memory_limit(device)))
    throw std::invalid_argument("robust_node_fast: one sample does not fit into the shared memory of a block");
}

void flow_forward(int device, Address stream, const Sizes& sizes, bool shared, float step_size, float negative_slope,
                  const Strided& input, Address weight, std::optional<Address> bias, const Strided& output,
                  const std::optional<Strided>& states, const std::optional<Strided>& slopes) {
  const FlowShape shape = flow_shape(sizes, shared);
  const rnf::cuda::FlowForward p{shape,
                                 step_size,
                                 negative_slope,
                                 views<const float>(input, shape).first,
                                 pointer<const float>(weight),
                                 pointer<const float>(bias),
                                 views<float>(output, shape),
                                 is_trajectory(output),
                                 views<float>(states, shape),
                                 views<float>(slopes, shape)};
  const DeviceGuard guard(device);
  check_fits(shape, device);
  check(rnf::cuda::flow_forward(p, pointer<CUstream_st>(stream)), "the flow");
}

void flow_backward(int device, Address stream, const Sizes& sizes, bool shared, float step_size, float negative_slope,
                   const Strided& grad_output, const Strided& input, Address weight, std::optional<Address> bias,
                   const std::optional<Strided>& states, const std::optional<Strided>& slopes,
                   const std::optional<Strided>& grad_input, std::optional<Address> grad_weight,
                   std::optional<Address> grad_bias, const std::function<Address(int64_t)>& allocate) {
  const FlowShape shape = flow_shape(sizes, shared);
  if (slopes && !states && grad_weight)
    throw std::invalid_argument("the weight's gradient takes the states beside the slopes");
  const rnf::cuda::FlowBackward p{shape,
                                  step_size,
                                  negative_slope,
                                  views<const float>(grad_output, shape),
                                  is_trajectory(grad_output),
                                  views<const float>(input, shape).first,
                                  pointer<const float>(weight),
                                  pointer<const float>(bias),
                                  views<float>(states, shape),
                                  views<float>(slopes, shape),
                                  views<float>(grad_input, shape).first,
                                  pointer<float>(grad_weight),
                                  pointer<float>(grad_bias)};
  const DeviceGuard guard(device);
  check_fits(shape, device);
  rnf::cuda::BackwardPlan plan{};
  check(rnf::cuda::plan_flow_backward(p, &plan), "planning the flow's gradient");
  void* const workspace = pointer<void>(allocate(plan.workspace_bytes));
  check(rnf::cuda::flow_backward(p, plan, workspace, pointer<CUstream_st>(stream)), "the flow's gradient");
}

void contraction_penalty(int device, Address stream, int64_t steps, int64_t channels, int64_t kernel, double rate,
                         double slope_low, double slope_high, int64_t norm, int64_t reduction, Address weight,
                         Address value, Address coefficients, const std::function<Address(int64_t)>& allocate) {
  const rnf::cuda::Penalty p{steps,
                             channels,
                             kernel,
                             rate,
                             slope_low,
                             slope_high,
                             static_cast<rnf::cuda::Norm>(norm),
                             static_cast<rnf::cuda::Reduction>(reduction),
                             pointer<const float>(weight),
                             pointer<float>(value),
                             pointer<float>(coefficients)};
  const DeviceGuard guard(device);
  void* const workspace = pointer<void>(allocate(rnf::cuda::penalty_workspace_bytes(p)));
  check(rnf::cuda::contraction_penalty(p, workspace, pointer<CUstream_st>(stream)), "the penalty");
}

void contraction_penalty_backward(int device, Address stream, int64_t steps, int64_t channels, int64_t kernel,
                                  Address grad_output, bool per_channel, Address weight, Address coefficients,
                                  Address grad_weight) {
  const rnf::cuda::PenaltyBackward p{steps,
                                     channels,
                                     kernel,
                                     pointer<const float>(grad_output),
                                     per_channel,
                                     pointer<const float>(weight),
                                     pointer<const float>(coefficients),
                                     pointer<float>(grad_weight)};
  const DeviceGuard guard(device);
  check(rnf::cuda::contraction_penalty_backward(p, pointer<CUstream_st>(stream)), "the penalty's gradient");
}

}  // namespace

PYBIND11_MODULE(_cuda_C, m) {
  m.doc() = "The CUDA kernels, called with addresses; importing it asks for no device.";
  m.def("flow_shared_bytes", [](const Sizes& sizes) { return rnf::cuda::flow_shared_bytes(flow_shape(sizes, false)); });
  m.def("shared_memory_limit", &shared_memory_limit);
  m.def("flow_forward", &flow_forward);
  m.def("flow_backward", &flow_backward);
  m.def("contraction_penalty", &contraction_penalty);
  m.def("contraction_penalty_backward", &contraction_penalty_backward);
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["cuda"] = RNF_CUDA_VERSION;
        info["architectures"] = pybind11::str(RNF_CUDA_ARCHITECTURES).attr("split")();
        return info;
      },
      "The CUDA toolkit of this build and the architectures it holds code for.");
}
