// The exponential race over a whole vocabulary, which rules out nearly all tokens before computing their
// weight.
#pragma once

#include <cstdint>

namespace pmc {

// One row of logits, all of whose tokens may be drawn.
struct Race {
  const float* logits;  // [vocab]
  int64_t vocab;
  double top, temperature;  // the largest logit; above 0
  int64_t first;            // a token with that logit
  float* bounds;            // [vocab], scratch: race_bounds fills it once a row
};

// Needs AVX-512, as race does.
void race_bounds(const Race& row);

// arg-max over v of exp((logits[v] - top) / temperature) / E_v, where E_v is the token's own exponential
// number: the same token, number for number, that computing all of these would give.
int64_t race(const Race& row, uint64_t key, uint32_t position, uint32_t sample);

}  // namespace pmc
