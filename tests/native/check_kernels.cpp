// Runs every CPU kernel of every instruction set this processor has against straightforward loops in double.
// Built by tests/test_sanitizers.py with AddressSanitizer and UBSan: all tensors are exact-size allocations, so a read
// or write one element outside is an error, and new memory is filled with NaN, so a read of it shows. No PyTorch here.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/api.h"
#include "../../csrc/cpu/filter_cache.h"

namespace {

using rnf::BFloat16;

#define RNF_INLINE inline __attribute__((always_inline))
#define RNF_VECTOR_BYTES 16
// clang-format off: each file builds on those before it
#include "../../csrc/cpu/vector.inc"
#include "../../csrc/cpu/hash.inc"
// clang-format on

std::mt19937 generator(1234);

typedef rnf::Layout L;

rnf::FlowShape shape(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t kernel, int64_t steps,
                     bool shared, rnf::Layout layout, bool bfloat16 = false) {
  rnf::FlowShape s{};
  s.batch = batch, s.channels = channels, s.height = height, s.width = width, s.kernel = kernel, s.steps = steps;
  s.shared = shared, s.layout = layout, s.bfloat16 = bfloat16;
  return s;
}

int failures = 0;

void expect(bool ok, const char* what, const char* isa, const rnf::FlowShape& s, double error, double bound) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s (%s) B%ld C%ld %ldx%ld k%ld N%ld shared %d layout %ld: error %g, bound %g\n", what, isa,
              static_cast<long>(s.batch), static_cast<long>(s.channels), static_cast<long>(s.height),
              static_cast<long>(s.width), static_cast<long>(s.kernel), static_cast<long>(s.steps), s.shared,
              static_cast<long>(s.layout), error, bound);
}
void expect(bool ok, const char* what, const char* isa, const rnf::FlowShape& s) { expect(ok, what, isa, s, NAN, NAN); }

// Two real threads, so that data races and shared scratch memory would show.
void run_on_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t half = count / 2;
  std::thread other([=] { body(0, half, context); });
  body(half, count, context);
  other.join();
}
const rnf::Parallel kOne{1, run_on_threads}, kTwo{2, run_on_threads};

// Values that are the same in float and double.
std::vector<double> random_values(int64_t count, double scale) {
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) value = static_cast<double>(static_cast<float>(normal(generator)));
  return values;
}

// An array that ends where its allocation does. `shifted` takes away the alignment that an allocation has.
template <class T>
class Array {
 public:
  Array(int64_t count, bool shifted, T value = T(NAN))
      : shift_(shifted ? 1 : 0), values_(static_cast<std::size_t>(count + shift_), value) {}
  T* data() { return values_.data() + shift_; }
  const T* data() const { return values_.data() + shift_; }
  int64_t size() const { return static_cast<int64_t>(values_.size()) - shift_; }
  T& operator[](int64_t i) { return values_[static_cast<std::size_t>(i + shift_)]; }
  const T& operator[](int64_t i) const { return values_[static_cast<std::size_t>(i + shift_)]; }

 private:
  int64_t shift_;
  std::vector<T> values_;
};

template <class T>
bool same_bits(const Array<T>& a, const Array<T>& b) {
  return a.size() == b.size() && (a.size() == 0 || std::memcmp(a.data(), b.data(), sizeof(T) * a.size()) == 0);
}

double activate(double u, double a) {
  return a * u + (1 - a) * (std::fmax(u, 0) + std::log1p(std::exp(-std::fabs(u))));
}
double slope(double u, double a) { return a + (1 - a) / (1 + std::exp(-u)); }

struct Exact {
  std::vector<std::vector<double>> states, slopes;  // contiguous
  std::vector<double> grad_input, grad_weight, grad_bias;
};

// A flow with all that it is given, (B, C, H, W) contiguous, and what is to come out.
struct Problem {
  static constexpr double kStep = 0.125, kNegativeSlope = 0.09375;  // the same in float and double
  rnf::FlowShape s;
  bool trajectory, expanded;  // expanded: one value for all of the incoming gradient, as .sum() sends it
  std::vector<double> input, weight, bias, grad;
  Exact exact;
  int64_t size() const { return s.batch * s.channels * s.height * s.width; }
  int64_t bank() const { return s.channels * s.taps(); }
  int64_t outputs() const { return trajectory ? s.steps + 1 : 1; }
};

int64_t at(const rnf::FlowShape& s, int64_t b, int64_t c, int64_t i, int64_t j) {
  return ((b * s.channels + c) * s.height + i) * s.width + j;
}

template <class Visit>  // visit(weight index, output pixel index, input pixel index)
void for_each_tap(const rnf::FlowShape& s, const Visit& visit) {
  const int64_t p = s.kernel / 2;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t o = 0; o < s.channels; ++o)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t di = 0; di < s.kernel; ++di)
          for (int64_t dj = 0; dj < s.kernel; ++dj) {
            const int64_t w = ((o * s.channels + c) * s.kernel + di) * s.kernel + dj;
            const int64_t top = di < p ? p - di : 0, left = dj < p ? p - dj : 0;
            for (int64_t i = top; i < s.height && i + di - p < s.height; ++i) {
              const int64_t out = at(s, b, o, i, 0), in = at(s, b, c, i + di - p, dj - p);
              for (int64_t j = left; j < s.width && j + dj - p < s.width; ++j) visit(w, out + j, in + j);
            }
          }
}

Exact exact(const Problem& p) {
  const rnf::FlowShape& s = p.s;
  Exact e;
  const int64_t size = p.size(), area = s.height * s.width, bank = p.bank();
  e.states.push_back(p.input);
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> u(p.input.size()), next(p.input.size()), slopes(p.input.size());
    double* const sums = u.data();
    const double *const z = e.states[k].data(), *const w = p.weight.data() + n * bank;
    for (int64_t i = 0; i < size; ++i)
      if (!p.bias.empty()) u[i] = p.bias[n * s.channels + i / area % s.channels];
    for_each_tap(s, [=](int64_t tap, int64_t out, int64_t in) { sums[out] += w[tap] * z[in]; });
    for (int64_t i = 0; i < size; ++i) {
      next[i] = z[i] + Problem::kStep * activate(u[i], Problem::kNegativeSlope);
      slopes[i] = Problem::kStep * slope(u[i], Problem::kNegativeSlope);
    }
    e.slopes.push_back(slopes);
    e.states.push_back(next);
  }
  e.grad_weight.assign(p.weight.size(), 0);
  e.grad_bias.assign(static_cast<std::size_t>(s.banks() * s.channels), 0);
  std::vector<double> g(p.grad.end() - size, p.grad.end());
  for (int64_t k = s.steps - 1; k >= 0; --k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> scaled(p.input.size());
    for (int64_t i = 0; i < size; ++i) {
      scaled[i] = e.slopes[k][i] * g[i];
      e.grad_bias[n * s.channels + i / area % s.channels] += scaled[i];
    }
    double *const by_weight = e.grad_weight.data() + n * bank, *const by_input = g.data();
    const double *const z = e.states[k].data(), *const w = p.weight.data() + n * bank, *const v = scaled.data();
    for_each_tap(s, [=](int64_t tap, int64_t out, int64_t in) {
      by_weight[tap] += v[out] * z[in];
      by_input[in] += w[tap] * v[out];
    });
    if (p.trajectory)
      for (int64_t i = 0; i < size; ++i) g[i] += p.grad[k * size + i];
  }
  e.grad_input = g;
  return e;
}

Problem make_problem(const rnf::FlowShape& s, bool trajectory, bool with_bias, bool expanded) {
  Problem p{s, trajectory, expanded, {}, {}, {}, {}, {}};
  p.input = random_values(p.size(), 1.0);
  p.weight = random_values(s.banks() * p.bank(), 1.0 / std::sqrt(double(s.taps())));
  if (with_bias) p.bias = random_values(s.banks() * s.channels, 0.5);
  p.grad = random_values(p.outputs() * p.size(), 1.0);
  if (expanded) p.grad.assign(p.grad.size(), 0.75);
  p.exact = exact(p);
  return p;
}

// Where in memory a (B, C, H, W) tensor is contiguous or channels_last.
struct Order {
  rnf::FlowShape s;
  bool channels_last;
  int64_t operator()(int64_t i) const {
    if (!channels_last) return i;
    const int64_t j = i % s.width, y = i / s.width % s.height, c = i / (s.width * s.height) % s.channels;
    const int64_t b = i / (s.width * s.height * s.channels);
    return ((b * s.height + y) * s.width + j) * s.channels + c;
  }
  template <class T>
  rnf::View<T> view(T* data) const {
    const int64_t area = s.height * s.width;
    if (channels_last) return {data, s.channels * area, 1, s.width * s.channels, s.channels};
    return {data, s.channels * area, area, s.width, 1};
  }
  template <class T>
  rnf::Steps steps(const T* data) const {
    const rnf::View<const T> v = view(data);
    return {
        const_cast<T*>(data), false, s.batch * s.channels * s.height * s.width, v.batch, v.channel, v.row, v.column};
  }
};

// Several states, or an array without an order, in the order of memory.
template <class T>
Array<T> placed(const std::vector<double>& values, const Order& order, int64_t size, bool shifted) {
  Array<T> result(static_cast<int64_t>(values.size()), shifted);
  for (int64_t i = 0; i < result.size(); ++i)
    result[size == 0 ? i : i / size * size + order(i % size)] = static_cast<T>(values[i]);
  return result;
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

// One problem in one type, order of memory and on some threads; holds all tensors of its calls but the weight.
template <class T>
class Flow {
 public:
  struct Gradients {
    Array<T> input, weight, bias;
  };

  Flow(const rnf::Kernels& kernels, const Problem& p, const Array<T>& weight, bool channels_last, bool shifted,
       const rnf::Parallel& parallel)
      : states(0, false),
        slopes(0, false),
        kernels_(kernels),
        p_(p),
        weight_(weight),
        order_{p.s, channels_last},
        shifted_(shifted),
        parallel_(parallel),
        input_(placed<T>(p.input, order_, p.size(), shifted)),
        bias_(placed<T>(p.bias, {}, 0, shifted)),
        grad_(p.expanded ? Array<T>(1, shifted, p.grad.empty() ? T(0) : static_cast<T>(p.grad[0]))
                         : placed<T>(p.grad, order_, p.size(), shifted)) {}

  Array<T> forward(bool trajectory, bool save_states, bool save_slopes) {
    const int64_t size = p_.size(), steps = p_.s.steps;
    Array<T> output((trajectory ? steps + 1 : 1) * size, shifted_);
    states = Array<T>(save_states ? steps * size : 0, shifted_);
    slopes = Array<T>(save_slopes ? steps * size : 0, shifted_);
    rnf::FlowForward<T> f{};
    f.shape = p_.s, f.step_size = T(Problem::kStep), f.negative_slope = T(Problem::kNegativeSlope);
    f.input = order_.view<const T>(input_.data()), f.weight = weight_.data(), f.bias = bias();
    f.output = order_.view<T>(output.data()), f.trajectory = trajectory, f.state_stride = trajectory ? size : 0;
    f.states = order_.steps(save_states ? states.data() : nullptr);
    f.slopes = order_.steps(save_slopes ? slopes.data() : nullptr);
    kernels_.of<T>().flow_forward(f, parallel_);
    return output;
  }

  // From what the last forward() saved, if it did.
  Gradients backward(bool input, bool weights, bool biases) const {
    const int64_t size = p_.size();
    Gradients g{Array<T>(input ? size : 0, shifted_), Array<T>(weights ? weight_.size() : 0, shifted_),
                Array<T>(biases ? p_.s.banks() * p_.s.channels : 0, shifted_)};
    rnf::FlowBackward<T> f{};
    f.shape = p_.s, f.step_size = T(Problem::kStep), f.negative_slope = T(Problem::kNegativeSlope);
    f.input = order_.view<const T>(input_.data()), f.weight = weight_.data(), f.bias = bias();
    f.grad_output = p_.expanded ? rnf::View<const T>{grad_.data(), 0, 0, 0, 0} : order_.view<const T>(grad_.data());
    f.trajectory = p_.trajectory, f.state_stride = p_.trajectory && !p_.expanded ? size : 0;
    f.states = order_.steps(states.size() == 0 ? nullptr : states.data());
    f.slopes = order_.steps(slopes.size() == 0 ? nullptr : slopes.data());
    f.grad_input = order_.view<T>(input ? g.input.data() : nullptr);
    f.grad_weight = weights ? g.weight.data() : nullptr;
    f.grad_bias = biases ? g.bias.data() : nullptr;
    kernels_.of<T>().flow_backward(f, parallel_);
    return g;
  }

  void compare_states(const Array<T>& found, const std::vector<std::vector<double>>& wanted, int64_t first,
                      const char* what, double relative) const {
    const int64_t size = p_.size();
    for (int64_t k = 0; (k + 1) * size <= found.size() && size > 0; ++k)
      compare(found.data() + k * size, wanted[first + k], order_, what, kernels_.name, p_.s, relative);
  }
  void compare_gradients(const Gradients& g, double relative) const {
    const auto plain = [](int64_t i) { return i; };
    compare(g.input.data(), p_.exact.grad_input, order_, "grad_input", kernels_.name, p_.s, relative);
    compare(g.weight.data(), p_.exact.grad_weight, plain, "grad_weight", kernels_.name, p_.s, relative);
    compare(g.bias.data(), p_.exact.grad_bias, plain, "grad_bias", kernels_.name, p_.s, relative);
  }

  Array<T> states, slopes;

 private:
  const T* bias() const { return p_.bias.empty() ? nullptr : bias_.data(); }
  const rnf::Kernels& kernels_;
  const Problem& p_;
  const Array<T>& weight_;
  Order order_;
  bool shifted_;
  rnf::Parallel parallel_;
  Array<T> input_, bias_, grad_;
};

// Largest error allowed, relative to the largest value, about four times the largest found (3e-15,
// 5e-7, 1.3e-6, 1.5e-2). Which algorithm runs: choose.inc, said once more.
template <class T>
double relative_bound(const rnf::Kernels& kernels, const rnf::FlowShape& s) {
  if (sizeof(T) == 8) return 2e-14;
  const bool winograd = s.kernel == 3 && (s.layout == L::best ? s.channels >= 3 : s.layout != L::planes);
  const std::string name = kernels.name;
  const bool rounded = s.bfloat16 && (name == "avx512_bf16" || (name == "amx" && winograd));
  return rounded ? 5e-2 : winograd ? 5e-6 : 2e-6;
}

template <class T>
void check_flow(const rnf::Kernels& kernels, const Problem& p, bool channels_last, bool shifted, int wanted,
                const rnf::Parallel& parallel) {
  const double relative = relative_bound<T>(kernels, p.s);
  const Array<T> weight = placed<T>(p.weight, {}, 0, shifted);
  Flow<T> flow(kernels, p, weight, channels_last, shifted, parallel);
  const int64_t size = p.size();
  const auto same = [&](const Array<T>& a, const Array<T>& b, const char* what) {
    expect(same_bits(a, b), what, kernels.name, p.s);
  };

  const Array<T> output = flow.forward(p.trajectory, false, false);
  flow.compare_states(output, p.exact.states, p.trajectory ? 0 : p.s.steps, "output", relative);
  if (p.trajectory) {
    const Array<T> last = flow.forward(false, false, false);
    expect(size == 0 || std::memcmp(last.data(), output.data() + p.s.steps * size, sizeof(T) * size) == 0,
           "last state of a trajectory", kernels.name, p.s);
  }
  const auto g = flow.backward(true, true, true);
  flow.compare_gradients(g, relative);

  // Saved states and slopes give the same bits, for any subset of the gradients too.
  const bool input = wanted & 1, weights = wanted & 2, biases = wanted & 4;
  const auto check_subset = [&](const char* what) {
    const auto some = flow.backward(input, weights, biases);
    if (input) same(some.input, g.input, what);
    if (weights) same(some.weight, g.weight, what);
    if (biases) same(some.bias, g.bias, what);
  };
  check_subset("some gradients");
  const Array<T> saving = flow.forward(p.trajectory, true, true);
  flow.compare_states(saving, p.exact.states, p.trajectory ? 0 : p.s.steps, "output when saving", relative);
  flow.compare_states(flow.states, p.exact.states, 0, "saved states", relative);
  flow.compare_states(flow.slopes, p.exact.slopes, 0, "saved slopes", relative);
  const auto from_saved = flow.backward(true, true, true);
  same(from_saved.input, g.input, "grad_input from what was saved");
  same(from_saved.weight, g.weight, "grad_weight from what was saved");
  same(from_saved.bias, g.bias, "grad_bias from what was saved");
  check_subset("some gradients from what was saved");
  if (!weights) {
    same(flow.forward(p.trajectory, false, true), saving, "output when saving slopes only");
    check_subset("some gradients from saved slopes");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The cache of packed filters
// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kMebibyte = int64_t{1} << 20;

rnf::FilterKey filter_key(int64_t weight, int64_t channels, int64_t kernel, int64_t banks, int64_t bytes,
                          int64_t layout) {
  rnf::FilterKey key{};
  key.weight = reinterpret_cast<const void*>(weight), key.channels = channels, key.kernel = kernel;
  key.banks = banks, key.bank_bytes = bytes, key.layout = layout;
  return key;
}

// Everything a flow returns.
template <class T>
std::vector<T> results(Flow<T>& flow) {
  const Array<T> output = flow.forward(false, false, false);
  const auto g = flow.backward(true, true, true);
  std::vector<T> all;
  for (const Array<T>* part : {&output, &g.input, &g.weight, &g.bias})
    all.insert(all.end(), part->data(), part->data() + part->size());
  return all;
}

// However little of a weight changes in place, and wherever: the next call sees it.
template <class T>
void check_changed_weight(const rnf::Kernels& kernels, const rnf::FlowShape& s) {
  const Problem p = make_problem(s, false, true, false);
  Array<T> weight = placed<T>(p.weight, {}, 0, false);
  Flow<T> flow(kernels, p, weight, false, false, kOne);
  const int64_t bank = p.bank(), last = weight.size() - 1;
  T* const w = weight.data();
  std::vector<T> before = results(flow);
  expect(results(flow) == before, "the same flow again", kernels.name, s);
  const auto check = [&](const char* what) {
    const std::vector<T> now = results(flow);
    const Array<T> copy = weight;
    Flow<T> fresh(kernels, p, copy, false, false, kOne);
    const std::vector<T> wanted = results(fresh);
    expect(wanted != before, "a change that matters", kernels.name, s);
    expect(now == wanted, what, kernels.name, s);
    before = wanted;
  };
  const auto flip = [&](int64_t i) { w[i] = -w[i]; };
  flip(bank + 5);
  check("one sign");
  w[last] *= T(1.5);
  check("the last tap");
  w[0] += T(0.25);
  check("the first tap");
  for (int64_t i = bank; i < 2 * bank; ++i) w[i] *= T(0.5);
  check("one bank");
  for (int64_t i = 0; i < bank; ++i) std::swap(w[i], w[2 * bank + i]);
  check("two banks exchanged");
  for (int64_t distance : {1, 2, 8, 16, 32, 64, 128, 256}) {
    flip(20);
    flip(20 + distance);
    check("two signs");
  }
  for (int64_t distance : {16, 32, 64, 128}) {
    flip(20);
    flip(21);
    flip(21 + distance);
    check("three signs");
  }
}

// No subset of up to three signs may leave the hash as it is.
void check_hash() {
  std::vector<float> values(128);  // four blocks
  for (int filling = 0; filling < 2; ++filling) {
    const std::vector<double> random = random_values(128, 1.0);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = filling == 0 ? static_cast<float>(random[i]) : 1.0f;
    const auto hash = [&] { return hash_of(values.data(), static_cast<int64_t>(values.size() * sizeof(float))); };
    const uint64_t original = hash();
    int collisions = original == 0 ? 1 : 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = -values[i];
      collisions += hash() == original;
      for (std::size_t j = 0; j < i; ++j) {
        values[j] = -values[j];
        collisions += hash() == original;
        for (std::size_t k = 0; k < j; ++k) {
          values[k] = -values[k];
          collisions += hash() == original;
          values[k] = -values[k];
        }
        values[j] = -values[j];
      }
      values[i] = -values[i];
    }
    expect(collisions == 0 && hash() == original, "hash", "any", {}, collisions, 0);
  }
}

void check_filter_cache() {
  const auto good = [](bool ok, const char* what) { expect(ok, what, "filter cache", {}); };
  // Marks an entry; afterwards `known` tells whether a later lease gets it.
  const auto mark = [](const rnf::FilterKey& k) { *rnf::FilterLease(k).hashes() = 7; };
  const auto known = [](const rnf::FilterKey& k) { return *rnf::FilterLease(k).hashes() == 7; };

  const rnf::FilterKey a = filter_key(64, 5, 3, 2, 100, 0);
  mark(a);
  good(known(a), "an entry is found again");
  for (const rnf::FilterKey& other :
       {filter_key(65, 5, 3, 2, 100, 0), filter_key(64, 6, 3, 2, 100, 0), filter_key(64, 5, 1, 2, 100, 0),
        filter_key(64, 5, 3, 3, 100, 0), filter_key(64, 5, 3, 2, 101, 0), filter_key(64, 5, 3, 2, 100, 1)})
    good(!known(other), "an entry of another key is not found");
  {
    const rnf::FilterLease first(a), second(a);
    good(first.data() != second.data() && *first.hashes() == 7 && *second.hashes() == 0, "a lease is exclusive");
  }
  // 256 MiB are kept; the oldest go.
  const rnf::FilterKey b = filter_key(1, 8, 3, 1, 100 * kMebibyte, 0), c = filter_key(2, 8, 3, 1, 100 * kMebibyte, 0),
                       d = filter_key(3, 8, 3, 1, 100 * kMebibyte, 0);
  for (const rnf::FilterKey& k : {b, c}) mark(k);
  good(known(b) && known(c) && known(a), "what fits is kept");
  mark(d);  // from here on the order is d, a, c, b
  good(!known(b), "the oldest goes");
  {
    const rnf::FilterLease too_large(filter_key(4, 8, 3, 1, 300 * kMebibyte, 0));
  }
  for (const rnf::FilterKey& k : {a, c, d}) good(!known(k), "too large an entry is not kept, nor what is older");
}

// Two threads at a time with the same weight and different inputs.
template <class T>
void check_concurrent_flows(const rnf::Kernels& kernels, const rnf::FlowShape& s) {
  const Problem p = make_problem(s, false, true, false);
  Problem q = p;
  q.input = random_values(q.size(), 1.0);
  const Array<T> weight = placed<T>(p.weight, {}, 0, false), copy = weight;
  Flow<T> first(kernels, p, weight, false, false, kOne), second(kernels, q, weight, true, false, kOne);
  Flow<T> alone_first(kernels, p, copy, false, false, kOne), alone_second(kernels, q, copy, true, false, kOne);
  const std::vector<T> wanted_first = results(alone_first), wanted_second = results(alone_second);
  const auto repeat = [](Flow<T>& flow, const std::vector<T>& wanted) {
    bool right = true;
    for (int i = 0; i < 8; ++i) right = results(flow) == wanted && right;
    return right;
  };
  bool right = false;
  std::thread other([&] { right = repeat(second, wanted_second); });
  expect(repeat(first, wanted_first), "one of two flows at a time", kernels.name, s);
  other.join();
  expect(right, "the other of two flows at a time", kernels.name, s);
}

// The same memory as filters of two shapes: one packing must not be taken for the other.
template <class T>
void check_two_shapes_of_one_weight(const rnf::Kernels& kernels) {
  const auto check = [&](const rnf::FlowShape& s, const rnf::FlowShape& t) {
    const Problem p = make_problem(s, false, false, false);
    Problem q = make_problem(t, false, false, false);
    q.weight = p.weight;
    const Array<T> weight = placed<T>(p.weight, {}, 0, false), copy = weight, another = weight;
    Flow<T> first(kernels, p, weight, false, false, kOne), second(kernels, q, weight, false, false, kOne);
    Flow<T> fresh_first(kernels, p, copy, false, false, kOne), fresh_second(kernels, q, another, false, false, kOne);
    expect(results(first) == results(fresh_first), "a shape of a weight", kernels.name, s);
    expect(results(second) == results(fresh_second), "another shape of it", kernels.name, t);
    expect(results(first) == results(fresh_first), "the first shape again", kernels.name, s);
  };
  check(shape(1, 3, 5, 5, 1, 1, true, L::best), shape(1, 1, 5, 5, 3, 1, true, L::best));
  check(shape(1, 6, 5, 5, 1, 1, true, L::best), shape(1, 2, 5, 5, 3, 1, true, L::best));
  check(shape(1, 5, 5, 5, 3, 1, true, L::planes), shape(1, 3, 5, 5, 5, 1, true, L::planes));
  check(shape(1, 48, 5, 5, 1, 1, true, L::best), shape(1, 16, 5, 5, 3, 1, true, L::best));
}

struct Box {
  std::vector<double> centre, radius;
};

// Bound E by its formula, in double.
Box exact_bound(const Problem& p, std::vector<double> radius) {
  constexpr double kSlope = Problem::kNegativeSlope, kStep = Problem::kStep;
  static_assert(kSlope <= 1 && kStep > 0, "the larger gap counts");
  const rnf::FlowShape& s = p.s;
  const int64_t area = s.height * s.width;
  std::vector<double> z = p.exact.states[0];
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t n = s.shared ? 0 : k;
    std::vector<double> u(radius.size()), change(radius.size());
    const double* const w = p.weight.data() + n * p.bank();
    for (std::size_t i = 0; i < u.size() && !p.bias.empty(); ++i)
      u[i] = p.bias[n * s.channels + static_cast<int64_t>(i) / area % s.channels];
    for_each_tap(s, [&](int64_t tap, int64_t out, int64_t in) {
      u[out] += w[tap] * z[in];
      change[out] += std::fabs(w[tap]) * radius[in];
    });
    for (std::size_t i = 0; i < u.size(); ++i) {
      const int64_t c = static_cast<int64_t>(i) / area % s.channels, centre = s.kernel * s.kernel / 2;
      const double m = w[(c * s.channels + c) * s.kernel * s.kernel + centre];
      const double value = activate(u[i], kSlope), t = slope(u[i], kSlope);
      const double above = activate(u[i] + change[i], kSlope) - value - t * change[i];
      const double below = activate(u[i] - change[i], kSlope) - value + t * change[i];
      const double gap = kStep * std::fmax(above, below);
      z[i] += kStep * value + gap / 2;
      radius[i] = std::fabs(1 + kStep * t * m) * radius[i] + kStep * t * (change[i] - std::fabs(m) * radius[i]) +
                  std::fabs(gap) / 2;
    }
  }
  return {z, radius};
}

template <class T>
void check_bound(const rnf::Kernels& kernels, const Problem& p, bool channels_last, const rnf::Parallel& parallel) {
  const Order order{p.s, channels_last};
  std::vector<double> radius = random_values(p.size(), 0.1);
  for (double& r : radius) r = std::fabs(r);
  Array<T> input(p.size(), false), box(p.size(), true), centre(p.size(), true), bound(p.size(), false);
  for (int64_t i = 0; i < p.size(); ++i) {
    input[order(i)] = static_cast<T>(p.input[i]);
    box[order(i)] = static_cast<T>(radius[i]);
  }
  const std::vector<T> weight(p.weight.begin(), p.weight.end()), bias(p.bias.begin(), p.bias.end());
  kernels.of<T>().flow_bound(
      {p.s, Problem::kStep, Problem::kNegativeSlope, order.view<const T>(input.data()), order.view<const T>(box.data()),
       weight.data(), bias.empty() ? nullptr : bias.data(), order.view(centre.data()), order.view(bound.data())},
      parallel);
  const Box exact = exact_bound(p, radius);
  const double tolerance = sizeof(T) == 4 ? 1e-3 : 1e-11;
  for (int64_t i = 0; i < p.size(); ++i) {
    const double z = static_cast<double>(centre[order(i)]), r = static_cast<double>(bound[order(i)]);
    const double least = std::fabs(z - exact.centre[i]) + exact.radius[i];
    expect(r >= least && r <= (exact.radius[i] + 0.01) * (1 + tolerance), "bound", kernels.name, p.s, r, least);
  }
}

// The first layer's: from one channel, whose weights are the first of each output's, to all.
template <class T>
void check_convolution_bound(const rnf::Kernels& kernels, const Problem& p, const rnf::Parallel& parallel) {
  rnf::FlowShape one = p.s;
  one.channels = 1;
  const int64_t area = p.s.height * p.s.width, taps = p.s.kernel * p.s.kernel, border = p.s.kernel / 2;
  const Order to{p.s, false}, from{one, true};
  Array<T> input(p.s.batch * area, true), box(p.s.batch * area, false, T(0.25));
  for (int64_t i = 0; i < input.size(); ++i) input[i] = static_cast<T>(p.input[i]);
  const std::vector<T> weight(p.weight.begin(), p.weight.begin() + p.s.channels * taps);
  Array<T> centre(p.size(), false), bound(p.size(), true);
  kernels.of<T>().convolution_bound(
      {p.s.batch, 1, p.s.channels, p.s.height, p.s.width, p.s.kernel, 0.125, from.view<const T>(input.data()),
       from.view<const T>(box.data()), weight.data(), nullptr, to.view(centre.data()), to.view(bound.data())},
      parallel);
  for (int64_t n = 0; n < p.s.batch * p.s.channels; ++n)
    for (int64_t i = 0; i < area; ++i) {
      double u = 0, change = 0;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t y = i / p.s.width + tap / p.s.kernel - border, x = i % p.s.width + tap % p.s.kernel - border;
        if (y < 0 || x < 0 || y >= p.s.height || x >= p.s.width) continue;
        const double w = p.weight[n % p.s.channels * taps + tap];
        u += w * static_cast<double>(input[n / p.s.channels * area + y * p.s.width + x]);
        change += 0.25 * std::fabs(w);
      }
      const double low = activate(u - change, 0.125), high = activate(u + change, 0.125), exact = (high - low) / 2;
      const double z = static_cast<double>(centre[n * area + i]), r = static_cast<double>(bound[n * area + i]);
      expect(z - r <= low, "low end of a first layer's bound", kernels.name, p.s, z - r, low);
      expect(z + r >= high, "high end of a first layer's bound", kernels.name, p.s, z + r, high);
      expect(r >= exact && r <= exact + (sizeof(T) == 4 ? 1e-4 : 1e-12) * (1 + std::fabs(u)), "first layer's bound",
             kernels.name, p.s, r, exact);
    }
}

template <class T>
void check_activation(const rnf::Kernels& kernels, int64_t count, const rnf::Parallel& parallel) {
  Array<T> u(count, false);
  const std::vector<double> random = random_values(count, 10.0), upstream = random_values(count, 1.0);
  for (int64_t i = 0; i < count; ++i) u[i] = static_cast<T>(random[i]);
  if (count > 2) u[0] = T(1e4), u[1] = T(-1e4), u[2] = T(0);
  Array<T> value(count, false), gradient(count, false), grad(count, false);
  for (int64_t i = 0; i < count; ++i) grad[i] = static_cast<T>(upstream[i]);
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

// softplus(anchor + d) - softplus(anchor) and the slopes around it, from 1e-30 to 1e4.
template <class T>
void check_increment(const rnf::Kernels& kernels, int64_t rows, int64_t columns, bool tangent,
                     const rnf::Parallel& parallel) {
  const int64_t width = tangent ? 2 * columns : columns, count = rows * width;
  const std::vector<double> random = random_values(3 * count + rows, 1.0);
  Array<T> input(count, true), output(count, false), grad_output(count, false), grad_input(count, true);
  Array<T> anchor(rows, true), grad_anchor(rows, false);
  for (int64_t i = 0; i < count; ++i) {
    const bool wide = i % width < columns && i % 3 != 0;
    input[i] = static_cast<T>(random[i] * (wide ? std::exp(20 * random[count + i] - 10) : 1));
    if (wide && std::fabs(input[i]) > T(1e4)) input[i] = T(-1e4);
    grad_output[i] = static_cast<T>(random[2 * count + i]);
  }
  if (count > 0) input[0] = T(0);
  for (int64_t r = 0; r < rows; ++r) anchor[r] = static_cast<T>(6 * random[3 * count + r]);
  kernels.of<T>().increment({rows, columns, tangent, input.data(), anchor.data(), output.data()}, parallel);
  kernels.of<T>().increment_backward(
      {rows, columns, tangent, grad_output.data(), input.data(), anchor.data(), grad_input.data(), grad_anchor.data()},
      parallel);
  typedef long double Wide;
  const auto sigmoid = [](Wide u) { return u < 0 ? std::exp(u) / (1 + std::exp(u)) : 1 / (1 + std::exp(-u)); };
  const auto softplus = [](Wide u) { return std::fmax(u, Wide(0)) + std::log1p(std::exp(-std::fabs(u))); };
  const double eps = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16;
  const rnf::FlowShape none{};
  const auto check = [&](T found, Wide exact, double size, const char* what) {
    const double error = static_cast<double>(std::fabs(static_cast<Wide>(found) - exact)),
                 bound = 4 * eps * size + 1e-36;
    expect(error <= bound, what, kernels.name, none, error, bound);
  };
  for (int64_t r = 0; r < rows; ++r) {
    const Wide a = anchor[r];
    Wide sum = 0;
    double sizes = 0;
    for (int64_t i = r * width; i < r * width + columns; ++i) {
      const Wide d = input[i], u = a + d, slope = sigmoid(u), g = grad_output[i];
      const Wide exact = std::fabs(d) < 1 ? std::log1p(sigmoid(a) * std::expm1(d)) : softplus(u) - softplus(a);
      // Rounding u counts where the slope falls off: there it is exp(u).
      const double size = static_cast<double>(slope * (1 + std::fabs(u) * (1 - slope)));
      const double step = std::fabs(static_cast<double>(d));
      check(output[i], exact, step, "increment");
      Wide curved = 0;
      if (tangent) {
        const Wide t = input[i + columns], h = grad_output[i + columns];
        curved = slope * (1 - slope) * t * h;
        check(output[i + columns], slope * t, size * static_cast<double>(std::fabs(t)), "rate of an increment");
        check(grad_input[i + columns], slope * h, size * static_cast<double>(std::fabs(h)), "tangent's gradient");
      }
      const double curvature = 2 * (1 + static_cast<double>(std::fabs(u))) * static_cast<double>(std::fabs(curved));
      check(grad_input[i], slope * g + curved, size * static_cast<double>(std::fabs(g)) + curvature,
            "delta's gradient");
      sum += (slope - sigmoid(a)) * g + curved;
      sizes += std::fmin(step, 1) * static_cast<double>(std::fabs(g)) + curvature;
    }
    check(grad_anchor[r], sum, 2 * sizes, "anchor's gradient");
  }
}

template <class T>
void check_penalty(const rnf::Kernels& kernels, int64_t steps, int64_t channels, int64_t kernel,
                   const rnf::Parallel& parallel) {
  const int64_t count = steps * channels * channels * kernel * kernel;
  const std::vector<double> random = random_values(count, 1.0);
  const std::vector<T> weight(random.begin(), random.end());
  for (int norm = 0; norm < 4; ++norm)
    for (int reduction = 0; reduction < 3; ++reduction) {
      const bool none = reduction == 2;
      std::vector<T> value(none ? steps * channels : 1, T(NAN)), coefficients(3 * steps * channels, T(NAN));
      std::vector<T> gradient(weight.size(), T(NAN));
      kernels.of<T>().contraction_penalty(
          {steps, channels, kernel, 1.0, 0.1, 1.0, static_cast<rnf::Norm>(norm), static_cast<rnf::Reduction>(reduction),
           weight.data(), value.data(), coefficients.data()},
          parallel);
      const std::vector<T> upstream(value.size(), T(1));
      kernels.of<T>().contraction_penalty_backward(
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
      expect(error <= bound, "penalty", kernels.name, shape(0, channels, 0, 0, kernel, steps, false, L::best), error,
             bound);
    }
}

}  // namespace

int main() {
  std::vector<const rnf::Kernels*> sets{&rnf::portable::kernels};
#ifdef __x86_64__
  const std::string supported = rnf::supported_isas();
  if (supported.find("avx2") != std::string::npos) sets.push_back(&rnf::avx2::kernels);
  if (supported.find("avx512") != std::string::npos) sets.push_back(&rnf::avx512::kernels);
  if (supported.find("avx512_bf16") != std::string::npos) sets.push_back(&rnf::avx512_bf16::kernels);
#ifdef TILE_UNIT_SHIM  // in software
  if (supported.find("avx512_bf16") != std::string::npos) sets.push_back(&rnf::amx::kernels);
#else
  if (supported.find("amx") != std::string::npos) sets.push_back(&rnf::amx::kernels);
#endif
#endif
  const rnf::FlowShape direct[] = {
      shape(1, 1, 1, 1, 1, 1, false, L::best),      shape(2, 1, 1, 1, 3, 2, false, L::best),
      shape(3, 2, 1, 7, 5, 2, true, L::best),       shape(2, 3, 5, 4, 3, 3, false, L::best),
      shape(5, 4, 7, 7, 3, 2, true, L::best),       shape(2, 5, 3, 17, 5, 2, false, L::best),
      shape(1, 8, 14, 14, 3, 2, false, L::best),    shape(4, 8, 8, 8, 1, 3, false, L::best),
      shape(2, 9, 6, 31, 3, 2, false, L::best),     shape(1, 12, 20, 9, 3, 2, false, L::best),
      shape(0, 3, 4, 4, 3, 2, false, L::best),      shape(2, 17, 5, 6, 3, 2, false, L::planes),
      shape(0, 17, 4, 4, 3, 2, true, L::planes),    shape(2, 64, 7, 5, 3, 2, false, L::planes),  // few pixels
      shape(1, 96, 3, 3, 5, 1, false, L::best),     shape(3, 96, 2, 3, 1, 2, true, L::best),
      shape(1, 16, 31, 31, 3, 1, false, L::planes),  // large enough for all threads to share one sample
  };
  std::vector<rnf::FlowShape> shapes(std::begin(direct), std::end(direct));
  // Winograd: less than a vector and a panel of channels and more, less than a tile and more, several samples a pack.
  for (int64_t channels : {1, 3, 17, 33})
    for (int64_t batch : {0, 1, 5})
      for (const auto& size : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {7, 8}, {33, 4}})
        shapes.push_back(shape(batch, channels, size.first, size.second, 3, 2, shapes.size() % 2 == 0, L::channels));
  // The same with rows as vectors: all sizes of blocks, images side by side and packs that are not full.
  for (int64_t channels : {1, 2, 4, 7, 8, 15})
    for (int64_t batch : {0, 1, 9})
      for (const auto& size : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {8, 8}, {13, 31}})
        shapes.push_back(shape(batch, channels, size.first, size.second, 3, 2, shapes.size() % 2 == 0, L::strips));
  shapes.push_back(shape(70, 3, 5, 7, 3, 3, false, L::strips));
  shapes.push_back(shape(1, 9, 90, 100, 3, 1, false, L::strips));  // several pieces of the weight gradient, all threads
  shapes.push_back(shape(2, 16, 6, 6, 3, 2, false, L::best));
  shapes.push_back(shape(75, 3, 5, 7, 3, 3, false, L::channels));    // several packs, and several groups of sums
  shapes.push_back(shape(1, 17, 29, 33, 3, 1, false, L::channels));  // several pieces; all threads share one sample

  for (const rnf::FlowShape& s :
       {shape(3, 32, 5, 6, 3, 2, false, L::best, true), shape(5, 64, 3, 3, 3, 2, true, L::best, true),
        shape(1, 32, 29, 33, 3, 1, false, L::best, true), shape(0, 32, 3, 3, 3, 1, false, L::best, true)})
    shapes.push_back(s);
  for (int64_t channels : {1, 2, 9, 16, 17, 33, 48})
    for (const auto& size : {std::pair<int64_t, int64_t>{1, 1}, {7, 8}, {33, 4}})
      shapes.push_back(shape(3, channels, size.first, size.second, 3, 2, shapes.size() % 2 == 0, L::channels, true));
  for (int64_t channels : {2, 3, 9, 16, 17})
    for (int64_t kernel : {1, 3, 5})
      shapes.push_back(shape(2, channels, 9, 15, kernel, 2, shapes.size() % 2 == 0, L::planes, true));
  shapes.push_back(shape(1, 17, 29, 33, 5, 1, false, L::planes, true));  // all threads share one sample

  int cases = 0;
  for (std::size_t i = 0; i < shapes.size(); ++i)
    for (int variant = 0; variant < 2; ++variant) {
      const bool trajectory = (i + variant) % 2, expanded = (i / 2 + variant) % 2, with_bias = i % 3 != 0;
      const Problem p = make_problem(shapes[i], trajectory, with_bias, expanded);
      for (std::size_t set = 0; set < sets.size(); ++set) {
        // bfloat16 is the business of two of them; all else of these is AVX-512 again.
        const std::string name = sets[set]->name;
        if (p.s.bfloat16 != (name == "amx" || name == "avx512_bf16") && (i + set) % 5 != 0) continue;
        ++cases;
        const bool last = (i / 3 + set + variant) % 2;
        const int wanted = 1 + (static_cast<int>(i + set) + 3 * variant) % 7;
        check_flow<float>(*sets[set], p, last, i % 2, wanted, variant ? kTwo : kOne);
        if (shapes[i].layout == L::best || shapes[i].layout == L::planes)
          check_flow<double>(*sets[set], p, !last, i % 2, wanted, variant ? kOne : kTwo);
        if (i < std::size(direct)) {
          check_bound<float>(*sets[set], p, last, variant ? kTwo : kOne);
          check_bound<double>(*sets[set], p, !last, variant ? kOne : kTwo);
          check_convolution_bound<float>(*sets[set], p, variant ? kOne : kTwo);
          check_convolution_bound<double>(*sets[set], p, variant ? kTwo : kOne);
        }
      }
    }
  for (const rnf::Kernels* kernels : sets) {
    check_changed_weight<float>(*kernels, shape(2, 17, 3, 5, 3, 3, false, L::channels));
    check_changed_weight<float>(*kernels, shape(1, 9, 3, 5, 3, 3, false, L::planes));
    check_changed_weight<float>(*kernels, shape(2, 9, 3, 5, 3, 3, false, L::strips));
    check_changed_weight<double>(*kernels, shape(1, 9, 3, 5, 3, 3, false, L::best));
    check_two_shapes_of_one_weight<float>(*kernels);
    check_two_shapes_of_one_weight<double>(*kernels);
    check_changed_weight<float>(*kernels, shape(1, 32, 3, 5, 3, 3, false, L::best, true));
    check_concurrent_flows<float>(*kernels, shape(3, 33, 7, 8, 3, 3, false, L::channels));
    check_concurrent_flows<float>(*kernels, shape(3, 32, 7, 8, 3, 3, false, L::best, true));
    check_concurrent_flows<float>(*kernels, shape(3, 9, 7, 8, 3, 3, false, L::planes, true));
    check_changed_weight<float>(*kernels, shape(3, 9, 7, 8, 3, 3, false, L::planes, true));
    check_concurrent_flows<float>(*kernels, shape(3, 9, 7, 8, 3, 3, true, L::planes));
    check_concurrent_flows<float>(*kernels, shape(3, 9, 7, 8, 3, 3, true, L::strips));
    check_concurrent_flows<double>(*kernels, shape(2, 5, 7, 8, 3, 3, false, L::best));
  }
  check_hash();
  check_filter_cache();
  for (const rnf::Kernels* kernels : sets)
    for (int64_t count : {0, 1, 3, 15, 16, 17, 16384, 16385, 40001}) {
      check_activation<float>(*kernels, count, kTwo);
      check_activation<double>(*kernels, count, kOne);
    }
  for (const rnf::Kernels* kernels : sets)
    for (const auto& size : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {3, 0}, {5, 8}, {17, 33}, {2, 9000}, {700, 31}})
      for (bool tangent : {false, true}) {
        check_increment<float>(*kernels, size.first, size.second, tangent, tangent ? kOne : kTwo);
        check_increment<double>(*kernels, size.first, size.second, tangent, tangent ? kTwo : kOne);
      }
  for (const rnf::Kernels* kernels : sets)
    for (int64_t channels : {1, 2, 7, 16})
      for (int64_t kernel : {1, 3, 5}) {
        check_penalty<float>(*kernels, 3, channels, kernel, kTwo);
        check_penalty<double>(*kernels, 1, channels, kernel, kOne);
      }
  std::printf("%d flow cases on %zu instruction sets, %d failures\n", cases, sets.size(), failures);
  return failures != 0;
}
