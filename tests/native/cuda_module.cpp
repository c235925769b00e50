// The CUDA extension on the CPU: with this file, the .cu files and csrc/cuda/registration.cpp, built over cuda_shim,
// are the module _cuda_C that takes addresses of CPU tensors. tests/test_cuda_on_cpu.py loads it.
#include "../../csrc/cuda/registration.cpp"

namespace rnf::cuda {
float4 shared_memory[cuda_shim::kSharedBytes / sizeof(float4)];
}

namespace {
[[maybe_unused]] const bool ready = [] {
  cuda_shim::Device::get().dynamic_shared = rnf::cuda::shared_memory;
  return true;
}();
}  // namespace
