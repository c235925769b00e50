// Aligned scratch memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rnf {

// An uninitialised array on a cache line; throws std::bad_alloc like new.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr std::size_t kLine = 64, kHugePage = std::size_t{2} << 20;
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t unit = size >= kHugePage ? kHugePage : kLine;
    const std::size_t bytes = (size / unit + 1) * unit;
    data_ = static_cast<T*>(std::aligned_alloc(unit, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    // Filters and states of megabytes, walked with large strides: small pages cost more than the arithmetic.
    if (unit == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* get() const { return data_; }
  void zero(int64_t count) { std::memset(static_cast<void*>(data_), 0, static_cast<std::size_t>(count) * sizeof(T)); }

 private:
  T* data_;
};

}  // namespace rnf
