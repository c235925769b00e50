#include "memory.h"

#include <deque>
#include <mutex>
#include <new>

namespace rnf {
namespace {

constexpr std::size_t kLine = 64, kPage = 4096, kSmallest = std::size_t{64} << 10, kMostBytes = std::size_t{512} << 20;

// Address sanitizers see what is outside an allocation, not what is outside of its used part.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

struct Kept {
  void* data;
  std::size_t bytes;
};
std::mutex mutex;
std::deque<Kept>& kept = *new std::deque<Kept>;  // newest first; lives on for tensors that outlive this library
std::size_t kept_bytes = 0;

// Pages stay until the system wants them.
void disown(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_FREE)
  if (bytes >= kHugePage) madvise(data, bytes, MADV_FREE);  // whole pages, see memory_taken and take_memory
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace

std::size_t memory_taken(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePage ? kPage : kLine;
  return bytes == 0 ? unit : (bytes + unit - 1) / unit * unit;
}

void* take_memory(std::size_t wanted) {
  const std::size_t bytes = memory_taken(wanted);
  if (kKeeps && bytes >= kSmallest) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto at = kept.begin(); at != kept.end(); ++at)
      if (at->bytes == bytes) {
        void* const data = at->data;
        kept.erase(at);
        kept_bytes -= bytes;
        return data;
      }
  }
  void* data = nullptr;  // posix_memalign: aligned_alloc wants sizes that are multiples of the alignment
  if (posix_memalign(&data, bytes >= kHugePage ? kHugePage : kLine, bytes) != 0) throw std::bad_alloc();
  prefer_huge_pages(data, bytes);
  return data;
}

void give_memory(void* data, std::size_t wanted) {
  const std::size_t bytes = memory_taken(wanted);
  if (!kKeeps || bytes < kSmallest || bytes > kMostBytes) {
    std::free(data);
    return;
  }
  disown(data, bytes);
  std::deque<Kept> old;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    kept.push_front({data, bytes});
    kept_bytes += bytes;
    while (kept_bytes > kMostBytes) {
      kept_bytes -= kept.back().bytes;
      old.push_back(kept.back());
      kept.pop_back();
    }
  }
  for (const Kept& block : old) std::free(block.data);
}

}  // namespace rnf
