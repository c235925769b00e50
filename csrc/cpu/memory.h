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

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Memory of megabytes about to be filled, or walked with large strides: small pages cost more than the arithmetic.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#ifdef __linux__
  const std::size_t page = 4096, begin = (reinterpret_cast<std::size_t>(data) + page - 1) / page * page;
  const std::size_t end = (reinterpret_cast<std::size_t>(data) + bytes) / page * page;
  if (bytes >= 2 * kHugePage && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// An uninitialised array on a cache line; throws std::bad_alloc like new.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr std::size_t kLine = 64;
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t unit = size >= kHugePage ? kHugePage : kLine;
    const std::size_t bytes = (size / unit + 1) * unit;
    data_ = static_cast<T*>(std::aligned_alloc(unit, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data_, bytes);
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
