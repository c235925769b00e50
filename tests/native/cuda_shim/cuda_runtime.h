// Stands in for CUDA's header of this name, so that g++ builds the .cu files as they are and a test runs them on the
// processor. Each thread of a block is a fiber that runs until it waits at a barrier or a warp's exchange; then the
// next one does. So a run is the same every time, and
//
//   - a missing barrier gives wrong values when the threads run in one order or the other (set_reverse);
//   - a barrier that not all threads reach, or at different places, ends the program with a message;
//   - an atomic that not all threads of the block have prepared with a fence does so too;
//   - dynamic shared memory is NaN at first, exactly as large as asked for under AddressSanitizer, and refused above
//     48 KiB without the opt-in, as on a device;
//   - any one __syncthreads() can be left out (set_skipped), to see whether a test notices.
//
// Not covered: other races between blocks, which run one after another; memory that is not coherent; how a warp really
// moves.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// --------------------------------------------------------------------------------------------------------------------
// The part of the runtime's interface that the sources use, as a device with few processors would answer
// --------------------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorNoDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_shim {

constexpr std::size_t kSharedBytes = 227 << 10, kSharedBytesWithoutAsking = 48 << 10;
constexpr int kProcessors = 2;
constexpr unsigned kWarp = 32, kMostThreads = 1024;

[[noreturn]] inline void die(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
  // Small, since AddressSanitizer clears its notes on the whole stack at every switch; an overflow is reported.
  static constexpr std::size_t kStack = 32 << 10;
  static constexpr uint64_t kEnd = 0x0123456789abcdef;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context{};
  void* fake_stack = nullptr;
  State state = State::ready;
  const char* barrier = nullptr;
  uint3 index{};
  uint64_t exchanged = 0;
  int fences = 0;
};

class Device {
 public:
  static Device& get() {
    static Device device;
    return device;
  }

  // --- settings ---
  bool reverse = false;                  // threads and blocks run from the last to the first
  std::string skipped;                   // the __syncthreads() of this site does nothing
  std::set<std::string> sites;           // of all __syncthreads() met
  void* dynamic_shared = nullptr;        // kSharedBytes of them: what the sources declare `extern __shared__`
  std::map<void*, std::size_t> allowed;  // dynamic shared memory that each kernel was given leave for

  // --- called by fibers ---
  void wait(State state, const char* barrier) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = state, fiber.barrier = barrier;
    start_switch(&fiber.fake_stack, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    finish_switch(fiber.fake_stack, nullptr, nullptr);
  }
  void synchronize(const char* site) {
    if (current_ == 0) sites.insert(site);
    if (skipped != site) wait(State::at_barrier, site);
  }
  // What lane `source` of this warp passed.
  template <class T>
  T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "one word");
    const unsigned from = current_ / kWarp * kWarp + source % kWarp;
    std::memcpy(&fibers_[current_]->exchanged, &value, sizeof(T));
    wait(State::at_exchange, nullptr);
    if (from >= threads_) die("a shuffle reads a lane that does not exist");
    std::memcpy(&value, &fibers_[from]->exchanged, sizeof(T));
    wait(State::at_exchange, nullptr);  // nobody writes before all have read
    return value;
  }
  unsigned lane() const { return current_ % kWarp; }
  void fence() { ++fibers_[current_]->fences; }
  // An atomic tells other blocks about this one: what all its threads wrote has to be behind a fence.
  void check_fences() const {
    for (unsigned i = 0; i < threads_; ++i)
      if (fibers_[i]->fences < fibers_[current_]->fences) die("an atomic before all threads of the block have fenced");
  }

  // --- called by launches ---
  void run(dim3 grid, dim3 block, std::size_t shared_bytes, std::function<void()> body) {
    threads_ = block.x * block.y * block.z;
    while (fibers_.size() < threads_) fibers_.push_back(std::make_unique<Fiber>());
    body_ = std::move(body);
    gridDim = grid, blockDim = block;
    const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
    for (std::size_t i = 0; i < blocks; ++i) {
      const std::size_t b = reverse ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      limit_shared(kSharedBytes);
      if (dynamic_shared != nullptr) std::memset(dynamic_shared, 0xff, shared_bytes);
      limit_shared(shared_bytes);
      run_block(block);
    }
    limit_shared(kSharedBytes);
  }

 private:
  static void enter() {
    Device& device = get();
    finish_switch(nullptr, &device.scheduler_stack_, &device.scheduler_size_);
    device.body_();
    Fiber& fiber = *device.fibers_[device.current_];
    fiber.state = State::done;
    start_switch(nullptr, device.scheduler_stack_, device.scheduler_size_);
    setcontext(&device.scheduler_);
  }

  void resume(unsigned thread) {
    Fiber& fiber = *fibers_[thread];
    current_ = thread;
    threadIdx = fiber.index;
    void* fake_stack = nullptr;
    start_switch(&fake_stack, fiber.stack.get(), Fiber::kStack);
    swapcontext(&scheduler_, &fiber.context);
    finish_switch(fake_stack, nullptr, nullptr);
  }

  static void prepare(Fiber& fiber) {
    fiber.state = State::ready, fiber.fences = 0;
    std::memcpy(fiber.stack.get(), &Fiber::kEnd, sizeof(Fiber::kEnd));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }

  void run_block(dim3 block) {
    for (unsigned i = 0; i < threads_; ++i) {
      fibers_[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      prepare(*fibers_[i]);
    }
    for (;;) {
      for (unsigned i = 0; i < threads_; ++i) {
        const unsigned thread = reverse ? threads_ - 1 - i : i;
        if (fibers_[thread]->state == State::ready) resume(thread);
      }
      if (release_warps()) continue;
      if (count(State::done) == threads_) break;
      release_barrier();
    }
    for (unsigned i = 0; i < threads_; ++i)
      if (std::memcmp(fibers_[i]->stack.get(), &Fiber::kEnd, sizeof(Fiber::kEnd)) != 0) die("a stack is too small");
  }

  unsigned count(State state) const {
    return static_cast<unsigned>(std::count_if(fibers_.begin(), fibers_.begin() + threads_,
                                               [=](const auto& fiber) { return fiber->state == state; }));
  }

  // Lets warps go on all of whose lanes exchange. Masks are full, so all lanes must.
  bool release_warps() {
    bool released = false;
    for (unsigned first = 0; first < threads_; first += kWarp) {
      const unsigned end = std::min(first + kWarp, threads_);
      unsigned waiting = 0;
      for (unsigned i = first; i < end; ++i) waiting += fibers_[i]->state == State::at_exchange;
      if (waiting == 0) continue;
      if (waiting != end - first) die("not all lanes of a warp take part in a shuffle");
      for (unsigned i = first; i < end; ++i) fibers_[i]->state = State::ready;
      released = true;
    }
    return released;
  }

  void release_barrier() {
    for (unsigned i = 0; i < threads_; ++i) {
      if (fibers_[i]->state != State::at_barrier) die("a barrier that not all threads reach");
      if (std::strcmp(fibers_[i]->barrier, fibers_[0]->barrier) != 0) die("threads wait at different barriers");
    }
    for (unsigned i = 0; i < threads_; ++i) fibers_[i]->state = State::ready;
  }

  // Outside of what a kernel asked for, shared memory cannot be touched.
  void limit_shared(std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    if (dynamic_shared == nullptr) return;
    char* const memory = static_cast<char*>(dynamic_shared);
    ASAN_UNPOISON_MEMORY_REGION(memory, kSharedBytes);
    ASAN_POISON_MEMORY_REGION(memory + bytes, kSharedBytes - bytes);
#else
    static_cast<void>(bytes);
#endif
  }
  // AddressSanitizer has to know which stack we are on.
#if defined(__SANITIZE_ADDRESS__)
  static void start_switch(void** save, const void* stack, std::size_t size) {
    __sanitizer_start_switch_fiber(save, stack, size);
  }
  static void finish_switch(void* saved, const void** stack, std::size_t* size) {
    __sanitizer_finish_switch_fiber(saved, stack, size);
  }
#else
  static void start_switch(void**, const void*, std::size_t) {}
  static void finish_switch(void*, const void**, std::size_t*) {}
#endif

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::function<void()> body_;
  ucontext_t scheduler_{};
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_size_ = 0;
  unsigned threads_ = 0, current_ = 0;
};

}  // namespace cuda_shim

#define CUDA_SHIM_TEXT_(x) #x
#define CUDA_SHIM_TEXT(x) CUDA_SHIM_TEXT_(x)
#define __syncthreads() ::cuda_shim::Device::get().synchronize(__FILE__ ":" CUDA_SHIM_TEXT(__LINE__))

inline void __threadfence() { cuda_shim::Device::get().fence(); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) cuda_shim::die("only full masks");
  cuda_shim::Device& device = cuda_shim::Device::get();
  return device.exchange(value, device.lane() ^ static_cast<unsigned>(lanes));
}
template <class T>
T atomicAdd(T* to, T value) {
  cuda_shim::Device::get().check_fences();
  const T before = *to;
  *to += value;
  return before;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
using std::max;
using std::min;

// --------------------------------------------------------------------------------------------------------------------
// The runtime's functions
// --------------------------------------------------------------------------------------------------------------------

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  if (static_cast<std::size_t>(bytes) > cuda_shim::kSharedBytes) return cudaErrorInvalidValue;
  cuda_shim::Device::get().allowed[reinterpret_cast<void*>(kernel)] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  cuda_shim::Device& device = cuda_shim::Device::get();
  const unsigned threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  const std::size_t bytes = config->dynamicSmemBytes,
                    allowed =
                        std::max(device.allowed[reinterpret_cast<void*>(kernel)], cuda_shim::kSharedBytesWithoutAsking);
  if (threads == 0 || threads > cuda_shim::kMostThreads || config->gridDim.x == 0 || bytes > allowed)
    return cudaErrorInvalidConfiguration;
  device.run(config->gridDim, config->blockDim, bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, std::size_t bytes) {
  *blocks = bytes <= cuda_shim::kSharedBytes ? 1 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorNoDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value =
      attribute == cudaDevAttrMultiProcessorCount ? cuda_shim::kProcessors : static_cast<int>(cuda_shim::kSharedBytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the shim"; }
