// Reference counts of the token slots of the key/value pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pmc {

// A slot holds one token's keys and values in every layer. Histories share the slots of their common prefix;
// a slot is free again when the last history that holds it drops it.
class KvPool {
 public:
  explicit KvPool(int64_t capacity);

  // A free slot, held once; the caller has asked available() first.
  int32_t take();
  void hold(const std::vector<int32_t>& slots);
  void drop(const std::vector<int32_t>& slots);

  int64_t available() const { return capacity_ - in_use_; }
  int64_t in_use() const { return in_use_; }
  int64_t peak() const { return peak_; }
  // One more than the largest slot handed out so far: how long the tensors must be.
  int64_t span() const { return static_cast<int64_t>(holders_.size()); }

 private:
  size_t index_of(int32_t slot) const;

  int64_t capacity_, in_use_ = 0, peak_ = 0;
  std::vector<int32_t> holders_;  // of each slot handed out so far
  std::vector<int32_t> free_;     // those of them that nobody holds
};

}  // namespace pmc
