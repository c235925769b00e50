// Keeps packed filters between calls: a trained network is attacked and evaluated with the same filters over and over,
// and a backward pass repeats the filters of its forward pass.
//
// An entry belongs to the address of a weight and is valid for its contents: every call hashes the filters, bank by
// bank, and packs again what changed. So no update of a weight is missed, whichever way it was made.
#pragma once
#include <cstdint>

#include "memory.h"

namespace rnf {

struct FilterKey {
  const void* weight;
  int64_t channels, kernel;
  int64_t banks, bank_bytes;  // what is stored; no banks, no entry
  int64_t layout;             // which packing
};

struct CachedFilters;

// An entry that is this caller's alone until the end of the scope, new or with what an earlier call left in it.
class FilterLease {
 public:
  explicit FilterLease(const FilterKey& key);
  ~FilterLease();
  FilterLease(const FilterLease&) = delete;
  FilterLease& operator=(const FilterLease&) = delete;
  void* data() const;
  uint64_t* hashes() const;  // of each bank's weights; 0: nothing there yet

 private:
  CachedFilters* entry_;
};

}  // namespace rnf
