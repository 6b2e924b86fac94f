// Longest common subsequences of token-id sequences, bit-parallel.
#pragma once

#include <cstdint>
#include <vector>

namespace pmc {

// Length of the longest common subsequence of one reference and many candidates.
//
// The reference's positions are bits of a word array; each candidate token costs one pass over
// it (Hyyro 2004, "Bit-parallel LCS-length computation revisited"), so a pair costs
// n * ceil(m / 64) steps instead of n * m.
class LcsMatcher {
 public:
  LcsMatcher(const int32_t* reference, int64_t length);
  int64_t length_with(const int32_t* candidate, int64_t length);

 private:
  const uint64_t* mask_of(int32_t token) const;

  int64_t words_;
  std::vector<int32_t> tokens_;  // distinct reference tokens, sorted
  std::vector<uint64_t> masks_;  // [tokens, words]: where each one stands
  std::vector<uint64_t> unmatched_;
};

// recall[q, i] = LCS(reference q, candidate (q, i)) / length of reference q, 0 if either is empty.
// Offsets delimit the flat id arrays: reference_offsets [questions + 1], candidate_offsets
// [questions * samples + 1].
void rouge_l_recall(const int32_t* references, const int64_t* reference_offsets, const int32_t* candidates,
                    const int64_t* candidate_offsets, int64_t questions, int64_t samples, double* recall);

}  // namespace pmc
