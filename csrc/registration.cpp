// Hands tensors to the CPU kernels. Only PyTorch's stable ABI is used, so one build serves every torch >= 2.10.
//
// The ops here write into tensors that Python allocated (robust_node_fast/_cpu.py): strides are decided in one place.
// pybind11 binds introspection and memory.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "cpu/api.h"
#include "cpu/memory.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

rnf::Parallel parallel() {
  const auto run = [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

template <class T>
T* data(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == kScalarType<std::remove_const_t<T>>, name,
                  ": expected a CPU tensor of the input's dtype");
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  return data<T>(tensor, name);
}

// The last four dimensions of a state (B, C, H, W) or a trajectory (N + 1, B, C, H, W).
template <class T>
rnf::View<T> view(const Tensor& tensor, const char* name) {
  const int64_t first = tensor.dim() - 4;
  return {data<T>(tensor, name), tensor.stride(first), tensor.stride(first + 1), tensor.stride(first + 2),
          tensor.stride(first + 3)};
}

bool is_trajectory(const Tensor& output) { return output.dim() == 5; }
int64_t state_stride(const Tensor& output) { return is_trajectory(output) ? output.stride(0) : 0; }

// In the element type of the state, or in bfloat16.
rnf::Steps steps(const std::optional<Tensor>& tensor, const Tensor& input, const char* name) {
  if (!tensor) return {};
  const bool bfloat16 = tensor->scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(tensor->is_cpu() && (bfloat16 || tensor->scalar_type() == input.scalar_type()), name,
                  ": expected a CPU tensor of the input's dtype or bfloat16");
  const int64_t first = tensor->dim() - 4;
  return {const_cast<void*>(tensor->const_data_ptr()),
          bfloat16,
          tensor->stride(0),
          tensor->stride(first),
          tensor->stride(first + 1),
          tensor->stride(first + 2),
          tensor->stride(first + 3)};
}

rnf::FlowShape flow_shape(const Tensor& input, const Tensor& weight, int64_t steps, int64_t layout, bool bfloat16) {
  STD_TORCH_CHECK(input.dim() == 4 && (weight.dim() == 4 || weight.dim() == 5), "expected (B, C, H, W) and filters");
  const int64_t first = weight.dim() - 4;
  const rnf::FlowShape s{input.size(0),
                         input.size(1),
                         input.size(2),
                         input.size(3),
                         weight.size(first + 3),
                         steps,
                         weight.dim() == 4,
                         static_cast<rnf::Layout>(layout),
                         bfloat16};
  STD_TORCH_CHECK(weight.size(first) == s.channels && weight.size(first + 1) == s.channels &&
                      weight.size(first + 2) == s.kernel && s.kernel % 2 == 1 && (s.shared || weight.size(0) == steps),
                  "weight does not fit the input");
  // Offsets inside a sample's state are 32-bit.
  const double state = static_cast<double>(s.channels) * (s.height + s.kernel + 1) * (s.width + s.kernel + 64);
  STD_TORCH_CHECK(state < std::numeric_limits<int32_t>::max(), "one sample's state exceeds 2^31 elements");
  return s;
}

// The trajectory's shape is Python's business; that it can be written without leaving its memory is checked here.
void check_like(const Tensor& tensor, const rnf::FlowShape& s, const char* name, int64_t states) {
  const int64_t first = tensor.dim() - 4;
  STD_TORCH_CHECK((first == 0 || (first == 1 && tensor.size(0) == states)) && tensor.size(first) == s.batch &&
                      tensor.size(first + 1) == s.channels && tensor.size(first + 2) == s.height &&
                      tensor.size(first + 3) == s.width,
                  name, ": unexpected shape");
}

void check_count(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == count, name, ": unexpected number of elements");
}

// Calls body with a value of the tensor's element type.
template <class Body>
void with_type(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(false, "the CPU kernels take float32 and float64");
  }
}

void flow_forward(Tensor input, Tensor weight, std::optional<Tensor> bias, double step_size, double negative_slope,
                  int64_t n_steps, int64_t layout, bool bfloat16, Tensor output, std::optional<Tensor> states,
                  std::optional<Tensor> slopes) {
  const rnf::FlowShape shape = flow_shape(input, weight, n_steps, layout, bfloat16);
  check_like(output, shape, "output", n_steps + 1);
  if (states) check_like(*states, shape, "states", n_steps);
  if (slopes) check_like(*slopes, shape, "slopes", n_steps);
  if (bias) check_count(*bias, shape.banks() * shape.channels, "bias");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::FlowForward<T> p{shape,
                                static_cast<T>(step_size),
                                static_cast<T>(negative_slope),
                                view<const T>(input, "input"),
                                dense<const T>(weight, "weight"),
                                bias ? dense<const T>(*bias, "bias") : nullptr,
                                view<T>(output, "output"),
                                is_trajectory(output),
                                state_stride(output),
                                steps(states, input, "states"),
                                steps(slopes, input, "slopes")};
    rnf::kernels().of<T>().flow_forward(p, parallel());
  });
}

void flow_backward(Tensor grad_output, Tensor input, Tensor weight, std::optional<Tensor> bias, double step_size,
                   double negative_slope, int64_t n_steps, int64_t layout, bool bfloat16, std::optional<Tensor> states,
                   std::optional<Tensor> slopes, std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight,
                   std::optional<Tensor> grad_bias) {
  const rnf::FlowShape shape = flow_shape(input, weight, n_steps, layout, bfloat16);
  check_like(grad_output, shape, "grad_output", n_steps + 1);
  if (states) check_like(*states, shape, "states", n_steps);
  if (slopes) check_like(*slopes, shape, "slopes", n_steps);
  STD_TORCH_CHECK(!slopes || states || !grad_weight, "the weight's gradient takes the states beside the slopes");
  if (bias) check_count(*bias, shape.banks() * shape.channels, "bias");
  if (grad_input) check_like(*grad_input, shape, "grad_input", 0);
  if (grad_weight) check_count(*grad_weight, shape.banks() * shape.channels * shape.taps(), "grad_weight");
  if (grad_bias) check_count(*grad_bias, shape.banks() * shape.channels, "grad_bias");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::FlowBackward<T> p{shape,
                                 static_cast<T>(step_size),
                                 static_cast<T>(negative_slope),
                                 view<const T>(grad_output, "grad_output"),
                                 is_trajectory(grad_output),
                                 state_stride(grad_output),
                                 view<const T>(input, "input"),
                                 dense<const T>(weight, "weight"),
                                 bias ? dense<const T>(*bias, "bias") : nullptr,
                                 steps(states, input, "states"),
                                 steps(slopes, input, "slopes"),
                                 grad_input ? view<T>(*grad_input, "grad_input") : rnf::View<T>{},
                                 grad_weight ? dense<T>(*grad_weight, "grad_weight") : nullptr,
                                 grad_bias ? dense<T>(*grad_bias, "grad_bias") : nullptr};
    rnf::kernels().of<T>().flow_backward(p, parallel());
  });
}

void flow_bound(Tensor input, Tensor radius, Tensor weight, std::optional<Tensor> bias, double step_size,
                double negative_slope, int64_t n_steps, Tensor centre, Tensor bound) {
  const rnf::FlowShape shape =
      flow_shape(input, weight, n_steps, static_cast<int64_t>(rnf::Layout::planes), /*bfloat16=*/false);
  check_like(radius, shape, "radius", n_steps + 1);
  check_like(centre, shape, "centre", n_steps + 1);
  check_like(bound, shape, "bound", n_steps + 1);
  if (bias) check_count(*bias, shape.banks() * shape.channels, "bias");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::FlowBound<T> p{shape,
                              step_size,
                              negative_slope,
                              view<const T>(input, "input"),
                              view<const T>(radius, "radius"),
                              dense<const T>(weight, "weight"),
                              bias ? dense<const T>(*bias, "bias") : nullptr,
                              view<T>(centre, "centre"),
                              view<T>(bound, "bound")};
    rnf::kernels().of<T>().flow_bound(p, parallel());
  });
}

void convolution_bound(Tensor input, Tensor radius, Tensor weight, std::optional<Tensor> bias, double negative_slope,
                       Tensor centre, Tensor bound) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4 && weight.size(1) == input.size(1) && weight.size(2) % 2 == 1 &&
                      weight.size(2) == weight.size(3),
                  "expected (B, C, H, W) and square filters for C channels");
  rnf::FlowShape shape{};
  shape.batch = input.size(0), shape.channels = input.size(1), shape.height = input.size(2),
  shape.width = input.size(3);
  const double state = static_cast<double>(shape.channels) * (shape.height + weight.size(2) + 1) *
                       static_cast<double>(shape.width + weight.size(2) + 64);
  STD_TORCH_CHECK(state < std::numeric_limits<int32_t>::max(), "one sample's state exceeds 2^31 elements");
  check_like(radius, shape, "radius", 0);
  const int64_t channels_in = shape.channels;
  shape.channels = weight.size(0);
  check_like(centre, shape, "centre", 0);
  check_like(bound, shape, "bound", 0);
  if (bias) check_count(*bias, shape.channels, "bias");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::ConvolutionBound<T> p{shape.batch,
                                     channels_in,
                                     shape.channels,
                                     shape.height,
                                     shape.width,
                                     weight.size(2),
                                     negative_slope,
                                     view<const T>(input, "input"),
                                     view<const T>(radius, "radius"),
                                     dense<const T>(weight, "weight"),
                                     bias ? dense<const T>(*bias, "bias") : nullptr,
                                     view<T>(centre, "centre"),
                                     view<T>(bound, "bound")};
    rnf::kernels().of<T>().convolution_bound(p, parallel());
  });
}

// Tensors of one dense block with equal strides; _cpu.py sees to it.
void activation(std::optional<Tensor> grad_output, Tensor input, double negative_slope, Tensor output) {
  if (grad_output) check_count(*grad_output, input.numel(), "grad_output");
  check_count(output, input.numel(), "output");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::Activation<T> p{input.numel(), static_cast<T>(negative_slope),
                               grad_output ? data<const T>(*grad_output, "grad_output") : nullptr,
                               data<const T>(input, "input"), data<T>(output, "output")};
    rnf::kernels().of<T>().activation(p, parallel());
  });
}

// Rows of deltas (with `tangent`, and of as many tangents behind them); one anchor a row.
struct Rows {
  int64_t rows, columns;
};

Rows anchored_rows(const Tensor& input, const Tensor& anchor, bool tangent) {
  STD_TORCH_CHECK(input.dim() > 0, "input: expected rows");
  const int64_t rows = anchor.numel(), width = input.size(input.dim() - 1);
  STD_TORCH_CHECK(!tangent || width % 2 == 0, "input: expected as many tangents as deltas");
  check_count(input, rows * width, "input");
  return {rows, tangent ? width / 2 : width};
}

void increment(Tensor input, Tensor anchor, bool tangent, Tensor output) {
  const Rows rows = anchored_rows(input, anchor, tangent);
  check_count(output, input.numel(), "output");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::Increment<T> p{rows.rows,
                              rows.columns,
                              tangent,
                              dense<const T>(input, "input"),
                              dense<const T>(anchor, "anchor"),
                              dense<T>(output, "output")};
    rnf::kernels().of<T>().increment(p, parallel());
  });
}

void increment_backward(Tensor grad_output, Tensor input, Tensor anchor, bool tangent, Tensor grad_input,
                        Tensor grad_anchor) {
  const Rows rows = anchored_rows(input, anchor, tangent);
  check_count(grad_output, input.numel(), "grad_output");
  check_count(grad_input, input.numel(), "grad_input");
  check_count(grad_anchor, anchor.numel(), "grad_anchor");
  with_type(input, [&](auto type) {
    using T = decltype(type);
    const rnf::IncrementBackward<T> p{rows.rows,
                                      rows.columns,
                                      tangent,
                                      dense<const T>(grad_output, "grad_output"),
                                      dense<const T>(input, "input"),
                                      dense<const T>(anchor, "anchor"),
                                      dense<T>(grad_input, "grad_input"),
                                      dense<T>(grad_anchor, "grad_anchor")};
    rnf::kernels().of<T>().increment_backward(p, parallel());
  });
}

void contraction_penalty(Tensor weight, double rate, double slope_low, double slope_high, int64_t norm,
                         int64_t reduction, Tensor value, Tensor coefficients) {
  const int64_t last = weight.dim() - 1, steps = weight.dim() == 5 ? weight.size(0) : 1;
  const int64_t channels = weight.size(last - 2), kernel = weight.size(last);
  check_count(weight, steps * channels * channels * kernel * kernel, "weight");
  check_count(value, static_cast<rnf::Reduction>(reduction) == rnf::Reduction::none ? steps * channels : 1, "value");
  check_count(coefficients, 3 * steps * channels, "coefficients");
  with_type(weight, [&](auto type) {
    using T = decltype(type);
    const rnf::Penalty<T> p{steps,
                            channels,
                            kernel,
                            rate,
                            slope_low,
                            slope_high,
                            static_cast<rnf::Norm>(norm),
                            static_cast<rnf::Reduction>(reduction),
                            dense<const T>(weight, "weight"),
                            dense<T>(value, "value"),
                            dense<T>(coefficients, "coefficients")};
    rnf::kernels().of<T>().contraction_penalty(p, parallel());
  });
}

void contraction_penalty_backward(Tensor grad_output, Tensor weight, Tensor coefficients, Tensor grad_weight) {
  const int64_t last = weight.dim() - 1, steps = weight.dim() == 5 ? weight.size(0) : 1;
  const int64_t channels = weight.size(last - 2), kernel = weight.size(last);
  const bool per_channel = grad_output.dim() > 0;
  check_count(weight, steps * channels * channels * kernel * kernel, "weight");
  check_count(grad_output, per_channel ? steps * channels : 1, "grad_output");
  check_count(coefficients, 3 * steps * channels, "coefficients");
  check_count(grad_weight, weight.numel(), "grad_weight");
  with_type(weight, [&](auto type) {
    using T = decltype(type);
    const rnf::PenaltyBackward<T> p{steps,
                                    channels,
                                    kernel,
                                    dense<const T>(grad_output, "grad_output"),
                                    per_channel,
                                    dense<const T>(weight, "weight"),
                                    dense<const T>(coefficients, "coefficients"),
                                    dense<T>(grad_weight, "grad_weight")};
    rnf::kernels().of<T>().contraction_penalty_backward(p, parallel());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(robust_node_fast_cpu, m) {
  m.def(
      "flow_forward(Tensor input, Tensor weight, Tensor? bias, float step_size, float negative_slope, int n_steps, "
      "int layout, bool bfloat16, Tensor(a!) output, Tensor(b!)? states, Tensor(c!)? slopes) -> ()");
  m.def(
      "flow_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, float step_size, "
      "float negative_slope, int n_steps, int layout, bool bfloat16, Tensor? states, Tensor? slopes, Tensor(a!)? "
      "grad_input, "
      "Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> "
      "()");
  m.def(
      "flow_bound(Tensor input, Tensor radius, Tensor weight, Tensor? bias, float step_size, float negative_slope, "
      "int n_steps, Tensor(a!) centre, Tensor(b!) bound) -> ()");
  m.def(
      "convolution_bound(Tensor input, Tensor radius, Tensor weight, Tensor? bias, float negative_slope, "
      "Tensor(a!) centre, Tensor(b!) bound) -> ()");
  m.def("activation(Tensor? grad_output, Tensor input, float negative_slope, Tensor(a!) output) -> ()");
  m.def(
      "contraction_penalty(Tensor weight, float rate, float slope_low, float slope_high, int norm, int reduction, "
      "Tensor(a!) value, Tensor(b!) coefficients) -> ()");
  m.def(
      "contraction_penalty_backward(Tensor grad_output, Tensor weight, Tensor coefficients, Tensor(a!) grad_weight) -> "
      "()");
  m.def("increment(Tensor input, Tensor anchor, bool tangent, Tensor(a!) output) -> ()");
  m.def(
      "increment_backward(Tensor grad_output, Tensor input, Tensor anchor, bool tangent, Tensor(a!) grad_input, "
      "Tensor(b!) grad_anchor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(robust_node_fast_cpu, CPU, m) {
  m.impl("flow_forward", TORCH_BOX(&flow_forward));
  m.impl("flow_backward", TORCH_BOX(&flow_backward));
  m.impl("flow_bound", TORCH_BOX(&flow_bound));
  m.impl("convolution_bound", TORCH_BOX(&convolution_bound));
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("contraction_penalty", TORCH_BOX(&contraction_penalty));
  m.impl("contraction_penalty_backward", TORCH_BOX(&contraction_penalty_backward));
  m.impl("increment", TORCH_BOX(&increment));
  m.impl("increment_backward", TORCH_BOX(&increment_backward));
}

// Python's hold on memory that later calls use again (memory.h).
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes), data_(rnf::take_memory(bytes)) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { rnf::give_memory(data_, bytes_); }
  pybind11::buffer_info buffer() const {
    return {static_cast<uint8_t*>(data_), static_cast<pybind11::ssize_t>(bytes_)};
  }

 private:
  std::size_t bytes_;
  void* data_;
};

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the CPU kernels with PyTorch when imported; describes how they were built.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["isa"] = rnf::kernels().name;
        info["supported_isas"] = pybind11::str(rnf::supported_isas()).attr("split")();
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = "gcc " __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;
#endif
        info["threads"] = "torch parallel_for";
        info["torch_stable_abi"] = RNF_TORCH_TARGET;
        info["cuda_architectures"] = pybind11::list();
        return info;
      },
      "Instruction sets, compiler, threading, the oldest torch it loads into, CUDA architectures of this build.");
  pybind11::class_<Memory>(m, "Memory", pybind11::buffer_protocol(), "Uninitialised bytes, kept for the next one.")
      .def(pybind11::init<std::size_t>())
      .def_buffer(&Memory::buffer);
  m.attr("HUGE_PAGE") = rnf::kHugePage;
}
