#include "memory.h"

#include <mutex>
#include <new>

namespace rnf {
namespace {

constexpr std::size_t kLine = 64, kPage = 4096, kSmallest = std::size_t{64} << 10, kMostBytes = std::size_t{128} << 20;

// Address sanitizers see what is outside an allocation, not what is outside of its used part.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

struct Kept {  // at the start of the memory it describes
  std::size_t bytes;
  Kept* next;
};
std::mutex mutex;
Kept* newest = nullptr;

}  // namespace

std::size_t memory_taken(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePage ? kPage : kLine;
  return bytes == 0 ? unit : (bytes + unit - 1) / unit * unit;
}

void* take_memory(std::size_t wanted) {
  const std::size_t bytes = memory_taken(wanted);
  if (kKeeps && bytes >= kSmallest) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (Kept** link = &newest; *link != nullptr; link = &(*link)->next)
      if ((*link)->bytes == bytes) {
        Kept* const found = *link;
        *link = found->next;
        return found;
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
  Kept* old = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    newest = new (data) Kept{bytes, newest};
    std::size_t total = 0;
    for (Kept** link = &newest; *link != nullptr; link = &(*link)->next) {
      total += (*link)->bytes;
      if (total > kMostBytes) {  // this one and all older ones
        old = *link;
        *link = nullptr;
        break;
      }
    }
  }
  while (old != nullptr) {
    Kept* const next = old->next;
    std::free(old);
    old = next;
  }
}

}  // namespace rnf
