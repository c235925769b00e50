#include "turns.h"

#include <thread>

namespace rnf {

Turns::Turns(int64_t groups) : groups_(groups), taken_(0), ended_(0) {}

int64_t Turns::take() {
  const int64_t group = taken_.fetch_add(1, std::memory_order_relaxed);
  return group < groups_ ? group : -1;
}

void Turns::wait_for(int64_t group) const {
  while (ended_.load(std::memory_order_acquire) != group) std::this_thread::yield();
}

void Turns::end() { ended_.fetch_add(1, std::memory_order_release); }

}  // namespace rnf
