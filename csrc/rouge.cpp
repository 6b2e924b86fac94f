#include "rouge.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pmc {
namespace {

constexpr int64_t kMostWords = int64_t{1} << 27;  // of one reference's masks: 1 GiB, 90,000 different words

}  // namespace

LcsMatcher::LcsMatcher(const int32_t* reference, int64_t length)
    : words_((length + 63) / 64), tokens_(reference, reference + length), unmatched_(words_) {
  std::sort(tokens_.begin(), tokens_.end());
  tokens_.erase(std::unique(tokens_.begin(), tokens_.end()), tokens_.end());
  if (static_cast<int64_t>(tokens_.size()) * words_ > kMostWords) {
    throw std::invalid_argument("a reference of " + std::to_string(length) + " words is too long");
  }
  masks_.assign(tokens_.size() * words_, 0);
  for (int64_t i = 0; i < length; ++i) {
    const auto row = std::lower_bound(tokens_.begin(), tokens_.end(), reference[i]);
    masks_[(row - tokens_.begin()) * words_ + i / 64] |= uint64_t{1} << (i % 64);
  }
}

const uint64_t* LcsMatcher::mask_of(int32_t token) const {
  const auto row = std::lower_bound(tokens_.begin(), tokens_.end(), token);
  if (row == tokens_.end() || *row != token) return nullptr;
  return masks_.data() + (row - tokens_.begin()) * words_;
}

int64_t LcsMatcher::length_with(const int32_t* candidate, int64_t length) {
  std::fill(unmatched_.begin(), unmatched_.end(), ~uint64_t{0});
  for (int64_t i = 0; i < length; ++i) {
    const uint64_t* mask = mask_of(candidate[i]);
    if (mask == nullptr) continue;
    uint64_t carry = 0;
    for (int64_t w = 0; w < words_; ++w) {
      const uint64_t v = unmatched_[w];
      const uint64_t hit = v & mask[w];
      const uint64_t partial = v + hit;
      const uint64_t sum = partial + carry;
      carry = (partial < v) | (sum < partial);
      unmatched_[w] = sum | (v & ~mask[w]);
    }
  }
  // Bits past the reference's end are in no mask, so v & ~mask puts them back: they stay 1.
  int64_t matched = 0;
  for (const uint64_t v : unmatched_) matched += __builtin_popcountll(~v);
  return matched;
}

void rouge_l_recall(const int32_t* references, const int64_t* reference_offsets, const int32_t* candidates,
                    const int64_t* candidate_offsets, int64_t questions, int64_t samples, double* recall) {
  for (int64_t q = 0; q < questions; ++q) {
    const int64_t begin = reference_offsets[q];
    const int64_t length = reference_offsets[q + 1] - begin;
    LcsMatcher matcher(references + begin, length);
    for (int64_t i = q * samples; i < (q + 1) * samples; ++i) {
      const int64_t size = candidate_offsets[i + 1] - candidate_offsets[i];
      recall[i] = length == 0 || size == 0
                      ? 0.0
                      : static_cast<double>(matcher.length_with(candidates + candidate_offsets[i], size)) /
                            static_cast<double>(length);
    }
  }
}

}  // namespace pmc
