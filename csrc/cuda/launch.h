// Launches a kernel with as much dynamic shared memory as it asks for, and says what became of it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace rnf::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int64_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaError_t allowed = allow_shared_memory(kernel, shared_bytes);
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace rnf::cuda
