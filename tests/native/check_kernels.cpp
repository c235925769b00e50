// Runs every CPU kernel of every instruction set this processor has against straightforward loops in double.
// Built by tests/test_sanitizers.py with AddressSanitizer and UBSan: all tensors are exact-size allocations, so a read
// or write one element outside is an error. No PyTorch here.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/api.h"

namespace {

std::mt19937 generator(1234);

int failures = 0;

void expect(bool ok, const char* what, const char* isa, const rnf::FlowShape& s, double error, double bound) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s (%s) B%ld C%ld %ldx%ld k%ld N%ld shared %d: error %g, bound %g\n", what, isa,
              static_cast<long>(s.batch), static_cast<long>(s.channels), static_cast<long>(s.height),
              static_cast<long>(s.width), static_cast<long>(s.kernel), static_cast<long>(s.steps), s.shared, error,
              bound);
}

// Two real threads, so that data races and shared scratch memory would show.
void run_on_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t half = count / 2;
  std::thread other([=] { body(0, half, context); });
  body(half, count, context);
  other.join();
}

template <class T>
std::vector<T> random_values(int64_t count, double scale) {
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

double activate(double u, double a) {
  return a * u + (1 - a) * (std::fmax(u, 0) + std::log1p(std::exp(-std::fabs(u))));
}
double slope(double u, double a) { return a + (1 - a) / (1 + std::exp(-u)); }

// (B, C, H, W) contiguous or channels_last.
template <class T>
rnf::View<T> view(T* data, const rnf::FlowShape& s, bool channels_last) {
  const int64_t area = s.height * s.width;
  if (channels_last) return {data, s.channels * area, 1, s.width * s.channels, s.channels};
  return {data, s.channels * area, area, s.width, 1};
}

struct Exact {
  std::vector<std::vector<double>> states, u;  // contiguous
  std::vector<double> grad_input, grad_weight, grad_bias;
};

int64_t at(const rnf::FlowShape& s, int64_t b, int64_t c, int64_t i, int64_t j) {
  return ((b * s.channels + c) * s.height + i) * s.width + j;
}

template <class Visit>  // visit(o, c, weight index, output pixel index, input pixel index)
void for_each_tap(const rnf::FlowShape& s, const Visit& visit) {
  const int64_t p = s.kernel / 2;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t o = 0; o < s.channels; ++o)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t di = 0; di < s.kernel; ++di)
          for (int64_t dj = 0; dj < s.kernel; ++dj)
            for (int64_t i = 0; i < s.height; ++i)
              for (int64_t j = 0; j < s.width; ++j) {
                const int64_t y = i + di - p, x = j + dj - p;
                if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
                visit(((o * s.channels + c) * s.kernel + di) * s.kernel + dj, at(s, b, o, i, j), at(s, b, c, y, x));
              }
}

template <class T>
Exact exact(const rnf::FlowShape& s, double h, double a, const std::vector<double>& input, const std::vector<T>& weight,
            const std::vector<T>& bias, const std::vector<std::vector<double>>& grads) {
  Exact e;
  const int64_t size = static_cast<int64_t>(input.size()), area = s.height * s.width, bank = s.channels * s.taps();
  e.states.push_back(input);
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> u(input.size());
    for (int64_t i = 0; i < size; ++i)
      if (!bias.empty()) u[i] = static_cast<double>(bias[n * s.channels + i / area % s.channels]);
    for_each_tap(s,
                 [&](int64_t w, int64_t out, int64_t in) { u[out] += double(weight[n * bank + w]) * e.states[k][in]; });
    std::vector<double> next(input.size());
    for (int64_t i = 0; i < size; ++i) next[i] = e.states[k][i] + h * activate(u[i], a);
    e.u.push_back(u);
    e.states.push_back(next);
  }
  e.grad_weight.assign(weight.size(), 0);
  e.grad_bias.assign(static_cast<std::size_t>(s.banks() * s.channels), 0);
  std::vector<double> g = grads.back();
  for (int64_t k = s.steps - 1; k >= 0; --k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> v(input.size());
    for (int64_t i = 0; i < size; ++i) {
      v[i] = h * slope(e.u[k][i], a) * g[i];
      e.grad_bias[n * s.channels + i / area % s.channels] += v[i];
    }
    for_each_tap(s, [&](int64_t w, int64_t out, int64_t in) {
      e.grad_weight[n * bank + w] += v[out] * e.states[k][in];
      g[in] += double(weight[n * bank + w]) * v[out];
    });
    if (grads.size() > 1)
      for (int64_t i = 0; i < size; ++i) g[i] += grads[k][i];
  }
  e.grad_input = g;
  return e;
}

template <class T, class Index>
void compare(const T* found, const std::vector<double>& wanted, const Index& index, const char* what, const char* isa,
             const rnf::FlowShape& s, double relative) {
  double error = 0, scale = 1e-30;
  bool nan = false;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const double value = static_cast<double>(found[index(static_cast<int64_t>(i))]);
    nan = nan || std::isnan(value);
    error = std::fmax(error, std::fabs(value - wanted[i]));
    scale = std::fmax(scale, std::fabs(wanted[i]));
  }
  expect(!nan && error <= relative * scale, what, isa, s, nan ? NAN : error, relative * scale);
}

template <class T>
void check_flow(const rnf::Kernels& kernels, const rnf::FlowShape& s, bool channels_last, bool trajectory,
                bool with_bias, bool weight_grads, const rnf::Parallel& parallel) {
  const double relative = sizeof(T) == 4 ? 2e-5 : 1e-13;
  const double h = 0.13, a = 0.1;
  const int64_t size = s.batch * s.channels * s.height * s.width, bank = s.channels * s.taps();
  const auto index = [&](int64_t i) {
    if (!channels_last) return i;
    const int64_t j = i % s.width, y = i / s.width % s.height, c = i / (s.width * s.height) % s.channels;
    return ((i / (s.width * s.height * s.channels) * s.height + y) * s.width + j) * s.channels + c;
  };
  const auto plain = [](int64_t i) { return i; };
  std::vector<T> input = random_values<T>(size, 1.0);
  const std::vector<T> weight = random_values<T>(s.banks() * bank, 1.0 / std::sqrt(double(s.taps())));
  const std::vector<T> bias = with_bias ? random_values<T>(s.banks() * s.channels, 0.5) : std::vector<T>();
  std::vector<T> grad = random_values<T>((trajectory ? s.steps + 1 : 1) * size, 1.0);

  std::vector<double> exact_input(input.size());
  for (int64_t i = 0; i < size; ++i) exact_input[i] = static_cast<double>(input[index(i)]);
  std::vector<std::vector<double>> exact_grads(trajectory ? s.steps + 1 : 1, std::vector<double>(input.size()));
  for (std::size_t k = 0; k < exact_grads.size(); ++k)
    for (int64_t i = 0; i < size; ++i) exact_grads[k][i] = static_cast<double>(grad[k * size + index(i)]);
  const Exact e = exact(s, h, a, exact_input, weight, bias, exact_grads);

  std::vector<T> output((trajectory ? s.steps + 1 : 1) * size, T(NAN));
  const T* b = with_bias ? bias.data() : nullptr;
  const int64_t stride = trajectory ? size : 0;
  kernels.of<T>().flow_forward({s, T(h), T(a), view<const T>(input.data(), s, channels_last), weight.data(), b,
                                view<T>(output.data(), s, channels_last), trajectory, stride},
                               parallel);
  if (trajectory)
    for (int64_t k = 0; k <= s.steps; ++k)
      compare(output.data() + k * size, e.states[k], index, "trajectory", kernels.name, s, relative);
  else
    compare(output.data(), e.states.back(), index, "forward", kernels.name, s, relative);

  std::vector<T> grad_input(size, T(NAN)), grad_weight(weight.size(), T(NAN)),
      grad_bias(s.banks() * s.channels, T(NAN));
  kernels.of<T>().flow_backward(
      {s, T(h), T(a), view<const T>(grad.data(), s, channels_last), trajectory, stride,
       view<const T>(input.data(), s, channels_last), weight.data(), b, view<T>(grad_input.data(), s, channels_last),
       weight_grads ? grad_weight.data() : nullptr, weight_grads ? grad_bias.data() : nullptr},
      parallel);
  compare(grad_input.data(), e.grad_input, index, "grad_input", kernels.name, s, relative);
  if (weight_grads) {
    compare(grad_weight.data(), e.grad_weight, plain, "grad_weight", kernels.name, s, relative);
    compare(grad_bias.data(), e.grad_bias, plain, "grad_bias", kernels.name, s, relative);
  }
}

template <class T>
void check_activation(const rnf::Kernels& kernels, int64_t count, const rnf::Parallel& parallel) {
  std::vector<T> u = random_values<T>(count, 10.0);
  if (count > 2) u[0] = T(1e4), u[1] = T(-1e4), u[2] = T(0);
  std::vector<T> value(u.size(), T(NAN)), gradient(u.size(), T(NAN));
  const std::vector<T> grad = random_values<T>(count, 1.0);
  kernels.of<T>().activation({count, T(0.1), nullptr, u.data(), value.data()}, parallel);
  kernels.of<T>().activation({count, T(0.1), grad.data(), u.data(), gradient.data()}, parallel);
  const double tolerance = sizeof(T) == 4 ? 4e-7 : 1e-15;
  const rnf::FlowShape none{};
  for (int64_t i = 0; i < count; ++i) {
    const double x = static_cast<double>(u[i]), s = activate(x, double(T(0.1))),
                 d = double(grad[i]) * slope(x, double(T(0.1)));
    const double error = std::fabs(static_cast<double>(value[i]) - s), bound = tolerance * (std::fabs(s) + 0.5);
    expect(error <= bound, "activation", kernels.name, none, error, bound);
    const double error2 = std::fabs(static_cast<double>(gradient[i]) - d);
    expect(error2 <= tolerance * (std::fabs(d) + 0.5), "activation gradient", kernels.name, none, error2, tolerance);
  }
}

template <class T>
void check_penalty(int64_t steps, int64_t channels, int64_t kernel, const rnf::Parallel& parallel) {
  const int64_t count = steps * channels * channels * kernel * kernel;
  const std::vector<T> weight = random_values<T>(count, 1.0);
  for (int norm = 0; norm < 4; ++norm)
    for (int reduction = 0; reduction < 3; ++reduction) {
      const bool none = reduction == 2;
      std::vector<T> value(none ? steps * channels : 1, T(NAN)), coefficients(3 * steps * channels, T(NAN));
      std::vector<T> gradient(weight.size(), T(NAN));
      rnf::contraction_penalty<T>(
          {steps, channels, kernel, 1.0, 0.1, 1.0, static_cast<rnf::Norm>(norm), static_cast<rnf::Reduction>(reduction),
           weight.data(), value.data(), coefficients.data()},
          parallel);
      const std::vector<T> upstream(value.size(), T(1));
      rnf::contraction_penalty_backward<T>(
          {steps, channels, kernel, upstream.data(), none, weight.data(), coefficients.data(), gradient.data()},
          parallel);
      // Every term is positively homogeneous up to the constant: value = active constants + sum(W * gradient).
      double total = 0, active = 0;
      for (std::size_t i = 0; i < weight.size(); ++i)
        total += static_cast<double>(weight[i]) * static_cast<double>(gradient[i]);
      const double constant = norm < 2 ? 1.0 : 0.5;
      double sum = 0;
      for (const T& v : value) sum += static_cast<double>(v);
      for (int64_t n = 0; n < steps; ++n)
        for (int64_t d = 0; d < channels; ++d) {
          const T* c = coefficients.data() + n * 3 * channels + d;
          active += (c[0] != 0 || c[channels] != 0 || c[2 * channels] != 0) ? constant : 0.0;
        }
      if (reduction == 1) active /= static_cast<double>(steps * channels);
      const double error = std::fabs(total + active - sum),
                   bound = (sizeof(T) == 4 ? 1e-5 : 1e-12) * (std::fabs(sum) + 1);
      expect(error <= bound, "penalty", "any", rnf::FlowShape{0, channels, 0, 0, kernel, steps, false}, error, bound);
    }
}

}  // namespace

int main() {
  std::vector<const rnf::Kernels*> sets{&rnf::portable::kernels};
#ifdef __x86_64__
  const std::string supported = rnf::supported_isas();
  if (supported.find("avx2") != std::string::npos) sets.push_back(&rnf::avx2::kernels);
  if (supported.find("avx512") != std::string::npos) sets.push_back(&rnf::avx512::kernels);
#endif
  const rnf::Parallel one{1, run_on_threads}, two{2, run_on_threads};
  const rnf::FlowShape shapes[] = {
      {1, 1, 1, 1, 1, 1, false},   {2, 1, 1, 1, 3, 2, false}, {3, 2, 1, 7, 5, 2, true},
      {2, 3, 5, 4, 3, 3, false},   {5, 4, 7, 7, 3, 2, true},  {2, 5, 3, 17, 5, 2, false},
      {1, 8, 14, 14, 3, 2, false}, {4, 8, 8, 8, 1, 3, false}, {2, 9, 6, 31, 3, 2, false},
      {1, 12, 20, 9, 3, 2, false}, {0, 3, 4, 4, 3, 2, false}, {1, 16, 30, 30, 3, 1, false},
  };
  int cases = 0;
  for (const rnf::Kernels* kernels : sets)
    for (const rnf::FlowShape& shape : shapes)
      for (int variant = 0; variant < 8; ++variant, ++cases) {
        const bool last = variant & 1, trajectory = variant & 2, other = variant & 4;
        check_flow<float>(*kernels, shape, last, trajectory, !other, last == trajectory, other ? two : one);
        check_flow<double>(*kernels, shape, last, trajectory, other, last != trajectory, other ? one : two);
      }
  // Large enough for all threads to share one sample.
  for (const rnf::Kernels* kernels : sets)
    check_flow<float>(*kernels, {1, 16, 40, 40, 3, 1, false}, false, false, true, true, two);
  for (const rnf::Kernels* kernels : sets)
    for (int64_t count : {0, 1, 3, 15, 16, 17, 16384, 16385, 40001}) {
      check_activation<float>(*kernels, count, two);
      check_activation<double>(*kernels, count, one);
    }
  for (int64_t channels : {1, 2, 7, 16})
    for (int64_t kernel : {1, 3, 5}) {
      check_penalty<float>(3, channels, kernel, two);
      check_penalty<double>(1, channels, kernel, one);
    }
  std::printf("%d flow cases on %zu instruction sets, %d failures\n", cases, sets.size(), failures);
  return failures != 0;
}
