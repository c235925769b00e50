// Work that threads share out as they go and whose results are added in a fixed order.
#pragma once
#include <atomic>
#include <cstdint>

namespace rnf {

// Hands out groups in order and lets each add its sums in the same order. A group waits only for those taken before
// it: with fewer threads than expected, down to one, nobody waits forever.
class Turns {
 public:
  explicit Turns(int64_t groups);
  int64_t take();                      // the next group, or -1
  void wait_for(int64_t group) const;  // until all groups before it have ended
  void end();

 private:
  int64_t groups_;
  std::atomic<int64_t> taken_, ended_;
};

}  // namespace rnf
