#include "filter_cache.h"

#include <mutex>

namespace rnf {

struct CachedFilters {
  FilterKey key;
  Buffer<char> data;
  Buffer<uint64_t> hashes;
  CachedFilters* next = nullptr;

  explicit CachedFilters(const FilterKey& k) : key(k), data(k.banks * k.bank_bytes), hashes(k.banks) {
    hashes.zero(k.banks);
  }
  int64_t bytes() const { return data.bytes_taken() + hashes.bytes_taken(); }
};

namespace {

constexpr int64_t kMostBytes = int64_t{256} << 20;

std::mutex mutex;
CachedFilters* newest = nullptr;  // a list, most recently returned first

bool same(const FilterKey& a, const FilterKey& b) {
  return a.weight == b.weight && a.channels == b.channels && a.kernel == b.kernel && a.banks == b.banks &&
         a.bank_bytes == b.bank_bytes && a.layout == b.layout;
}

}  // namespace

FilterLease::FilterLease(const FilterKey& key) : entry_(nullptr) {
  if (key.banks == 0) return;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (CachedFilters** link = &newest; *link != nullptr; link = &(*link)->next)
      if (same((*link)->key, key)) {
        entry_ = *link;
        *link = entry_->next;
        return;
      }
  }
  entry_ = new CachedFilters(key);
}

FilterLease::~FilterLease() {
  if (entry_ == nullptr) return;
  CachedFilters* old = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    entry_->next = newest;
    newest = entry_;
    int64_t bytes = 0;
    for (CachedFilters** link = &newest; *link != nullptr; link = &(*link)->next) {
      bytes += (*link)->bytes();
      if (bytes > kMostBytes) {  // this one and all older ones
        old = *link;
        *link = nullptr;
        break;
      }
    }
  }
  while (old != nullptr) {
    CachedFilters* const next = old->next;
    delete old;
    old = next;
  }
}

void* FilterLease::data() const { return entry_->data.get(); }
uint64_t* FilterLease::hashes() const { return entry_->hashes.get(); }

}  // namespace rnf
