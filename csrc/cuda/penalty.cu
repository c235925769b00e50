// The Gershgorin penalty of all steps' filters in one launch, and its gradient in another.
//
// A block sums the magnitudes of kRows output channels of one step. The last block of a step to finish has all sums:
// it computes the step's terms and their derivatives; the last of these adds up the steps. Whichever block that is, it
// adds in the same order. Sums run in double: thousands of terms, compared with a threshold.
#include "api.h"
#include "launch.h"

namespace rnf::cuda {

extern __shared__ float4 shared_memory[];

namespace {

constexpr int kRows = 8;  // one warp a row
constexpr int kThreads = kRows * kWarp;

struct Workspace {
  int64_t slabs;      // blocks a step
  double* rows;       // (N, C)
  double* columns;    // (N, slabs, C)
  double* totals;     // (N)
  unsigned* tickets;  // (N + 1), zero: how many blocks of each step, and how many steps, are done
  int64_t bytes;

  static Workspace of(const Penalty& p, void* data) {
    Workspace w{};
    w.slabs = (p.channels + kRows - 1) / kRows;
    w.rows = static_cast<double*>(data);
    w.columns = w.rows + p.steps * p.channels;
    w.totals = w.columns + p.steps * w.slabs * p.channels;
    w.tickets = reinterpret_cast<unsigned*>(w.totals + p.steps);
    w.bytes = static_cast<int64_t>(sizeof(double)) * p.steps * (p.channels + w.slabs * p.channels + 1) +
              static_cast<int64_t>(sizeof(unsigned)) * (p.steps + 1);
    return w;
  }
};

__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Whether this block is the last of `count` to come here; it then sees what the others wrote before.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, int64_t count, unsigned* flag) {
  __threadfence();
  __syncthreads();  // the ticket says that all threads have written
  if (threadIdx.x == 0) *flag = atomicAdd(ticket, 1u) == static_cast<unsigned>(count - 1) ? 1u : 0u;
  __syncthreads();
  __threadfence();
  return *flag != 0;
}

__device__ __forceinline__ double sign(double x) { return static_cast<double>((x > 0.0) - (x < 0.0)); }

// One channel's argument of the hinge and its derivatives for centre tap, row sum and column sum.
struct Term {
  double argument, dm, dr, dq;
  __device__ __forceinline__ Term(const Penalty& p, double m, double r, double q) {
    const double a = p.slope_low, b = p.slope_high;
    switch (p.norm) {
      case Norm::two:
        argument = p.rate + 2 * (a + b) * m + b * (2 * fabs(m) + r + q);
        dm = 2 * (a + b) + 2 * b * sign(m), dr = b, dq = b;
        break;
      case Norm::two_sharp:
        argument = p.rate + fmax(a * (2 * m + r), b * (2 * m + r)) + b * q;
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
  }
};

// kArea: the number of taps where the compiler knows it, else 0.
template <int kArea>
__global__ void __launch_bounds__(kThreads) penalty_kernel(const Penalty p, const Workspace w) {
  double* const magnitudes = reinterpret_cast<double*>(shared_memory);  // (kRows, kWarp)
  unsigned* const flag = reinterpret_cast<unsigned*>(magnitudes + kThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t channels = p.channels, area = kArea > 0 ? kArea : p.kernel * p.kernel;
  const int64_t step = blockIdx.x / w.slabs, slab = blockIdx.x % w.slabs, row = slab * kRows + warp;
  const float* const weight = p.weight + step * channels * channels * area;

  double row_sum = 0.0;
  for (int64_t first = 0; first < channels; first += kWarp) {
    const int64_t column = first + lane;
    double magnitude = 0.0;
    if (row < channels && column < channels) {
      const float* const taps = weight + (row * channels + column) * area;
      for (int64_t tap = 0; tap < area; ++tap) magnitude += fabs(static_cast<double>(__ldg(taps + tap)));
    }
    row_sum += magnitude;
    magnitudes[threadIdx.x] = magnitude;
    __syncthreads();
    if (warp == 0 && column < channels) {
      double sum = 0.0;
      for (int r = 0; r < kRows; ++r) sum += magnitudes[r * kWarp + lane];
      w.columns[(step * w.slabs + slab) * channels + column] = sum;
    }
    __syncthreads();
  }
  row_sum = warp_sum(row_sum);
  if (lane == 0 && row < channels) w.rows[step * channels + row] = row_sum;
  if (!is_last_block(w.tickets + step, w.slabs, flag)) return;

  const double scale = p.reduction == Reduction::mean ? 1.0 / static_cast<double>(p.steps * channels) : 1.0;
  float* const coefficients = p.coefficients + step * 3 * channels;
  double total = 0.0;
  for (int64_t d = threadIdx.x; d < channels; d += kThreads) {
    const double m = static_cast<double>(__ldg(weight + (d * channels + d) * area + area / 2));
    double column_sum = 0.0;
    for (int64_t s = 0; s < w.slabs; ++s) column_sum += w.columns[(step * w.slabs + s) * channels + d];
    const Term term(p, m, w.rows[step * channels + d] - fabs(m), column_sum - fabs(m));
    const bool active = !(term.argument <= 0);  // so that NaN counts, as in PyTorch's relu
    const double excess = active ? term.argument : 0.0, factor = active ? scale : 0.0;
    coefficients[d] = static_cast<float>(term.dm * factor);
    coefficients[channels + d] = static_cast<float>(term.dr * factor);
    coefficients[2 * channels + d] = static_cast<float>(term.dq * factor);
    total += excess;
    if (p.reduction == Reduction::none) p.value[step * channels + d] = static_cast<float>(excess);
  }
  if (p.reduction == Reduction::none) return;

  total = warp_sum(total);
  if (lane == 0) magnitudes[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int r = 1; r < kRows; ++r) total += magnitudes[r];
    w.totals[step] = total;
  }
  if (!is_last_block(w.tickets + p.steps, p.steps, flag) || threadIdx.x != 0) return;
  double sum = 0.0;
  for (int64_t n = 0; n < p.steps; ++n) sum += w.totals[n];
  *p.value = static_cast<float>(sum * scale);
}

// One block an output channel of a step.
template <int kArea>
__global__ void __launch_bounds__(kThreads) penalty_backward_kernel(const PenaltyBackward p) {
  const int64_t channels = p.channels, area = kArea > 0 ? kArea : p.kernel * p.kernel;
  const int64_t step = blockIdx.x / channels, d = blockIdx.x % channels, line = blockIdx.x * channels * area;
  const float* const coefficient = p.coefficients + step * 3 * channels;
  const auto scaled = [&](int64_t which, int64_t channel) {
    return __ldg(coefficient + which * channels + channel) *
           __ldg(p.grad_output + (p.per_channel ? step * channels + channel : 0));
  };
  const float dm = scaled(0, d), dr = scaled(1, d);
  for (int64_t i = threadIdx.x; i < channels * area; i += kThreads) {
    const int64_t e = i / area, tap = i - e * area;
    const float w = __ldg(p.weight + line + i), magnitude = dr + scaled(2, e);
    float gradient = w == 0.0f ? 0.0f * magnitude : copysignf(1.0f, w) * magnitude;
    if (w != w) gradient = w;  // a NaN filter gives a NaN gradient
    if (e == d && tap == area / 2) gradient = dm;
    p.grad_weight[line + i] = gradient;
  }
}

bool valid(int64_t steps, int64_t channels, int64_t kernel) {
  const bool counts = steps >= 1 && channels >= 1 && kernel >= 1 && kernel % 2 == 1;
  return counts && steps < (int64_t{1} << 31) / channels;
}

}  // namespace

int64_t penalty_workspace_bytes(const Penalty& p) { return Workspace::of(p, nullptr).bytes; }

cudaError_t contraction_penalty(const Penalty& p, void* workspace, cudaStream_t stream) {
  if (!valid(p.steps, p.channels, p.kernel)) return cudaErrorInvalidValue;
  const Workspace w = Workspace::of(p, workspace);
  const cudaError_t status =
      cudaMemsetAsync(w.tickets, 0, static_cast<std::size_t>(p.steps + 1) * sizeof(unsigned), stream);
  if (status != cudaSuccess) return status;
  const auto kernel = p.kernel == 3 ? penalty_kernel<9> : p.kernel == 5 ? penalty_kernel<25> : penalty_kernel<0>;
  return launch(kernel, dim3(static_cast<unsigned>(p.steps * w.slabs)), dim3(kThreads),
                static_cast<int64_t>(sizeof(double)) * (kThreads + 1), stream, p, w);
}

cudaError_t contraction_penalty_backward(const PenaltyBackward& p, cudaStream_t stream) {
  if (!valid(p.steps, p.channels, p.kernel)) return cudaErrorInvalidValue;
  const auto kernel = p.kernel == 3   ? penalty_backward_kernel<9>
                      : p.kernel == 5 ? penalty_backward_kernel<25>
                                      : penalty_backward_kernel<0>;
  return launch(kernel, dim3(static_cast<unsigned>(p.steps * p.channels)), dim3(kThreads), 0, stream, p);
}

}  // namespace rnf::cuda
