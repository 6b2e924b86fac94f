#include "kv_pool.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "checks.h"

namespace pmc {

KvPool::KvPool(int64_t capacity) : capacity_(capacity) {
  check_range("capacity", capacity, 0, std::numeric_limits<int32_t>::max());  // slots are int32
}

size_t KvPool::index_of(int32_t slot) const {
  check_range("slot", slot, 0, span() - 1);
  return static_cast<size_t>(slot);
}

int32_t KvPool::take() {
  if (available() <= 0) throw std::logic_error("the pool has no free slot");
  int32_t slot;
  if (free_.empty()) {
    slot = static_cast<int32_t>(holders_.size());
    holders_.push_back(0);
  } else {
    slot = free_.back();
    free_.pop_back();
  }
  holders_[slot] = 1;
  peak_ = std::max(peak_, ++in_use_);
  return slot;
}

void KvPool::hold(const std::vector<int32_t>& slots) {
  for (const int32_t slot : slots) {
    if (holders_[index_of(slot)] <= 0) throw std::logic_error("a free slot can't be held");
    ++holders_[slot];
  }
}

void KvPool::drop(const std::vector<int32_t>& slots) {
  for (const int32_t slot : slots) {
    if (holders_[index_of(slot)] <= 0) throw std::logic_error("a slot was dropped twice");
    if (--holders_[slot] == 0) {
      free_.push_back(slot);
      --in_use_;
    }
  }
}

}  // namespace pmc
