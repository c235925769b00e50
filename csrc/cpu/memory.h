// Aligned scratch memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rnf {

// An uninitialised array on a cache line; throws std::bad_alloc like new.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (data_ == nullptr) throw std::bad_alloc();
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
