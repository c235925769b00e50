// Runs the CUDA kernels, built by a CPU compiler over tests/native/cuda_shim, against straightforward loops in double.
// Built by tests/test_cuda_on_cpu.py with and without sanitizers. All tensors are exact-size allocations filled with
// NaN, so that what is read or written outside, or not written at all, shows.
//
//   check_cuda [reverse] [quick] [sites] [skip=FILE:LINE]
//
// reverse: threads and blocks run from the last to the first. quick: few shapes. sites: print where the barriers are.
// skip: leave one barrier out, which has to give a failure.
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/api.h"
#include "../../csrc/cuda/divide.h"

namespace rnf::cuda {
float4 shared_memory[cuda_shim::kSharedBytes / sizeof(float4)];
}

namespace {

using rnf::cuda::FlowShape;
using rnf::cuda::View;
using rnf::cuda::Views;

std::mt19937 generator(1234);
int failures = 0, checks = 0;

void expect(bool ok, const char* what, const std::string& where, double error = NAN, double bound = NAN) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s (%s): error %g, bound %g\n", what, where.c_str(), error, bound);
}

std::vector<double> random_values(int64_t count, double scale) {  // the same in float and double
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) value = static_cast<double>(static_cast<float>(normal(generator)));
  return values;
}

std::vector<float> nans(int64_t count) {
  return std::vector<float>(static_cast<std::size_t>(count), std::numeric_limits<float>::quiet_NaN());
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Flows
// ---------------------------------------------------------------------------------------------------------------------

enum class Order { contiguous, channels_last, sliced };  // the last has gaps in all dimensions

// A (states, B, C, H, W) tensor in memory.
class Tensor {
 public:
  Tensor(const FlowShape& s, int64_t states, Order order) : s_(s), states_(states) {
    const int64_t c = s.channels, h = s.height, w = s.width;
    switch (order) {
      case Order::contiguous:
        view_ = {nullptr, c * h * w, int32_t(h * w), int32_t(w), 1};
        break;
      case Order::channels_last:
        view_ = {nullptr, c * h * w, 1, int32_t(w * c), int32_t(c)};
        break;
      default:
        view_ = {nullptr, 2 * (w + 3) * h * (c + 1), int32_t(2 * (w + 3) * h), int32_t(2 * (w + 3)), 1};
    }
    stride_ = s.batch * view_.batch;
    const int64_t last = (states - 1) * stride_ + (s.batch - 1) * view_.batch + (c - 1) * view_.channel +
                         (h - 1) * view_.row + (w - 1) * view_.column;
    data_ = nans(s.batch == 0 ? 0 : last + 1);
  }
  Tensor(const FlowShape& s, int64_t states, Order order, const std::vector<double>& values)
      : Tensor(s, states, order) {
    for (std::size_t i = 0; i < values.size(); ++i)
      data_[offset(static_cast<int64_t>(i))] = static_cast<float>(values[i]);
  }
  // One value for all elements, as .sum() sends it back.
  static Tensor expanded(const FlowShape& s, double value) {
    Tensor t(s, 1, Order::contiguous);
    t.data_.assign(1, static_cast<float>(value));
    t.view_ = {nullptr, 0, 0, 0, 0}, t.stride_ = 0;
    return t;
  }

  Views<float> views() {
    View<float> view = view_;
    view.data = data_.data();
    return {view, stride_};
  }
  Views<const float> const_views() const {
    return {{data_.data(), view_.batch, view_.channel, view_.row, view_.column}, stride_};
  }
  int64_t offset(int64_t i) const {  // of the element with this place in the logical order
    const int64_t w = i % s_.width, h = i / s_.width % s_.height, c = i / (s_.width * s_.height) % s_.channels;
    const int64_t b = i / (s_.width * s_.height * s_.channels);
    return b / s_.batch * stride_ + b % s_.batch * view_.batch + c * view_.channel + h * view_.row + w * view_.column;
  }
  int64_t count() const { return states_ * s_.batch * s_.channels * s_.height * s_.width; }
  float operator[](int64_t i) const { return data_[static_cast<std::size_t>(offset(i))]; }
  const std::vector<float>& data() const { return data_; }

 private:
  FlowShape s_;
  int64_t states_, stride_ = 0;
  View<float> view_{};
  std::vector<float> data_;
};

struct Problem {
  static constexpr double kStep = 0.125, kNegativeSlope = 0.09375;  // the same in float and double
  FlowShape s;
  bool trajectory, expanded;
  std::vector<double> input, weight, bias, grad;                           // bias may be empty
  std::vector<double> states, slopes, grad_input, grad_weight, grad_bias;  // what is to come out
  int64_t size() const { return s.batch * s.channels * s.height * s.width; }
  int64_t outputs() const { return trajectory ? s.steps + 1 : 1; }
  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof(text), "B%d C%d %dx%d k%d N%d%s%s%s%s", int(s.batch), int(s.channels), int(s.height),
                  int(s.width), int(s.kernel), int(s.steps), s.shared ? " shared" : "", trajectory ? " trajectory" : "",
                  expanded ? " expanded" : "", bias.empty() ? "" : " bias");
    return text;
  }
};

double activate(double u, double a) {
  return a * u + (1 - a) * (std::fmax(u, 0) + std::log1p(std::exp(-std::fabs(u))));
}
double slope(double u, double a) { return a + (1 - a) / (1 + std::exp(-u)); }

template <class Visit>  // visit(weight index, output pixel index, input pixel index)
void for_each_tap(const FlowShape& s, const Visit& visit) {
  const int64_t p = s.kernel / 2, planes = s.batch * s.channels;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t tap = 0; tap < s.kernel * s.kernel; ++tap) {
        const int64_t di = tap / s.kernel - p, dj = tap % s.kernel - p, o = plane % s.channels;
        for (int64_t i = std::max<int64_t>(0, -di); i < s.height && i + di < s.height; ++i)
          for (int64_t j = std::max<int64_t>(0, -dj); j < s.width && j + dj < s.width; ++j)
            visit((o * s.channels + c) * s.kernel * s.kernel + tap, (plane * s.height + i) * s.width + j,
                  ((plane - o + c) * s.height + i + di) * s.width + j + dj);
      }
}

Problem make_problem(const FlowShape& s, bool trajectory, bool with_bias, bool expanded) {
  Problem p{};
  p.s = s, p.trajectory = trajectory, p.expanded = expanded;
  const int64_t size = p.size(), area = s.height * s.width;
  const auto fan_in = static_cast<double>(s.channels * s.kernel * s.kernel);
  p.input = random_values(size, 1.0);
  p.weight = random_values(s.banks() * s.bank_size(), 1.0 / std::sqrt(fan_in));
  if (with_bias) p.bias = random_values(s.banks() * s.channels, 0.5);
  p.grad = random_values(p.outputs() * size, 1.0);
  if (expanded) p.grad.assign(p.grad.size(), 0.75);

  p.states = p.input;
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> u(static_cast<std::size_t>(size));
    for (int64_t i = 0; i < size && with_bias; ++i) u[i] = p.bias[n * s.channels + i / area % s.channels];
    const double *const z = p.states.data() + k * size, *const w = p.weight.data() + n * s.bank_size();
    for_each_tap(s, [&](int64_t tap, int64_t out, int64_t in) { u[out] += w[tap] * z[in]; });
    for (int64_t i = 0; i < size; ++i) {
      p.slopes.push_back(Problem::kStep * slope(u[i], Problem::kNegativeSlope));
      u[i] = z[i] + Problem::kStep * activate(u[i], Problem::kNegativeSlope);
    }
    p.states.insert(p.states.end(), u.begin(), u.end());
  }

  p.grad_weight.assign(p.weight.size(), 0);
  p.grad_bias.assign(static_cast<std::size_t>(s.banks() * s.channels), 0);
  p.grad_input.assign(p.grad.end() - size, p.grad.end());
  for (int64_t k = s.steps - 1; k >= 0; --k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> v(static_cast<std::size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      v[i] = p.slopes[k * size + i] * p.grad_input[i];
      p.grad_bias[n * s.channels + i / area % s.channels] += v[i];
    }
    const double *const z = p.states.data() + k * size, *const w = p.weight.data() + n * s.bank_size();
    double* const dw = p.grad_weight.data() + n * s.bank_size();
    for_each_tap(s, [&](int64_t tap, int64_t out, int64_t in) {
      dw[tap] += v[out] * z[in];
      p.grad_input[in] += w[tap] * v[out];
    });
    for (int64_t i = 0; i < size && trajectory; ++i) p.grad_input[i] += p.grad[k * size + i];
  }
  return p;
}

// Largest error allowed, relative to the largest value: about four times the largest found (5.2e-7).
constexpr double kRelative = 2e-6;

template <class Found>
void compare(const Found& found, const double* wanted, int64_t count, const char* what, const std::string& where) {
  double error = 0, scale = 1e-30;
  for (int64_t i = 0; i < count; ++i) {
    const double difference = std::fabs(static_cast<double>(found[i]) - wanted[i]);
    error = difference <= error ? error : difference;  // a NaN stays
    scale = std::fmax(scale, std::fabs(wanted[i]));
  }
  expect(error <= kRelative * scale, what, where, error, kRelative * scale);
}

struct Gradients {
  Tensor input;
  std::vector<float> weight, bias;
};

class Flow {
 public:
  Flow(const Problem& p, Order order, Order other)
      : p_(p),
        order_(order),
        other_(other),
        input_(p.s, 1, order, p.input),
        grad_(p.expanded ? Tensor::expanded(p.s, 0.75) : Tensor(p.s, p.outputs(), other, p.grad)),
        weight_(p.weight.begin(), p.weight.end()),
        bias_(p.bias.begin(), p.bias.end()) {}

  void check(unsigned wanted) {
    const std::string where = p_.name();
    const int64_t size = p_.size(), steps = p_.s.steps;
    Tensor output(p_.s, p_.outputs(), order_), states(p_.s, steps, other_), slopes(p_.s, steps, order_);
    forward(output, nullptr, nullptr);
    compare(output, p_.states.data() + (p_.trajectory ? 0 : steps * size), output.count(), "output", where);
    const Gradients all = backward(7, nullptr, nullptr);
    compare(all.input, p_.grad_input.data(), size, "grad_input", where);
    compare(all.weight, p_.grad_weight.data(), static_cast<int64_t>(p_.grad_weight.size()), "grad_weight", where);
    compare(all.bias, p_.grad_bias.data(), static_cast<int64_t>(p_.grad_bias.size()), "grad_bias", where);
    check_some(wanted, all, nullptr, nullptr, "some gradients");

    Tensor saving(p_.s, p_.outputs(), order_);
    forward(saving, &states, &slopes);
    expect(same_bits(saving.data(), output.data()), "output when saving", where);
    compare(states, p_.states.data(), steps * size, "saved states", where);
    compare(slopes, p_.slopes.data(), steps * size, "saved slopes", where);
    check_some(7, all, &states, &slopes, "gradients from what was saved");
    check_some(wanted & 5, all, nullptr, &slopes, "some gradients from saved slopes");
  }

 private:
  // The same to the rounding of a sum in another order; what is not wanted stays untouched.
  void check_some(unsigned wanted, const Gradients& all, Tensor* states, Tensor* slopes, const char* what) {
    const Gradients some = backward(wanted, states, slopes);
    const std::string where = p_.name();
    if (wanted & 1) expect(same_bits(some.input.data(), all.input.data()), what, where);
    if (wanted & 2) expect(same_bits(some.weight, all.weight), what, where);
    if (wanted & 4) expect(same_bits(some.bias, all.bias), what, where);
  }
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

  void forward(Tensor& output, Tensor* states, Tensor* slopes) {
    rnf::cuda::FlowForward f{};
    f.shape = p_.s, f.step_size = Problem::kStep, f.negative_slope = Problem::kNegativeSlope;
    f.input = input_.const_views().first, f.weight = weight_.data(), f.bias = bias();
    f.output = output.views(), f.trajectory = p_.trajectory;
    if (states != nullptr) f.states = states->views();
    if (slopes != nullptr) f.slopes = slopes->views();
    expect(rnf::cuda::flow_forward(f, nullptr) == cudaSuccess, "status of the forward pass", p_.name());
  }

  Gradients backward(unsigned wanted, Tensor* states, Tensor* slopes) {
    Gradients g{Tensor(p_.s, 1, order_), nans(static_cast<int64_t>(p_.grad_weight.size())),
                nans(static_cast<int64_t>(p_.grad_bias.size()))};
    rnf::cuda::FlowBackward f{};
    f.shape = p_.s, f.step_size = Problem::kStep, f.negative_slope = Problem::kNegativeSlope;
    f.grad_output = grad_.const_views(), f.trajectory = p_.trajectory;
    f.input = input_.const_views().first, f.weight = weight_.data(), f.bias = bias();
    if (states != nullptr) f.states = states->views();
    if (slopes != nullptr) f.slopes = slopes->views();
    if (wanted & 1) f.grad_input = g.input.views().first;
    if (wanted & 2) f.grad_weight = g.weight.data();
    if (wanted & 4) f.grad_bias = g.bias.data();
    rnf::cuda::BackwardPlan plan{};
    const bool planned = rnf::cuda::plan_flow_backward(f, &plan) == cudaSuccess;
    std::vector<float> workspace = nans(plan.workspace_bytes / static_cast<int64_t>(sizeof(float)));
    expect(planned && rnf::cuda::flow_backward(f, plan, workspace.data(), nullptr) == cudaSuccess,
           "status of the backward pass", p_.name());
    return g;
  }

  const Problem& p_;
  Order order_, other_;
  Tensor input_, grad_;
  std::vector<float> weight_, bias_;
};

FlowShape shape(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t kernel, int64_t steps,
                bool shared = false) {
  return {batch, channels, height, width, kernel, steps, shared};
}

void check_flows(bool quick) {
  std::vector<FlowShape> shapes{
      shape(3, 3, 6, 5, 3, 2),         // several slices of the filters' gradient; a block with two samples
      shape(1, 17, 5, 9, 3, 2, true),  // more pairs of channels than threads
  };
  if (!quick)
    for (const FlowShape& s : {
             shape(1, 1, 1, 1, 1, 1),
             shape(2, 1, 1, 1, 3, 2),
             shape(3, 2, 1, 7, 5, 2, true),
             shape(5, 4, 7, 7, 3, 4),
             shape(2, 5, 3, 17, 5, 2),
             shape(1, 8, 14, 14, 3, 3),
             shape(4, 8, 8, 8, 1, 3, true),
             shape(0, 3, 4, 4, 3, 2),
             shape(1, 32, 6, 7, 3, 2),
             shape(3, 9, 9, 4, 5, 3),
             shape(1, 12, 20, 9, 3, 2, true),
             shape(1, 6, 4, 150, 1, 1),
             shape(1, 2, 62, 45, 3, 1),  // more items than threads
             shape(1, 3, 13, 60, 5, 1),
             shape(1, 32, 2, 3, 5, 1),
         })
      shapes.push_back(s);
  for (std::size_t i = 0; i < shapes.size(); ++i)
    for (unsigned variant = 0; variant < 2; ++variant) {
      const bool trajectory = (i + variant) % 2 == 0, expanded = (i / 2 + variant) % 3 == 0,
                 bias = (i + variant) % 3 != 0;
      const Problem p = make_problem(shapes[i], trajectory, bias, expanded);
      const auto order = static_cast<Order>((i + variant) % 3), other = static_cast<Order>((i + 2 * variant + 1) % 3);
      Flow(p, order, other).check(1 + static_cast<unsigned>(i + 3 * variant) % 7);
    }
}

void check_what_fits() {
  const int64_t limit = cuda_shim::kSharedBytes;
  const auto fits = [&](const FlowShape& s, bool wanted) {
    expect(rnf::cuda::flow_fits(s, limit) == wanted, "what fits", std::to_string(rnf::cuda::flow_shared_bytes(s)));
  };
  fits(shape(64, 8, 28, 28, 3, 10), true);
  fits(shape(64, 16, 32, 32, 3, 10), true);
  fits(shape(64, 32, 14, 14, 3, 10), true);
  fits(shape(64, 32, 64, 64, 3, 10), false);
  fits(shape(64, 33, 4, 4, 3, 10), false);  // too many channels
  fits(shape(64, 3, 4, 4, 7, 10), false);   // no such filters
  fits(shape(64, 1, 0, 4, 3, 10), false);
  fits(shape(64, 1, int64_t{1} << 62, int64_t{1} << 62, 3, 10), false);
  // A block cannot have what the device has not: refused, not run.
  rnf::cuda::FlowForward f{};
  f.shape = shape(1, 32, 40, 40, 3, 1);
  expect(rnf::cuda::flow_forward(f, nullptr) != cudaSuccess, "a state that does not fit", "");
  f.shape = shape(1, 33, 4, 4, 3, 1);
  expect(rnf::cuda::flow_forward(f, nullptr) == cudaErrorInvalidValue, "a shape without a kernel", "");
}

void check_activation_limits() {  // conv is the identity: no overflow, and NaN where there was one
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> values{0.0f, -0.0f, 1e-30f, 88.0f, -88.0f, 1e4f, -1e4f, 3e38f, -3e38f, inf, -inf, NAN};
  const FlowShape s = shape(1, 1, 1, static_cast<int64_t>(values.size()), 1, 1);
  const float weight = 1.0f;
  std::vector<float> output = nans(s.width);
  const auto width = static_cast<int32_t>(s.width);
  rnf::cuda::FlowForward f{};
  f.shape = s, f.step_size = 0.5f, f.negative_slope = 0.25f, f.weight = &weight;
  f.input = {values.data(), width, width, width, 1}, f.output = {{output.data(), width, width, width, 1}, 0};
  expect(rnf::cuda::flow_forward(f, nullptr) == cudaSuccess, "status", "limits");
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double z = static_cast<double>(values[i]), wanted = z + 0.5 * activate(z, 0.25);
    const auto as_float = static_cast<float>(wanted);
    const bool same = std::isnan(wanted) ? std::isnan(output[i])
                      : std::isinf(as_float)
                          ? output[i] == as_float
                          : std::fabs(output[i] - wanted) <= 2e-7 * std::fmax(1e-30, std::fabs(wanted));
    expect(same, "limits of the activation", std::to_string(values[i]), static_cast<double>(output[i]), wanted);
  }
}

void check_divider() {
  for (const int divisor : {1, 2, 3, 7, 28, 31, 32, 33, 255, 256, 641, 4095, 32767, 32768, 65521, 65535}) {
    const rnf::cuda::Divider by = rnf::cuda::Divider::by(divisor);
    bool exact = true;
    for (int n = 0; n < rnf::cuda::Divider::kLimit; ++n) exact = exact && by.quotient(n) == n / divisor;
    expect(exact, "division", std::to_string(divisor));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The penalty
// ---------------------------------------------------------------------------------------------------------------------

struct PenaltyResult {
  std::vector<double> value, coefficients, gradient;
};

PenaltyResult exact_penalty(const rnf::cuda::Penalty& p, const std::vector<float>& upstream) {
  const int64_t C = p.channels, area = p.kernel * p.kernel;
  const double a = p.slope_low, b = p.slope_high;
  const bool none = p.reduction == rnf::cuda::Reduction::none;
  const double scale = p.reduction == rnf::cuda::Reduction::mean ? 1.0 / static_cast<double>(p.steps * C) : 1.0;
  PenaltyResult result;
  result.value.assign(none ? static_cast<std::size_t>(p.steps * C) : 1, 0.0);
  result.coefficients.assign(static_cast<std::size_t>(3 * p.steps * C), 0.0);
  result.gradient.assign(static_cast<std::size_t>(p.steps * C * C * area), 0.0);
  const auto sign = [](double x) { return static_cast<double>((x > 0) - (x < 0)); };
  for (int64_t n = 0; n < p.steps; ++n) {
    const auto w = [&](int64_t d, int64_t e, int64_t tap) {
      return static_cast<double>(p.weight[((n * C + d) * C + e) * area + tap]);
    };
    double* const c = result.coefficients.data() + n * 3 * C;
    for (int64_t d = 0; d < C; ++d) {
      const double m = w(d, d, area / 2);
      double r = -std::fabs(m), q = -std::fabs(m), argument = 0, dm = 0, dr = 0, dq = 0;
      for (int64_t e = 0; e < C; ++e)
        for (int64_t tap = 0; tap < area; ++tap) r += std::fabs(w(d, e, tap)), q += std::fabs(w(e, d, tap));
      switch (p.norm) {
        case rnf::cuda::Norm::two:
          argument = p.rate + 2 * (a + b) * m + b * (2 * std::fabs(m) + r + q);
          dm = 2 * (a + b) + 2 * b * sign(m), dr = b, dq = b;
          break;
        case rnf::cuda::Norm::two_sharp:
          argument = p.rate + (2 * m + r > 0 ? b : a) * (2 * m + r) + b * q;
          dr = 2 * m + r > 0 ? b : a, dm = 2 * dr, dq = b;
          break;
        case rnf::cuda::Norm::inf:
          argument = 0.5 * p.rate + a * (m + r);
          dm = a, dr = a;
          break;
        default:
          argument = 0.5 * p.rate + a * m + b * q;
          dm = a, dq = b;
      }
      const bool active = argument > 0;
      if (!active) continue;
      c[d] = scale * dm, c[C + d] = scale * dr, c[2 * C + d] = scale * dq;
      result.value[none ? n * C + d : 0] += argument * scale;
    }
    const auto go = [&](int64_t d) { return static_cast<double>(upstream[none ? n * C + d : 0]); };
    for (int64_t d = 0; d < C; ++d)
      for (int64_t e = 0; e < C; ++e)
        for (int64_t tap = 0; tap < area; ++tap)
          result.gradient[((n * C + d) * C + e) * area + tap] =
              d == e && tap == area / 2 ? c[d] * go(d) : sign(w(d, e, tap)) * (c[C + d] * go(d) + c[2 * C + e] * go(e));
  }
  return result;
}

void check_penalty(int64_t steps, int64_t channels, int64_t kernel, int64_t norm, int64_t reduction) {
  const bool none = reduction == 2;
  const std::string where = "penalty N" + std::to_string(steps) + " C" + std::to_string(channels) + " k" +
                            std::to_string(kernel) + " norm " + std::to_string(norm) + " reduction " +
                            std::to_string(reduction);
  const auto fan_in = static_cast<double>(channels * kernel * kernel);
  const std::vector<double> random = random_values(steps * channels * channels * kernel * kernel, 0.5 / fan_in);
  std::vector<float> weight(random.begin(), random.end());
  for (int64_t n = 0; n < steps; ++n)  // about half of the terms are active
    for (int64_t d = 0; d < channels; ++d)
      weight[((n * channels + d) * channels + d) * kernel * kernel + kernel * kernel / 2] -=
          (n + d) % 2 == 0 ? 40.0f : 0.25f;
  if (channels > 1) weight[0] = 0.0f;
  const int64_t values = none ? steps * channels : 1;
  std::vector<float> value = nans(values), coefficients = nans(3 * steps * channels);
  std::vector<float> gradient = nans(static_cast<int64_t>(weight.size()));
  const rnf::cuda::Penalty p{steps,
                             channels,
                             kernel,
                             2.0,
                             0.125,
                             1.0,
                             static_cast<rnf::cuda::Norm>(norm),
                             static_cast<rnf::cuda::Reduction>(reduction),
                             weight.data(),
                             value.data(),
                             coefficients.data()};
  std::vector<double> workspace(static_cast<std::size_t>(rnf::cuda::penalty_workspace_bytes(p) + 7) / 8, NAN);
  expect(rnf::cuda::contraction_penalty(p, workspace.data(), nullptr) == cudaSuccess, "status", where);
  std::vector<float> upstream(static_cast<std::size_t>(values), 0.5f);
  for (std::size_t i = 0; i < upstream.size(); ++i) upstream[i] += 0.25f * static_cast<float>(i % 3);
  const rnf::cuda::PenaltyBackward b{
      steps, channels, kernel, upstream.data(), none, weight.data(), coefficients.data(), gradient.data()};
  expect(rnf::cuda::contraction_penalty_backward(b, nullptr) == cudaSuccess, "status of the gradient", where);
  const PenaltyResult wanted = exact_penalty(p, upstream);
  compare(value, wanted.value.data(), values, "value", where);
  compare(coefficients, wanted.coefficients.data(), 3 * steps * channels, "coefficients", where);
  compare(gradient, wanted.gradient.data(), static_cast<int64_t>(weight.size()), "gradient", where);

  weight.back() = NAN;  // shows in the value and in its own gradient
  expect(rnf::cuda::contraction_penalty(p, workspace.data(), nullptr) == cudaSuccess &&
             rnf::cuda::contraction_penalty_backward(b, nullptr) == cudaSuccess,
         "status with NaN", where);
  expect(std::isnan(value.back()), "NaN in the value", where);
  expect(std::isnan(gradient.back()) || kernel == 1, "NaN in the gradient", where);  // a centre tap has a derivative
}

void check_penalties(bool quick) {
  check_penalty(3, 9, 3, 0, 0);  // several slabs of rows
  check_penalty(2, 33, 1, 1, 1);
  if (quick) return;
  int64_t i = 0;
  for (const int64_t channels : {1, 2, 7, 8, 17})
    for (int64_t norm = 0; norm < 4; ++norm, ++i)
      for (int64_t reduction = 0; reduction < 3; ++reduction)
        check_penalty(1 + i % 3, channels, 1 + 2 * ((i + reduction) % 4), norm, reduction);
}

}  // namespace

int main(int count, char** arguments) {
  cuda_shim::Device& device = cuda_shim::Device::get();
  device.dynamic_shared = rnf::cuda::shared_memory;
  bool quick = false, sites = false;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "reverse") device.reverse = true;
    if (argument == "quick") quick = true;
    if (argument == "sites") sites = true;
    if (argument.rfind("skip=", 0) == 0) device.skipped = argument.substr(5);
  }
  check_flows(quick);
  check_penalties(quick);
  if (!quick) {
    check_what_fits();
    check_activation_limits();
    check_divider();
  }
  if (sites)
    for (const std::string& site : device.sites) std::printf("barrier %s\n", site.c_str());
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
