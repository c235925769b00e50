// The Gershgorin penalty of all steps' filters, and its gradient. Each is one pass over the filters in one call.
// Sums run in double: thousands of terms, compared with a threshold.
#include <cmath>

#include "api.h"
#include "memory.h"

namespace rnf {
namespace {

template <class T>
double sign(T x) {
  return static_cast<double>((x > T(0)) - (x < T(0)));
}

// Waking a thread takes longer than the filters of a small network.
template <class Body>
void for_steps(int64_t steps, int64_t weights, const Parallel& parallel, const Body& body) {
  if (weights < int64_t{1} << 17)
    body(0, steps);
  else
    parallel(steps, body);
}

// kArea: the number of taps where the compiler knows it, else 0.
template <int kArea, class T>
void add_magnitudes(const T* weight, int64_t channels, int64_t any_area, double* row, double* column) {
  const int64_t area = kArea > 0 ? kArea : any_area;
  for (int64_t d = 0; d < channels; ++d) {
    double sum = 0;
    for (int64_t e = 0; e < channels; ++e, weight += area) {
      double magnitude = 0;
      for (int64_t tap = 0; tap < area; ++tap) magnitude += std::fabs(static_cast<double>(weight[tap]));
      sum += magnitude;
      column[e] += magnitude;
    }
    row[d] = sum;
  }
}

template <int kArea, class T>
void distribute(const T* __restrict weight, int64_t channels, int64_t any_area, const T* dm, const T* dr, const T* dq,
                T* __restrict grad) {
  const int64_t area = kArea > 0 ? kArea : any_area;
  for (int64_t d = 0; d < channels; ++d, weight += channels * area, grad += channels * area) {
    for (int64_t e = 0; e < channels; ++e) {
      const T magnitude = dr[d] + dq[e];
      for (int64_t tap = 0; tap < area; ++tap) {  // without branches: nobody predicts the signs of filters
        const T w = weight[e * area + tap], towards = std::copysign(T(1), w) * magnitude;
        grad[e * area + tap] = w == T(0) ? T(0) * magnitude : towards;
      }
    }
    int nans = 0;
    for (int64_t i = 0; i < channels * area; ++i) nans += weight[i] != weight[i];
    for (int64_t i = 0; nans > 0 && i < channels * area; ++i)  // a NaN filter gives a NaN gradient
      if (weight[i] != weight[i]) grad[i] = weight[i];
    grad[d * area + area / 2] = dm[d];
  }
}

}  // namespace

template <class T>
void contraction_penalty(const Penalty<T>& p, const Parallel& parallel) {
  const int64_t channels = p.channels, area = p.kernel * p.kernel;
  const auto add = area == 9 ? add_magnitudes<9, T> : area == 25 ? add_magnitudes<25, T> : add_magnitudes<0, T>;
  const double a = p.slope_low, b = p.slope_high;
  const double scale = p.reduction == Reduction::mean ? 1.0 / static_cast<double>(p.steps * channels) : 1.0;
  Buffer<double> totals(p.steps);
  for_steps(p.steps, p.steps * channels * channels * area, parallel, [&](int64_t begin, int64_t end) {
    Buffer<double> rows(2 * channels);
    double* const row = rows.get();
    double* const column = row + channels;
    for (int64_t n = begin; n < end; ++n) {
      const T* weight = p.weight + n * channels * channels * area;
      T* const coefficient = p.coefficients + n * 3 * channels;
      rows.zero(2 * channels);
      add(weight, channels, area, row, column);
      double total = 0;
      for (int64_t d = 0; d < channels; ++d) {
        const double m = static_cast<double>(weight[(d * channels + d) * area + area / 2]);
        const double r = row[d] - std::fabs(m), q = column[d] - std::fabs(m);
        double argument, dm, dr, dq;
        switch (p.norm) {
          case Norm::two:
            argument = p.rate + 2 * (a + b) * m + b * (2 * std::fabs(m) + r + q);
            dm = 2 * (a + b) + 2 * b * sign(m), dr = b, dq = b;
            break;
          case Norm::two_sharp:
            argument = p.rate + std::fmax(a * (2 * m + r), b * (2 * m + r)) + b * q;
            // Where both slopes tie each counts half, as in torch.maximum.
            dr = 0.5 * (a + b) + 0.5 * (b - a) * sign(2 * m + r), dm = 2 * dr, dq = b;
            break;
          case Norm::inf:
            argument = 0.5 * p.rate + a * (m + r);
            dm = a, dr = a, dq = 0;
            break;
          default:
            argument = 0.5 * p.rate + a * m + b * q;
            dm = a, dr = 0, dq = b;
        }
        const bool active = !(argument <= 0);  // so that NaN counts, as in PyTorch's relu
        const double excess = active ? argument : 0.0, factor = active ? scale : 0.0;
        coefficient[d] = static_cast<T>(dm * factor);
        coefficient[channels + d] = static_cast<T>(dr * factor);
        coefficient[2 * channels + d] = static_cast<T>(dq * factor);
        total += excess;
        if (p.reduction == Reduction::none) p.value[n * channels + d] = static_cast<T>(excess);
      }
      totals.get()[n] = total;
    }
  });
  if (p.reduction == Reduction::none) return;
  double total = 0;
  for (int64_t n = 0; n < p.steps; ++n) total += totals.get()[n];
  *p.value = static_cast<T>(total * scale);
}

template <class T>
void contraction_penalty_backward(const PenaltyBackward<T>& p, const Parallel& parallel) {
  const int64_t channels = p.channels, area = p.kernel * p.kernel;
  const auto gradient = area == 9 ? distribute<9, T> : area == 25 ? distribute<25, T> : distribute<0, T>;
  for_steps(p.steps, p.steps * channels * channels * area, parallel, [&](int64_t begin, int64_t end) {
    Buffer<T> scaled(3 * channels);
    T* const dm = scaled.get();
    T* const dr = dm + channels;
    T* const dq = dr + channels;
    for (int64_t n = begin; n < end; ++n) {
      const T* coefficient = p.coefficients + n * 3 * channels;
      for (int64_t i = 0; i < 3 * channels; ++i)
        dm[i] = coefficient[i] * p.grad_output[p.per_channel ? n * channels + i % channels : 0];
      const int64_t offset = n * channels * channels * area;
      gradient(p.weight + offset, channels, area, dm, dr, dq, p.grad_weight + offset);
    }
  });
}

template void contraction_penalty<float>(const Penalty<float>&, const Parallel&);
template void contraction_penalty<double>(const Penalty<double>&, const Parallel&);
template void contraction_penalty_backward<float>(const PenaltyBackward<float>&, const Parallel&);
template void contraction_penalty_backward<double>(const PenaltyBackward<double>&, const Parallel&);

}  // namespace rnf
