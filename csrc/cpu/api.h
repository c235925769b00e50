// What the CPU kernels compute, as plain structs: no PyTorch in this folder, so that it builds alone (sanitizers).
#pragma once
#include <cstdint>

namespace rnf {

// Runs body(begin, end, context) over pieces of [0, count), on one or several threads.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

  template <class Body>
  void operator()(int64_t count, const Body& body) const {
    if (threads == 1 || count == 1) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    run(
        count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// A (B, C, H, W) tensor with any strides, counted in elements.
template <class T>
struct View {
  T* data;
  int64_t batch, channel, row, column;
};

struct BFloat16 {
  uint16_t bits;
};

// N of them, one a step: the states that enter the steps, or the slopes h s'(u), in T or rounded to bfloat16.
struct Steps {
  void* data;  // nullptr: not there
  bool bfloat16;
  int64_t stride, batch, channel, row, column;
  explicit operator bool() const { return data != nullptr; }
  template <class U>
  View<U> of(int64_t k) const {
    return {static_cast<U*>(data) + k * stride, batch, channel, row, column};
  }
};

// Which layout of the state, and with it which algorithm; `best` picks by the shape.
enum class Layout : int64_t { best, planes, channels, strips };

struct FlowShape {
  int64_t batch, channels, height, width, kernel, steps;
  bool shared;  // one filter bank (C, C, k, k) for all steps instead of (N, C, C, k, k)
  Layout layout;
  bool bfloat16;  // products may be rounded to it (sums are float)
  int64_t banks() const { return shared ? 1 : steps; }
  int64_t taps() const { return channels * kernel * kernel; }  // columns of a filter bank seen as a matrix
};

template <class T>
struct FlowForward {
  FlowShape shape;
  T step_size, negative_slope;
  View<const T> input;
  const T* weight;  // (banks, C, C, k, k) contiguous
  const T* bias;    // (banks, C) contiguous or nullptr
  View<T> output;
  bool trajectory;       // all N + 1 states are wanted, not only the last one
  int64_t state_stride;  // between the states of a trajectory
  Steps states, slopes;  // to be saved for the backward pass, if there is room for them
};

template <class T>
struct FlowBackward {
  FlowShape shape;
  T step_size, negative_slope;
  View<const T> grad_output;
  bool trajectory;       // as in FlowForward
  int64_t state_stride;  // 0 for a gradient that is expanded over the states
  View<const T> input;
  const T* weight;
  const T* bias;
  Steps states, slopes;  // as saved by the forward pass, or to be computed again
  View<T> grad_input;    // data == nullptr: not wanted; the same for the next two
  T* grad_weight;        // (banks, C, C, k, k) contiguous
  T* grad_bias;          // (banks, C) contiguous
};

// Bound E (interval.inc): radius >= 0.
template <class T>
struct FlowBound {
  FlowShape shape;
  double step_size, negative_slope;
  View<const T> input, radius;
  const T* weight;
  const T* bias;
  View<T> centre, bound;
};

// The same of a convolution, stride 1 and zero "same" padding, with the activation behind it.
template <class T>
struct ConvolutionBound {
  int64_t batch, channels_in, channels_out, height, width, kernel;
  double negative_slope;
  View<const T> input, radius;
  const T* weight;  // (channels_out, channels_in, k, k) contiguous
  const T* bias;    // or nullptr
  View<T> centre, bound;
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

template <class T>
struct Activation {
  int64_t count;
  T negative_slope;
  const T* grad_output;  // nullptr: the value is wanted, else the gradient
  const T* input;
  T* output;
};

// softplus(anchor + delta) - softplus(anchor) of rows that have an anchor each. With `tangent` a row is `columns`
// deltas and behind them as many tangents, and its result has sigmoid(anchor + delta) times those behind it.
template <class T>
struct Increment {
  int64_t rows, columns;
  bool tangent;
  const T* input;
  const T* anchor;
  T* output;
};

template <class T>
struct IncrementBackward {
  int64_t rows, columns;
  bool tangent;
  const T* grad_output;
  const T* input;
  const T* anchor;
  T* grad_input;
  T* grad_anchor;
};

// One instruction set's kernels.
template <class T>
struct KernelsOf {
  void (*flow_forward)(const FlowForward<T>&, const Parallel&);
  void (*flow_backward)(const FlowBackward<T>&, const Parallel&);
  void (*flow_bound)(const FlowBound<T>&, const Parallel&);
  void (*convolution_bound)(const ConvolutionBound<T>&, const Parallel&);
  void (*activation)(const Activation<T>&, const Parallel&);
  void (*contraction_penalty)(const Penalty<T>&, const Parallel&);
  void (*contraction_penalty_backward)(const PenaltyBackward<T>&, const Parallel&);
  void (*increment)(const Increment<T>&, const Parallel&);
  void (*increment_backward)(const IncrementBackward<T>&, const Parallel&);
};

struct Kernels {
  const char* name;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  template <class T>
  const KernelsOf<T>& of() const;
};
template <>
inline const KernelsOf<float>& Kernels::of<float>() const {
  return f32;
}
template <>
inline const KernelsOf<double>& Kernels::of<double>() const {
  return f64;
}

namespace portable {
extern const Kernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {  // with dot products in bfloat16
extern const Kernels kernels;
}
namespace amx {  // with the tile unit for bfloat16
extern const Kernels kernels;
}
#endif

// The best set this processor runs, chosen once; RNF_CPU_ISA=portable|avx2|avx512|avx512_bf16 asks for a lesser one.
const Kernels& kernels();
// Names of all sets this processor runs, best first, separated by spaces.
const char* supported_isas();

}  // namespace rnf
