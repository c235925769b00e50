// Aligned scratch memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
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
  if (bytes >= kHugePage && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Memory on a cache line, kept for the next call when given back: fresh pages would cost a small flow more than its
// arithmetic. What is kept holds nothing, and Linux takes it back when it runs short. Throws std::bad_alloc like new.
void* take_memory(std::size_t bytes);
void give_memory(void* data, std::size_t bytes);
std::size_t memory_taken(std::size_t bytes);  // whole cache lines or pages

// An uninitialised array.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_(static_cast<std::size_t>(count) * sizeof(T)), data_(static_cast<T*>(take_memory(bytes_))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { give_memory(data_, bytes_); }
  T* get() const { return data_; }
  int64_t bytes_taken() const { return static_cast<int64_t>(memory_taken(bytes_)); }
  void zero(int64_t count) { std::memset(static_cast<void*>(data_), 0, static_cast<std::size_t>(count) * sizeof(T)); }

 private:
  std::size_t bytes_;
  T* data_;
};

}  // namespace rnf
